"""The folder of one Ray on one node: in the node's own /tmp, for nobody else's eyes, and gone at the end.

    with private_folder(token) as folder:
        environment = {**os.environ, **ray_environment(folder)}

Ray opens what it makes to everybody and keeps its sockets there, so its folders lie in one of ours (0700), beside the
token (0600) without which nobody may talk to it.
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
LEFTOVER_SECONDS = 600.0
ENGINE_FILES = "VLLM_RPC_BASE_PATH"  # vLLM's name for where its sockets are
MAX_SOCKET_FOLDER_CHARS = 45  # Ray appends about 60, and the kernel takes 107 for a socket's path


def new_token() -> str:
    return secrets.token_hex(32)


@contextlib.contextmanager
def private_folder(token: str) -> Iterator[Path]:
    """A new folder with the token in it, removed at the end. Folders of processes that were killed go as well."""
    parent = own_tmp()
    _remove_abandoned(parent)
    with contextlib.ExitStack() as stack:
        try:
            folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))  # 0700
            stack.callback(shutil.rmtree, folder, ignore_errors=True)  # a worker on its way out may still write there
            stack.push(_write_token(folder, token))
        except OSError as error:
            raise InputError(
                f"{parent} on {socket.gethostname()}: {error.strerror}. Ray's folder has to be there: make room, or "
                "set TMPDIR to another folder that is this machine's own."
            ) from error
        if len(str(folder)) > MAX_SOCKET_FOLDER_CHARS:
            raise InputError(f"TMPDIR is too long for Ray's sockets ({folder}). Set TMPDIR=/tmp.")
        yield folder


def _write_token(folder: Path, token: str) -> TextIO:
    """Write a token that only we can read. The open file holds a lock: the folder is in use while we live."""
    descriptor = os.open(folder / "token.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    file = os.fdopen(descriptor, "w")
    file.write(token)
    file.flush()
    os.rename(folder / "token.new", folder / "token")  # so no one ever sees a token without its lock
    return file


def own_tmp() -> Path:
    """TMPDIR or /tmp. Not Python's answer: with a full /tmp that would be some other folder, which nodes may share."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _remove_abandoned(parent: Path) -> None:
    """Remove the folders of sessions that were killed: nobody holds the lock on their token.

    Ray processes that outlive a session by seconds make its folder anew, without a token: age tells those.
    """
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # another session may be removing it at this moment
            if folder.stat().st_uid == os.getuid() and _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    token = folder / "token"
    if not token.exists():
        return time.time() - folder.stat().st_mtime > LEFTOVER_SECONDS
    with open(token) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def ray_environment(folder: Path) -> dict[str, str]:
    """What head, nodes and drivers of a Ray must have in their environment, with the token of `folder`.

    The mode is said outright: Ray would turn tokens on for a head, and not for the other nodes, because of a token that
    some earlier Ray left in the user's home.
    """
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let any other process starve the engines
        ENGINE_FILES: str(folder),  # a killed engine leaves its sockets
    }


def keep_temporary_files_there() -> None:
    """Let this process and those it starts keep temporary files in the folder of the Ray it is in, if that is ours.

    An engine is killed at its end, as Ray does it, and removes nothing: elsewhere it would stay for good.
    """
    if folder := os.environ.get(ENGINE_FILES):
        os.environ["TMPDIR"] = tempfile.tempdir = folder


def keep_logs(folder: Path, destination: Path) -> None:
    """Copy what Ray's processes said: a dead engine's last words are there and nowhere else."""
    for pattern in KEPT_LOGS:
        for log in folder.glob(pattern):
            if log.is_file() and log.stat().st_size:
                destination.mkdir(parents=True, exist_ok=True)
                shutil.copy(log, destination)
