"""The process that computes, forked from one that has imported vLLM already."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).parents[2]
# With json for vLLM, which takes seconds to import. What is printed comes from the forked process.
FORK = """
import os, sys
from cluster.engines import core_process

def report():
    print("json" in sys.modules, os.environ.get("LATE"), os.environ.get("GONE"), flush=True)

if __name__ == "__main__":
    core_process.IMPORTS = ["json"]
    os.environ["GONE"] = "there when the server started"
    core_process.begin_import()
    os.environ["LATE"] = "set afterwards"
    del os.environ["GONE"]
    process = core_process.CoreContext().Process(target=report, kwargs={}, name="EngineCore")
    process.start()
    process.join()
    sys.exit(process.exitcode)
"""
ORPHAN = """
import os, time
from cluster.engines import core_process

def wait():
    print("core", os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    core_process.IMPORTS = ["json"]
    core_process.begin_import()
    core_process.CoreContext().Process(target=wait, kwargs={}, name="EngineCore").start()
    time.sleep(600)
"""
ENGINE = """
import sys
from pathlib import Path
import psutil
from cluster.config import ModelConfig
from cluster.engines.engine import VLLMEngine
from cluster.engines.config import EngineConfig

if __name__ == "__main__":
    engine = VLLMEngine(EngineConfig(max_model_len=128, enforce_eager=True), ModelConfig(path=sys.argv[1]), num_gpus=0)
    servers = [p for p in psutil.Process().children() if "forkserver" in " ".join(p.cmdline())]
    loaded = ["libtorch" in Path("/proc", str(server.pid), "maps").read_text() for server in servers]
    print("forked:", *(len(server.children()) for server in servers), *loaded, flush=True)
    engine._engine.shutdown()
"""


def run_script(folder: Path, text: str, *arguments: str) -> str:
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, folder / "script.py", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_forked_process_has_the_imports_and_the_current_environment_of_its_parent(tmp_path: Path) -> None:
    assert run_script(tmp_path, FORK) == "True set afterwards None"


def test_a_forked_process_is_killed_with_its_parent(tmp_path: Path) -> None:
    """Ray kills the children of a process that it ends, but not their children."""
    (tmp_path / "script.py").write_text(ORPHAN)
    command = [sys.executable, tmp_path / "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as parent:
        core = psutil.Process(int(parent.stdout.readline().split()[1]))
        core.parent().kill()
        _, alive = psutil.wait_procs([core], timeout=30)
        parent.kill()
    assert not alive


def test_an_engine_of_one_cpu_computes_in_a_forked_process(tmp_path: Path, tiny_model: Path) -> None:
    pytest.importorskip("vllm")
    assert "forked: 1 True" in run_script(tmp_path, ENGINE, str(tiny_model)).splitlines()
