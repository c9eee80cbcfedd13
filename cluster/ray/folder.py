"""The folder of one Ray on one node: in the node's own /tmp, private, and removed at the end.

    with private_folder(token) as folder:
        environment = {**os.environ, **ray_environment(folder)}

Ray makes its folders and sockets accessible to all users. So they lie in a folder of ours (0700), with the token
(0600) that every client of this Ray needs.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cluster.errors import InputError

FOLDER_PREFIX = "tunesmith-ray-"
RAY_FOLDER = "r"
LOGS = f"{RAY_FOLDER}?/session_2*/logs"
KEPT_LOGS = ("start?.log", f"{LOGS}/worker-*", f"{LOGS}/raylet.*", f"{LOGS}/gcs_server.*")
STALE_SECONDS = 600.0
ENGINE_FILES = "VLLM_RPC_BASE_PATH"  # the variable that says where vLLM puts its sockets
MAX_SOCKET_FOLDER_CHARS = 45  # Ray appends about 60, and the kernel allows 107 for a socket's path


def new_token() -> str:
    return secrets.token_hex(32)


@contextlib.contextmanager
def private_folder(token: str) -> Iterator[Path]:
    """A new folder with the token in it, removed at the end. Also removes the folders of processes that were killed."""
    # If /tmp is full, `tempfile.gettempdir` may choose a folder that nodes share.
    parent = Path(os.environ.get("TMPDIR") or "/tmp")
    _remove_abandoned(parent)
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))  # 0700
            stack.callback(shutil.rmtree, folder, ignore_errors=True)  # a worker that ends may still write there
            stack.push(_write_token(folder, token))
        except OSError as error:
            raise InputError(
                f"{parent} on {socket.gethostname()}: {error.strerror}. Ray needs a folder there. Free some space, or "
                "set TMPDIR to another local folder."
            ) from error
        if len(str(folder)) > MAX_SOCKET_FOLDER_CHARS:
            raise InputError(f"TMPDIR is too long for Ray's sockets ({folder}). Set TMPDIR=/tmp.")
        yield folder


def _write_token(folder: Path, token: str) -> TextIO:
    """Write a token that only this user can read. The open file holds a lock, which marks the folder as in use."""
    descriptor = os.open(folder / "token.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    file = os.fdopen(descriptor, "w")
    file.write(token)
    file.flush()
    os.rename(folder / "token.new", folder / "token")  # so the token exists only with its lock
    return file


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of sessions that were killed.

    Ray processes that outlive a session by seconds create its folder again without a token, which is stale with age.
    """
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another session may remove it at this moment
            if folder.stat().st_uid == os.getuid() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    token = folder / "token"
    if not token.exists():
        return time.time() - folder.stat().st_mtime > STALE_SECONDS
    with open(token) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def ray_environment(folder: Path) -> dict[str, str]:
    """The environment of the head, the nodes and the drivers of a Ray, with the token of `folder`.

    The mode is explicit, because a token that an earlier Ray left in the user's home would turn tokens on for the head
    but not for the other nodes.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # with Ray's 15 any other process could starve the engines
        ENGINE_FILES: str(folder),  # a killed engine does not remove its sockets
    }


def use_ray_folder_for_temporary_files() -> None:
    """Let this process and its children keep temporary files in the folder of their Ray, if the folder is ours.

    Ray kills an engine at its end, so the engine removes nothing. Elsewhere its files would stay forever.
    """
    if folder := os.environ.get(ENGINE_FILES):
        os.environ["TMPDIR"] = tempfile.tempdir = folder


def keep_logs(folder: Path, destination: Path) -> None:
    """Copy the logs of Ray's processes, which alone have the last messages of a dead engine."""
    for pattern in KEPT_LOGS:
        for log in folder.glob(pattern):
            if log.is_file() and log.stat().st_size:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(log, destination / log.name)
