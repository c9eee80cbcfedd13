"""The Ray that a stage runs on: the one RAY_ADDRESS names, or a private one of our own that ends with the stage.

    with ray_session(run.root):
        ...

`ray job submit` sets RAY_ADDRESS for its driver, so a stage submitted there uses that cluster. No other cluster is
ever looked for: guessing attaches to a neighbor's.
"""

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from cluster.errors import InputError, TunesmithError

FOLDER_PREFIX = "tunesmith-ray-"
RAY_FOLDER = "r"
START_ATTEMPTS = 3
LEFTOVER_SECONDS = 600.0
MAX_SOCKET_FOLDER_CHARS = 45  # Ray appends about 60, and the kernel takes 107 for a socket's path


@contextlib.contextmanager
def ray_session(run_root: Path) -> Iterator[None]:
    """Connect this process to Ray until the block ends.

    A session inside another one is the outer one. A private Ray keeps its workers' logs in `run_root/logs/ray` if the
    block fails. Raises InputError for an address that cannot be used, and TunesmithError if Ray does not start.
    """
    import ray  # not at the top: it takes a second that `--help` does not have

    address = os.environ.get("RAY_ADDRESS")
    if ray.is_initialized():
        yield
    else:
        with _joined(address) if address else _private(run_root):
            yield


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    if address == "auto" or address.startswith(("http://", "https://", "ray://")):
        raise InputError(
            f"RAY_ADDRESS={address}: give the head's HOST:PORT (as `ray start --head` prints it), or start with "
            "`ray job submit`, which sets it. Unset RAY_ADDRESS for a private Ray on this machine."
        )
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise InputError(
            f"RAY_ADDRESS={address}: cannot connect ({_last_line(error)}). Check that this Ray is up and that "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH are those of its head, or unset RAY_ADDRESS for a private one."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()  # disconnects; the cluster stays


@contextlib.contextmanager
def _private(run_root: Path) -> Iterator[None]:
    _remove_abandoned()
    folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX))  # 0700, and Ray's own inside it, which it opens to all
    token_file = _write_token(folder)
    try:
        if len(str(folder)) > MAX_SOCKET_FOLDER_CHARS:
            raise InputError(f"TMPDIR is too long for Ray's sockets ({folder}). Set TMPDIR=/tmp.")
        with _environment(_private_environment(folder)):
            _start(folder)
            import ray

            try:
                yield
            except BaseException:
                _keep_logs(folder, run_root / "logs" / "ray")
                raise
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a worker on its way out may still write there
        token_file.close()


def _write_token(folder: Path) -> TextIO:
    """Write a random token that only we can read. The open file holds a lock: the folder is in use while we live."""
    descriptor = os.open(folder / "token.new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    file = os.fdopen(descriptor, "w")
    file.write(secrets.token_hex(32))
    file.flush()
    os.rename(folder / "token.new", folder / "token")  # so no one ever sees a token without its lock
    return file


def _remove_abandoned() -> None:
    """Remove the folders of sessions that were killed: nobody holds the lock on their token.

    Ray processes that outlive a session by seconds make its folder anew, without a token: age tells those.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER_PREFIX}*"):
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


def _private_environment(folder: Path) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_worker_niceness": "0",  # Ray's 15 would let any other process starve the engines
        "VLLM_RPC_BASE_PATH": str(folder),  # a killed engine leaves its sockets
    }


def _start(folder: Path) -> None:
    """Start a private Ray. It gives its own processes 30 seconds, which is too few under load: try more than once."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config

    # Ray reads its settings and its token once per process; an earlier session here had others.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    for attempt in range(START_ATTEMPTS):
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=str(folder / f"{RAY_FOLDER}{attempt}"),
            )
            return
        except Exception as error:  # Ray raises a bare one when its processes are late
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise TunesmithError(
                    f"Ray did not start on this machine: {_last_line(error)} Check the load, free memory, /dev/shm and "
                    "`ulimit -n`, and start again."
                ) from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and put the old ones back."""
    old = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in old.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _keep_logs(folder: Path, destination: Path) -> None:
    """Copy what the workers said: a dead engine's last words are there and nowhere else."""
    for log in folder.glob(f"{RAY_FOLDER}?/session_2*/logs/worker-*"):
        if log.stat().st_size:
            destination.mkdir(parents=True, exist_ok=True)
            shutil.copy(log, destination)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
