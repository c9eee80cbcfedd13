"""From a folder that is being filled to a checkpoint: copied, sealed, renamed. Loads neither torch nor DeepSpeed.

A kill at any instant leaves complete checkpoints and at most folders whose names begin with a dot.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from cluster.files import MIB, explain_full_disk, fsync_folder
from cluster.run.fence import own_token, verify
from cluster.run.manifest import write_manifest
from trainer.checkpoint.state import expired_checkpoints, step_folder
from trainer.config.train import CheckpointConfig

PARTIAL = ".saving_"  # a checkpoint being written
REMOVED = ".removing_"  # one that is being removed
FULL_DISK_BYTES = MIB  # if less than this is free after a failed write, the disk counts as full
FULL_DISK_MESSAGES = ("No space left", "quota exceeded")
CONVERTED = "universal_"  # a checkpoint in the form that any number of ranks can load


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written. Two claims never write to the same place, however late one of them is."""
    token = own_token()
    owner = "" if token is None else f"g{token}_"
    return checkpoints / f"{PARTIAL}{owner}{step_folder(checkpoints, step).name}"


def remove_partial(checkpoints: Path) -> None:
    """Remove what earlier attempts left unfinished."""
    for leftover in (*checkpoints.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{REMOVED}*")):
        shutil.rmtree(leftover)


def remove(folder: Path) -> None:
    """Remove a checkpoint: under another name first, so that none is ever found with half of its files."""
    doomed = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def seal(partial: Path, folder: Path, **fields: object) -> None:
    """Write the manifest of `partial`, make all of it last, and rename it to `folder`.

    Raises Superseded if a newer token owns the run by then.
    """
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    write_manifest(partial, files, **fields)
    for path in (partial, *partial.rglob("*")):
        fsync_folder(path)  # files as well: none of this may be lost once older checkpoints are removed
    verify(folder.parent.parent)
    if folder.exists():
        remove(folder)
    os.rename(partial, folder)
    fsync_folder(folder.parent)


def put_in_place(checkpoints: Path, step: int, config: CheckpointConfig) -> None:
    """Seal the checkpoint of `step`, then remove those that are no longer kept.

    Forms for another number of ranks go as well: the newest checkpoint is now one of this number.
    """
    with explain_failed_write(checkpoints.parent):
        seal(partial_folder(checkpoints, step), step_folder(checkpoints, step), step=step)
    for old in (*expired_checkpoints(checkpoints, config), *checkpoints.glob(f"{CONVERTED}*")):
        remove(old)


def copy_files(source: Path, target: Path) -> None:
    """Copy one rank's part of a checkpoint beside those of the others, and remove it where it came from."""
    with explain_failed_write(target.parent):
        shutil.copytree(source, target, dirs_exist_ok=True)
    shutil.rmtree(source)


@contextlib.contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """`explain_full_disk` for libraries whose errors lack the error number of a full disk.

    They are torch (RuntimeError), safetensors (SafetensorError) and numpy (OSError without errno).
    """
    with explain_full_disk(path):
        try:
            yield
        except (RuntimeError, SafetensorError, OSError) as error:
            is_full = any(message in str(error) for message in FULL_DISK_MESSAGES)
            if is_full or shutil.disk_usage(path).free < FULL_DISK_BYTES:
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


class Background:
    """One thing at a time, done in a thread. What went wrong is kept until it is asked for."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._work: Future | None = None

    def start(self, function, *arguments: object) -> None:
        self.wait()
        self._work = self._thread.submit(function, *arguments)

    def wait(self) -> None:
        if self._work is not None:
            self._work.exception()

    @property
    def is_done(self) -> bool:
        return self._work is None or self._work.done()

    @property
    def error(self) -> BaseException | None:
        """Why the work failed; None while it goes on, and if it did not."""
        return self._work.exception() if self._work is not None and self._work.done() else None
