"""Fencing: of all attempts at a run, only the newest may write.

    token = claim(run_root, stage="train", job_id="1234")  # once, in the process that starts an attempt
    os.environ[TOKEN_VARIABLE] = str(token)                # for all processes of the attempt
    verify(run_root)                                       # in every writer, before each commit

Slurm takes a node that is cut off from the network for dead and starts another attempt elsewhere, but the node goes on
and may still reach the shared file system. Neither a clock nor a lock decides which attempt owns the run. Each attempt
claims it with the next fencing token, a number for which it creates a file in `<run>/claims/`. A process with a lower
token than the newest raises Superseded before its next commit.

Microseconds pass between a check and its commit, unless the process is stopped right there. Files that this could harm
carry the token in their names (checkpoints being written), or belong to one attempt (segments of the request log).
"""

import errno
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.errors import InputError, TunesmithError
from cluster.files import exclusive_lock, explain_full_disk, fsync_folder
from cluster.run.rundir import RunDir

TOKEN_VARIABLE = "TUNESMITH_FENCING_TOKEN"
CHECK_SECONDS = 0.5  # how long `Fence.check_throttled` trusts a check
_NAME = re.compile(r"([0-9]{6,})\.json")


class Superseded(TunesmithError):
    """A newer attempt owns the run. The process ends without writing anything more, not even a result."""


@dataclass(frozen=True)
class Claim:
    """An attempt's claim on a run. Of an attempt that died while it wrote its claim, only the token is known."""

    token: int
    stage: str = ""
    job_id: str = ""
    host: str = ""
    pid: int = 0
    time: float = 0.0
    hosts: tuple[str, ...] = ()  # all nodes of its job
    progress: float = 0.0  # of its stage, when the attempt began
    restart_count: int = 0  # how often Slurm had requeued the job

    def __str__(self) -> str:
        return f"attempt with fencing token {self.token} (job {self.job_id or '?'} on host {self.host or '?'})"


def claim(
    run_root: Path,
    stage: str,
    job_id: str,
    hosts: tuple[str, ...] = (),
    progress: float = 0.0,
    restart_count: int = 0,
) -> int:
    """Claim the run and return the new fencing token. From now on no earlier attempt can write."""
    folder = RunDir(run_root).claims
    with explain_full_disk(run_root):
        folder.mkdir(parents=True, exist_ok=True)
        token, descriptor = newest(run_root), None
        while descriptor is None:
            token += 1
            with suppress(FileExistsError):  # another attempt took this one
                descriptor = os.open(_file(run_root, token), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        now = round(time.time(), 3)
        own = Claim(token, stage, job_id, socket.gethostname(), os.getpid(), now, hosts, progress, restart_count)
        with open(descriptor, "w") as file:
            file.write(json.dumps(asdict(own)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(folder)
    return token


def newest(run_root: Path) -> int:
    """The newest token of a run; 0 if it has none."""
    folder = RunDir(run_root).claims
    try:
        # A change of the folder goes to the file server. The reply makes an NFS client drop its list of names, which it
        # may otherwise keep for a minute. Who may only read the run does without.
        try:
            os.utime(folder)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


def claims(run_root: Path) -> list[Claim]:
    """All claims of a run, the newest last."""
    return [read_claim(run_root, token) for token in range(1, newest(run_root) + 1)]


def read_claim(run_root: Path, token: int) -> Claim:
    """The claim of a token."""
    try:
        fields = json.loads(_file(run_root, token).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return Claim(token)
    return Claim(**fields | {"hosts": tuple(fields["hosts"])})


def own_token() -> int | None:
    """The token of this process. None means that it belongs to no job of a chain, and has only the lock of the run."""
    text = os.environ.get(TOKEN_VARIABLE, "")
    if text and not text.isdecimal():
        raise InputError(f"environment variable {TOKEN_VARIABLE}={text!r}: expected a number. Unset it.")
    return int(text) if text else None


def verify(run_root: Path) -> None:
    """Raise Superseded if a newer attempt owns the run. Call it right before a commit."""
    Fence(run_root).check()


@dataclass
class Fence:
    """The token of this process in a run."""

    run_root: Path
    token: int | None = field(default_factory=own_token)
    _checked: float = float("-inf")

    def check(self) -> None:
        """Raise Superseded if a newer attempt owns the run."""
        if self.token is None:
            return
        token = newest(self.run_root)
        self._checked = time.monotonic()
        if token > self.token:
            raise Superseded(
                f"{self.run_root}: a newer {read_claim(self.run_root, token)} owns this run. This attempt, with "
                f"fencing token {self.token}, stops without writing."
            )

    def check_throttled(self, seconds: float = CHECK_SECONDS) -> None:
        """As `check`, but not again within `seconds`: for writers that commit many times a second."""
        if self.token is not None and time.monotonic() - self._checked >= seconds:
            self.check()

    @property
    def is_superseded(self) -> bool:
        return self.token is not None and newest(self.run_root) > self.token


@contextmanager
def run_lock(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, in a run folder. Raises InputError if another process holds it.

    A process with a fencing token shares the lock with other such processes: it must not wait for one that is cut off,
    and the fence lets only the newest write. A local run shares it with nobody.
    """
    with exclusive_lock(path, f"run folder {path.parent}", shared=own_token() is not None):
        yield


def _file(run_root: Path, token: int) -> Path:
    return RunDir(run_root).claims / f"{token:06d}.json"
