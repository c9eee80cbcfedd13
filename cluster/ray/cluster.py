"""The Ray that a stage runs on: the one in RAY_ADDRESS, or a private one that ends with the stage.

    with ray_session(run.root):
        ...

A driver that starts before its Ray is up finds the address in a file: see launcher/job/ray_job.py. `ray job submit`
sets RAY_ADDRESS for its driver, so a stage that is submitted there uses that cluster. No other cluster is searched for:
it might be another user's.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import InputError, Preempted, TunesmithError
from cluster.nodes.rendezvous import await_json
from cluster.ray.folder import RAY_FOLDER, keep_logs, new_token, private_folder, ray_environment
from cluster.run.rundir import RunDir

START_ATTEMPTS = 3
ADDRESS_FILE = "TUNESMITH_RAY_ADDRESS_FILE"  # the variable with the path of the file that will have the address


@contextlib.contextmanager
def ray_session(run_root: Path) -> Iterator[None]:
    """Connect this process to Ray until the block ends. Inside another session it does nothing.

    If the block fails, the logs of a private Ray are copied to the run folder. Raises InputError for an address that
    cannot be used, and TunesmithError if Ray does not start.
    """
    import ray  # takes a second, which `--help` must not

    if ray.is_initialized():
        yield
    else:
        address = os.environ.get("RAY_ADDRESS")
        if path := os.environ.get(ADDRESS_FILE):  # if that Ray fails, its starter ends this process
            address = await_json(Path(path), deadline=math.inf)
        with _joined(address) if address else _private(run_root):
            yield


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    if address == "auto" or address.startswith(("http://", "https://", "ray://")):
        raise InputError(
            f"RAY_ADDRESS={address}: expected the head's HOST:PORT, as `ray start --head` prints it. "
            "`ray job submit` sets it. Unset RAY_ADDRESS for a private Ray on this machine."
        )
    import ray

    try:
        with _preempted_by_sigterm():
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
    with private_folder(new_token()) as folder, _environment(ray_environment(folder)):
        with _preempted_by_sigterm():
            _start(folder)
        import ray

        try:
            yield
        except BaseException:  # Ctrl-C too; it is raised again
            keep_logs(folder, RunDir(run_root).ray_logs)
            raise
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _preempted_by_sigterm() -> Iterator[None]:
    """Raise Preempted where Ray's own handler of SIGTERM, which it installs as it starts, exits without a message."""
    try:
        yield
    except SystemExit as error:
        raise Preempted("SIGTERM came while Ray started. The same command continues.") from error


def _start(folder: Path) -> None:
    """Start a private Ray. Under load, the 30 seconds that it gives its processes may be too few: try again."""
    import ray
    from ray._raylet import AuthenticationTokenLoader, Config

    # Ray reads its settings and its token once per process, but an earlier session of this process had others.
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
        except Exception as error:  # Ray raises a bare Exception if its processes are late
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise TunesmithError(
                    f"Ray did not start on this machine: {_last_line(error)} Check the load, free memory, /dev/shm and "
                    "`ulimit -n`, and start again."
                ) from error


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables, and restore the old ones after the block."""
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


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__
