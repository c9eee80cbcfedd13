"""Prepare a process for DeepSpeed: quiet libraries, and the compiled kernel that ranks on a CPU communicate through."""

import fcntl
import hashlib
import logging
import os
import warnings
from pathlib import Path

import torch

from cluster.system import require_system, use_own_programs

LOCK = "lock"  # the file that PyTorch's extension loader holds while it compiles


def set_accelerator_env() -> None:
    """Prepare the environment before DeepSpeed is imported: its programs, such as ninja, and that there is no GPU.

    Without the latter every rank warns that it found none.
    """
    use_own_programs()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def quieten_libraries() -> None:
    """Turn off progress bars and the warnings that a user cannot act on. All other warnings still appear."""
    import transformers

    deepspeed = logging.getLogger("DeepSpeed")
    deepspeed.setLevel(logging.WARNING)
    # Every rank that loads a universal checkpoint logs this; we have no tensor parallelism.
    deepspeed.addFilter(lambda record: not record.getMessage().startswith("MPU is not provided"))
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # on purpose an export keeps weights on disk
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    transformers.utils.logging.disable_progress_bar()
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # `datasets` is imported later, and only by some ranks


def set_extensions_folder() -> None:
    """Give this environment its own folder for compiled extensions, unless the user has set one.

    PyTorch's default folder is shared by all environments: two that alternate recompile everything each time, because
    the paths of the sources differ.
    """
    import deepspeed
    from torch.utils.cpp_extension import get_default_build_root

    suffix = hashlib.sha256(f"{deepspeed.__file__} {torch.__version__}".encode()).hexdigest()[:12]
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(get_default_build_root(), f"tunesmith-{suffix}"))


def load_comm_kernel() -> None:
    """Load DeepSpeed's communication kernel for CPUs. The first call on a machine compiles it, which takes a minute.

    PyTorch leaves its lock file behind if it is killed while compiling, and every later process waits for that file
    forever. Here the ranks take turns under a file lock that the operating system releases when its holder dies, so
    whoever holds it may delete PyTorch's file.
    """
    if torch.cuda.is_available():
        return
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    set_extensions_folder()
    builder = ShareMemCommBuilder()
    folder = Path(_get_build_directory(builder.name, verbose=False))
    with open(folder.parent / f"{builder.name}.turn", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        (folder / LOCK).unlink(missing_ok=True)
        if not (folder / f"{builder.name}.so").is_file():
            require_system(engines=False)
        builder.load(verbose=False)
