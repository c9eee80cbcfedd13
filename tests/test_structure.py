"""The house rules that hold for all four packages: who imports whom, file sizes, and no way to run foreign code."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "cluster": {"cluster"},
    "generation": {"generation", "cluster"},
    "trainer": {"trainer", "cluster"},
    "launcher": {"launcher", "cluster", "generation", "trainer"},
}
MAX_LINES = 400


def sources(package: str) -> list[Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return files


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, at whatever depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.lineno, node.module or ""


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_follow_the_arrows(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {module}"
        for file in sources(package)
        for line, module in imported(ast.parse(file.read_text()))
        if (top := module.split(".")[0]) in (MAY_IMPORT.keys() | {"tests"}) and top not in MAY_IMPORT[package]
    ]
    assert not wrong


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_the_bare_package_names_are_ours(package: str, tmp_path: Path) -> None:
    assert Path(importlib.import_module(package).__file__).is_relative_to(ROOT / package)
    elsewhere = subprocess.run(
        [sys.executable, "-P", "-c", f"import {package}; print({package}.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(elsewhere.stdout.strip()) == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_file_is_too_long_to_read(package: str) -> None:
    lengths = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources(package)}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def runs_foreign_code(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        if any(k.arg == "trust_remote_code" and getattr(k.value, "value", None) is not False for k in node.keywords):
            return True
        return ast.unparse(node.func) in {"torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load"}
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    names += [node.module] if isinstance(node, ast.ImportFrom) else []
    return any(name.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve"} for name in names)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_nothing_runs_code_out_of_models_or_data(package: str) -> None:
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for file in sources(package)
        for node in ast.walk(ast.parse(file.read_text()))
        if runs_foreign_code(node)
    ]
    assert not found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("f(trust_remote_code=True)", True), ("f(trust_remote_code=False)", False), ("torch.load(file)", True),
        ("import pickle", True), ("from pickle import loads", True), ("import pickles", False),
    ],
)  # fmt: skip
def test_the_check_above_sees_what_it_looks_for(code: str, expected: bool) -> None:
    assert any(map(runs_foreign_code, ast.walk(ast.parse(code)))) is expected
