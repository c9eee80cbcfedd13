"""DeepSpeed's kernel for ranks on a CPU, after somebody was killed while compiling it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from torch.utils.cpp_extension import _get_build_directory

from trainer.kernels import LOCK

ROOT = Path(__file__).parents[2]
NAME = "deepspeed_shm_comm"
LOAD = [sys.executable, "-c", "from trainer.kernels import load_comm_kernel; load_comm_kernel()"]


def test_the_lock_of_a_killed_compilation_hangs_nobody(tmp_path):
    subprocess.run(LOAD, cwd=ROOT, check=True, timeout=400, capture_output=True)  # compiles it if nobody has yet
    shutil.copytree(_get_build_directory(NAME, verbose=False), tmp_path / NAME)
    (tmp_path / NAME / LOCK).touch()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(LOAD, cwd=ROOT, env=environment, timeout=200, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / NAME / LOCK).exists()
