"""From a folder that is being filled to a complete checkpoint: copy, commit, rename. Loads neither torch nor DeepSpeed.

A kill at any instant leaves complete checkpoints, and at most folders whose names begin with a dot.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from cluster.files import MIB, explain_full_disk, follow_umask, fsync_folder
from cluster.run.fence import own_token, verify
from cluster.run.manifest import write_manifest
from trainer.checkpoint.state import expired_checkpoints, step_folder
from trainer.config.train import CheckpointConfig

PARTIAL = ".saving_"  # prefix of a checkpoint that is being written
REMOVED = ".removing_"  # prefix of a checkpoint that is being removed
CONVERTED = "universal_"  # prefix of a checkpoint in the form that any number of ranks can load
FULL_DISK_BYTES = MIB  # the disk counts as full if less than this is free after a failed write
FULL_DISK_MESSAGES = ("No space left", "quota exceeded")


def partial_folder(checkpoints: Path, step: int) -> Path:
    """Where a checkpoint is written. Its name has the fencing token, so two attempts never write to the same folder."""
    token = own_token()
    owner = "" if token is None else f"g{token}_"
    return checkpoints / f"{PARTIAL}{owner}{step_folder(checkpoints, step).name}"


def remove_unfinished(checkpoints: Path) -> None:
    """Remove what earlier attempts left unfinished."""
    for stale in (*checkpoints.glob(f"{PARTIAL}*"), *checkpoints.glob(f"{REMOVED}*")):
        shutil.rmtree(stale)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that nobody finds a checkpoint that lacks some of its files."""
    trash = folder.with_name(f"{REMOVED}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash)


def commit_folder(partial: Path, folder: Path, **fields: object) -> None:
    """Write the manifest of `partial` with `fields`, flush everything to the disk, and rename `partial` to `folder`.

    Raises Superseded if a newer attempt owns the run by then.
    """
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    follow_umask(partial)
    write_manifest(partial, files, **fields)
    for path in (partial, *partial.rglob("*")):
        fsync_folder(path)  # of files too: older checkpoints are removed next, so nothing of this one may be lost
    verify(folder.parent.parent)
    if folder.exists():
        remove_checkpoint(folder)
    os.rename(partial, folder)
    fsync_folder(folder.parent)


def commit_checkpoint(checkpoints: Path, step: int, config: CheckpointConfig) -> None:
    """Commit the checkpoint of `step`, then remove those that `config` no longer keeps.

    Forms for another number of ranks are removed too, because the newest checkpoint is now one of this number.
    """
    with explain_failed_write(checkpoints.parent):
        commit_folder(partial_folder(checkpoints, step), step_folder(checkpoints, step), step=step)
    for folder in (*expired_checkpoints(checkpoints, config), *checkpoints.glob(f"{CONVERTED}*")):
        remove_checkpoint(folder)


def move_files(source: Path, target: Path) -> None:
    """Copy one rank's part of a checkpoint to the folder of all parts, and remove the original."""
    with explain_failed_write(target.parent):
        for path in filter(Path.is_file, source.rglob("*")):  # copytree would copy the rights of folders too
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
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
