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
# Room of a package -> the other rooms of the package that it may import. Modules of the package itself are a room too.
ROOMS = {
    "cluster": set(),
    "cluster.data": {"cluster", "cluster.run"},
    "cluster.engines": {"cluster", "cluster.processes", "cluster.ray"},
    "cluster.nodes": {"cluster", "cluster.run"},
    "cluster.processes": {"cluster"},
    "cluster.ray": {"cluster", "cluster.nodes", "cluster.run"},
    "cluster.run": {"cluster"},
    "generation": {"generation.config", "generation.filters", "generation.methods", "generation.parsing"},
    "generation.config": set(),
    "generation.filters": {"generation.config"},
    "generation.methods": {"generation", "generation.config", "generation.filters", "generation.parsing"},
    "generation.parsing": {"generation.filters"},
    "trainer": {"trainer.checkpoint", "trainer.config", "trainer.data", "trainer.model"},
    "trainer.checkpoint": {"trainer", "trainer.config", "trainer.model"},
    "trainer.config": set(),
    "trainer.data": {"trainer.config"},
    "trainer.model": {"trainer.config", "trainer.data"},
    "launcher": {"launcher.slurm"},
    "launcher.job": {"launcher", "launcher.slurm"},
    "launcher.slurm": {"launcher"},
}
NOT_IMPORTED = {"tests", "toy_world", "english", "docs"}
MAX_LINES = 400
MIN_LINES, MAX_SHORT_FILES = 40, 10


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
        if (top := module.split(".")[0]) in (MAY_IMPORT.keys() | NOT_IMPORTED) and top not in MAY_IMPORT[package]
    ]
    assert not wrong


def room_of(module: str) -> str:
    """The room that a module is in, or the module itself if it is a room."""
    place = ROOT.joinpath(*module.split("."))
    return ".".join((place if place.is_dir() else place.parent).relative_to(ROOT).parts)


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_inside_a_package_follow_the_arrows(package: str) -> None:
    wrong = []
    for file in sources(package):
        own = ".".join(file.parent.relative_to(ROOT).parts)
        for line, module in imported(ast.parse(file.read_text())):
            if module.split(".")[0] == package and (room := room_of(module)) != own and room not in ROOMS[own]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong


def test_a_class_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for package in MAY_IMPORT:
        for file in sources(package):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef):
                    places.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


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


def test_few_files_are_fragments() -> None:
    files = [file for package in MAY_IMPORT for file in sources(package) if file.name != "__init__.py"]
    short = [str(file.relative_to(ROOT)) for file in files if len(file.read_text().splitlines()) < MIN_LINES]
    assert len(short) <= MAX_SHORT_FILES, f"merge some of them into the file that uses them: {', '.join(short)}"


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
