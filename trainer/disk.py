"""A full disk, as told by the libraries that write weights: they hide the error number that says so."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cluster.files import explain_full_disk

FULL_BYTES = 2**20  # less than this is free after a failed write of weights: the disk is full
TELLING = ("No space left", "quota exceeded")


@contextlib.contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """`explain_full_disk` for torch (RuntimeError), safetensors (SafetensorError) and numpy (OSError without errno)."""
    with explain_full_disk(path):
        try:
            yield
        except (RuntimeError, SafetensorError, OSError) as error:
            told = any(words in str(error) for words in TELLING)
            if told or shutil.disk_usage(path).free < FULL_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise
