"""What a machine has to bring is checked by what is needed of it, and no environment has to be activated."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import system
from cluster.errors import InputError

ROOT = Path(__file__).parents[2]
NINJA = "from torch.utils.cpp_extension import is_ninja_available; print(is_ninja_available())"


@pytest.fixture
def bare(monkeypatch, tmp_path) -> None:
    """A machine that has nothing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(system, "can_load", lambda library: False)
    monkeypatch.setattr(system.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(system.importlib.util, "find_spec", lambda name: None)


def test_this_machine_lacks_nothing():
    assert not system.lacking(engines_on_cpu=True, venv=True)
    system.require_system(engines=True)


def test_the_readme_installs_all_that_can_be_missing(bare, monkeypatch):
    monkeypatch.setattr(system, "debian_python", lambda: "python3")
    missing = system.lacking(engines_on_cpu=True, venv=True)
    (line,) = re.findall(r"^\$ sudo apt install (.+)$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert set(missing) == set(line.split()) - {"make"} | {"util-linux"}  # which no Debian or Ubuntu lacks


def test_training_needs_no_libraries_of_the_engines(bare):
    assert set(system.lacking(engines_on_cpu=False)) == {"g++", f"{system.debian_python()}-dev"}


def test_the_sentence_ends_with_the_command(bare, monkeypatch):
    monkeypatch.setattr(system.os, "geteuid", lambda: 1000)
    with pytest.raises(
        InputError, match=r"this machine lacks g\+\+, the headers of Python \S+, libnuma\.so\.1 and lscpu\. "
    ):
        system.require_system(engines=True)
    with pytest.raises(InputError, match=r"On Debian or Ubuntu: sudo apt install g\+\+ \S+-dev libnuma1 util-linux$"):
        system.require_system(engines=True)


def test_packages_are_those_of_the_python_that_runs(monkeypatch):
    monkeypatch.setattr(system.sys, "_base_executable", os.path.realpath("/usr/bin/python3"), raising=False)
    assert system.debian_python() == "python3"
    monkeypatch.setattr(system.sys, "_base_executable", "/usr/local/bin/other")
    assert system.debian_python() == f"python{sys.version_info.major}.{sys.version_info.minor}"


def test_ninja_is_found_in_an_environment_that_is_not_activated(tmp_path):
    environ = {**os.environ, "PATH": str(tmp_path)}
    for start, found in (("", "False"), ("from trainer.runtime import set_accelerator_env as s; s(); ", "True")):
        command = [sys.executable, "-c", start + NINJA]
        done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [found]


def test_engines_find_the_programs_of_their_environment(monkeypatch, tmp_path):
    from cluster.config import ModelConfig
    from cluster.engines.config import EngineConfig
    from cluster.engines.engine import set_environment

    monkeypatch.setattr(os, "environ", {**os.environ, "PATH": str(tmp_path)})
    set_environment(EngineConfig(), ModelConfig(path="m"), num_gpus=1)
    assert os.environ["PATH"].split(":") == [str(Path(sys.prefix) / "bin"), str(tmp_path)]


def test_caches_move_into_the_environment_if_home_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")  # so that the one which is set here is removed at the end
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    system.use_writable_cache(tmp_path / "venv")
    assert "XDG_CACHE_HOME" not in os.environ  # the folder can be made
    monkeypatch.setattr(system.os, "access", lambda path, mode: False)
    system.use_writable_cache(tmp_path / "venv")
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "venv" / "cache")
