"""Atomic writes, JSON lines, checksums, and a lock that one process holds."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import InputError

MIB, GIB = 2**20, 2**30
TAIL_BYTES = 2**16


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def explain_full_disk(path: Path) -> Iterator[None]:
    """Turn the error of a full disk while `path` is written into one that names the place and the fix."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = path if path.is_dir() else path.parent
        free_mib = shutil.disk_usage(folder).free / MIB
        raise InputError(
            f"{path}: the disk is full ({free_mib:.1f} MiB free). Free some space, or choose another place with "
            "`--run-dir`. Then start the same command again: it continues from what is saved."
        ) from error


def describe_os_error(error: OSError) -> str | None:
    """What a user can do about a file that cannot be read or written. None if it is nothing of this kind."""
    match error.errno:
        case errno.EROFS:
            reason = "the file system is read-only here. Choose a folder on another one with `--run-dir`."
        case errno.EACCES | errno.EPERM:
            reason = (
                "permission denied. Ask the owner of this place for access, or choose another one with `--run-dir`."
            )
        case errno.ENOSPC | errno.EDQUOT:
            reason = "the disk is full. Free some space, then start the same command again."
        case errno.ENOTDIR | errno.EEXIST:
            reason = "a file is in the place of a folder. Choose another folder with `--run-dir`, or remove the file."
        case errno.ENAMETOOLONG:
            reason = "the path is too long for this file system. Choose a shorter one with `--run-dir`."
        case _:
            return None
    return f"{error.filename}: {reason}" if error.filename else reason


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `path` by temporary file, fsync and rename: a reader sees the old content or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    with explain_full_disk(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(path.parent)


def follow_umask(folder: Path) -> None:
    """Give every file below `folder` the permissions of a new file. Some libraries write files for the owner alone."""
    status = Path("/proc/self/status").read_text()  # os.umask() would change it, for other threads too
    (umask,) = (int(line.split()[1], 8) for line in status.splitlines() if line.startswith("Umask:"))
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def append_jsonl(path: Path, row: dict) -> None:
    """Append one JSON line in a single write, so that lines of several processes never mix."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with explain_full_disk(path):
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            size = os.lseek(descriptor, 0, os.SEEK_END)
            if size and os.pread(descriptor, 1, size - 1) != b"\n":  # a full disk has cut off the last line
                line = b"\n" + line
            if os.write(descriptor, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)


def read_jsonl(path: Path) -> list[dict]:
    """Read a JSON-lines file. Raises InputError naming the line that is not a JSON object."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(f"{path}:{number}: not JSON ({error.msg}). Fix or remove this line.") from error
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, found {type(row).__name__}.")
            rows.append(row)
    return rows


def read_records(path: Path) -> list[dict]:
    """The rows of a file that `append_jsonl` wrote, without those that a full disk or a power cut has torn."""
    return _whole_rows(path.read_bytes().split(b"\n"))


def read_last_jsonl(path: Path) -> list[dict]:
    """As `read_records`, of the last 64 KiB. Empty if there is no file."""
    if not path.is_file():
        return []
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")
    return _whole_rows(lines[1 if size > TAIL_BYTES else 0 :])


def _whole_rows(lines: list[bytes]) -> list[dict]:
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """SHA-256 of a JSON value in canonical form (sorted keys, no spaces), as hex."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def exclusive_lock(path: Path, what: str, shared: bool = False) -> Iterator[None]:
    """Hold `path` as a lock, which the kernel releases when this process dies. Raises InputError if another holds it.

    `shared` locks exclude only those that are not shared.
    """
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise InputError(
                f"{what} is in use by another process (pid {holder}; lock {path}). "
                "Wait for it to end, or choose another folder with `--run-dir`."
            ) from error
        except OSError as error:
            raise InputError(
                f"{path}: this file system has no locks ({error.strerror}), which keep two processes out of one run. "
                "Choose a folder on another file system with `--run-dir`, or mount this one with locks (flock)."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
