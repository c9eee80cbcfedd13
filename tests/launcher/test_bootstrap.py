"""Set-up refuses with one sentence what it cannot do, and finds packages where pip does."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def bootstrap(*arguments: str, root: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-S", str(root / "launcher" / "bootstrap.py"), *arguments]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def module(monkeypatch, tmp_path) -> ModuleType:
    """The program as a module, whose `.venv` does not exist."""
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "launcher" / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "VENV", tmp_path)
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_", "SSL_CERT_", "ALL_PROXY"))]:
        monkeypatch.delenv(name)
    return module


def test_what_the_system_has_to_bring_is_one_sentence_with_the_command_to_type(tmp_path):
    done = bootstrap("cpu", PATH=str(tmp_path))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: this machine lacks g++")
    assert re.search(r"On Debian or Ubuntu: (sudo )?apt install g\+\+", done.stderr)


def test_wrong_python_is_one_clear_sentence(tmp_path):
    source = (ROOT / "launcher" / "bootstrap.py").read_text()
    script = re.sub(r"^PYTHONS = .*", "PYTHONS = ((3, 10),)", source, flags=re.MULTILINE)
    other = tmp_path / "launcher" / "bootstrap.py"
    other.parent.mkdir()
    other.write_text(script)
    done = bootstrap(root=tmp_path)
    assert done.returncode == 2
    assert "Python 3.11, 3.12 or 3.13 is needed" in done.stderr and done.stderr.count("\n") == 1


def test_the_pythons_of_set_up_are_those_of_the_package(module):
    allowed = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert tuple((3, minor) for minor in range(int(allowed[1]), int(allowed[2]))) == module.PYTHONS


def test_unknown_extra_is_refused_before_anything_is_touched():
    done = bootstrap("cpuu")
    assert done.returncode == 2 and "The extras are cpu, gpu, bench, dev." in done.stderr


def test_a_venv_of_another_python_does_not_count(module, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "PYTHON", Path(sys.executable))
    own = tmp_path / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    own.mkdir(parents=True)
    assert module.is_venv_of_this_python()
    own.rename(tmp_path / "other")  # `python3` was another one when the environment was made
    assert not module.is_venv_of_this_python()


def test_uv_gets_the_settings_of_pip(module, monkeypatch):
    listed = "\n".join(
        [
            ":env:.find-links='/old'",
            "global.cert='/etc/ca.pem'",
            "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'",
            "global.index-url='https://global.example/simple'",
            "install.index-url='https://mirror.example/simple'",
            "global.timeout='60'",
        ]
    )
    monkeypatch.setattr(module, "output_of", lambda command: listed)
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels /more")
    monkeypatch.setenv("UV_CACHE_DIR", "/cache")
    environ = {name: value for name, value in module.uv_environ().items() if name.startswith(("UV_", "SSL_"))}
    assert environ == {
        "UV_DEFAULT_INDEX": "https://mirror.example/simple",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/wheels,/more",
        "SSL_CERT_FILE": "/etc/ca.pem",
        "UV_CACHE_DIR": "/cache",
    }


@pytest.mark.parametrize(
    ("reachable", "options"),
    [
        ({"torch==2.13.0+cpu", "--torch-backend"}, []),
        ({"--torch-backend"}, ["--torch-backend", "cpu"]),
        (set(), []),
    ],
)
def test_torch_comes_without_cuda_if_it_can_and_else_set_up_says_so(
    module, monkeypatch, capsys, tmp_path, reachable, options
):
    monkeypatch.setattr(module, "run", lambda command, **_: 0 if reachable & set(command) else 1)
    overrides = tmp_path / "overrides.txt"
    assert module.cpu_options(["uv", "pip", "install"], {}) == [*options, "--override", str(overrides)]
    assert ("with CUDA" in capsys.readouterr().out) == (not reachable)
    assert ("torch==2.13.0" in overrides.read_text().splitlines()) == (not reachable)
    assert "triton ; python_version < '3'" in overrides.read_text()


def test_an_installed_torch_with_cuda_is_not_taken_for_one_without(module, monkeypatch):
    def uv(command: list[str], **_: object) -> int:
        return 0 if module.TORCH in command and "--reinstall" not in command else 1  # no index answers

    monkeypatch.setattr(module, "run", uv)
    assert "--torch-backend" not in module.cpu_options(["uv", "pip", "install"], {})


def test_an_environment_for_gpus_gets_all_that_vllm_asks_for(module, monkeypatch):
    commands = []
    monkeypatch.setattr(module, "run", lambda command, **_: commands.append(command))
    monkeypatch.setattr(module, "output_of", lambda command: "")
    module.install("uv", ["gpu"])
    assert len(commands) == 1 and "--override" not in commands[0] and "--torch-backend" not in commands[0]
