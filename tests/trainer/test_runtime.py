"""DeepSpeed's kernel for ranks on a CPU, after a process was killed while compiling it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime import LOCK, set_extensions_folder

ROOT = Path(__file__).parents[2]
NAME = "deepspeed_shm_comm"
SCRIPT = "import os; from trainer import runtime; runtime.load_comm_kernel(); print(os.environ['TORCH_EXTENSIONS_DIR'])"
LOAD = [sys.executable, "-c", SCRIPT]


def test_the_lock_of_a_killed_compilation_is_removed(tmp_path: Path) -> None:
    done = subprocess.run(LOAD, cwd=ROOT, check=True, timeout=400, capture_output=True, text=True)
    compiled = Path(done.stdout.splitlines()[-1]) / NAME  # by this call, if it was not compiled yet
    shutil.copytree(compiled, tmp_path / NAME)
    (tmp_path / NAME / LOCK).touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(LOAD, cwd=ROOT, env=environment, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path), "the user's folder is used"
    assert not (tmp_path / NAME / LOCK).exists()


def test_every_environment_compiles_in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    folders = []
    for place in ("/one/site-packages/deepspeed/__init__.py", "/other/site-packages/deepspeed/__init__.py"):
        with monkeypatch.context() as context:
            context.setattr(deepspeed, "__file__", place)
            context.delenv("TORCH_EXTENSIONS_DIR", raising=False)
            set_extensions_folder()
            folders.append(os.environ.pop("TORCH_EXTENSIONS_DIR"))
    assert len(set(folders)) == 2
