"""The kernel that DeepSpeed compiles for its ranks on a CPU, made so that a killed compilation hangs nobody."""

import fcntl
import hashlib
import os
from pathlib import Path

import torch

LOCK = "lock"  # the file by which PyTorch's extension loader says that it is compiling


def name_extensions_folder() -> None:
    """Give this environment a folder of its own for what it compiles, unless the user has named one.

    PyTorch's is one for all: two environments that use it in turn compile everything again each time, as the sources
    then lie elsewhere.
    """
    import deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    place = hashlib.sha256(f"{deepspeed.__file__} {torch.__version__}".encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(get_default_build_root(), f"tunesmith-{place}"))


def load_comm_kernel() -> None:
    """Compile the communication kernel if it is not there yet (a minute, once), and load it.

    PyTorch leaves its lock behind when it is killed while compiling, and everyone after it waits for that file forever.
    Here the ranks take turns under a lock that the kernel releases when its holder dies; the file is then nobody's.
    """
    if torch.cuda.is_available():
        return
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    name_extensions_folder()
    builder = ShareMemCommBuilder()
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder.parent / f"{builder.name}.turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (folder / LOCK).unlink(missing_ok=True)
        builder.load(verbose=False)
