"""Generations of a run: of all attempts that were ever started on it, only the newest may write.

    token = claim(run_root, stage="train", job_id="1234")     # once, by what starts an attempt
    os.environ[VARIABLE] = str(token)                         # for everything that the attempt starts
    verify(run_root)                                               # in every writer, before each commit

A node that is cut off from the network is dead for Slurm, which starts a successor elsewhere, and yet it computes on
and still reaches the shared file system. No clock and no lock decides who goes on: the successor makes the next number
below `<run>/claims/`, and whoever holds a lower one raises Superseded before its next commit.

Between a check and the commit that follows it lie microseconds, unless the process is stopped right there. Where even
that could do harm the writer's files carry the token in their names (checkpoints being written) or are never
shared between claims (segments of the request log).

A process without the variable, which is every local run, is not concerned: the lock of the run folder guards it.
"""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cluster.errors import InputError, TunesmithError
from cluster.files import exclusive_lock, explain_full_disk, fsync_folder
from cluster.run.rundir import RunDir

VARIABLE = "TUNESMITH_FENCING_TOKEN"
CHECK_SECONDS = 0.5  # how long `Fence.check_now_and_then` trusts an answer
_NAME = re.compile(r"([0-9]{6,})\.json")


class Superseded(TunesmithError):
    """A newer attempt owns the run. Whoever gets this ends without writing anything more, not even a result."""


@dataclass(frozen=True)
class Claim:
    """Who made a token. Of one that died while it wrote this only the number is known."""

    token: int
    stage: str = ""
    job_id: str = ""
    host: str = ""
    pid: int = 0
    time: float = 0.0
    hosts: tuple[str, ...] = ()  # all nodes of its job
    progress: float = 0.0  # what was there of its stage when it began

    def __str__(self) -> str:
        return f"attempt {self.token} of the run (job {self.job_id or '?'} on host {self.host or '?'})"


def claim(run_root: Path, stage: str, job_id: str, hosts: tuple[str, ...] = (), progress: float = 0.0) -> int:
    """Make the next token of the run and return its number. All earlier ones are fenced off from now on."""
    folder = RunDir(run_root).claims
    with explain_full_disk(run_root):
        folder.mkdir(parents=True, exist_ok=True)
        number = newest(run_root) + 1
        while (descriptor := _make(_file(run_root, number))) is None:
            number += 1  # somebody was faster, and is older now
        own = Claim(number, stage, job_id, socket.gethostname(), os.getpid(), round(time.time(), 3), hosts, progress)
        with open(descriptor, "w") as file:
            file.write(json.dumps(asdict(own)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(folder)
    return number


def newest(run_root: Path) -> int:
    """The newest token of a run; 0 if there is none."""
    folder = RunDir(run_root).claims
    try:
        # A write to the folder itself goes to the file server, and its answer makes an NFS client drop the list of
        # names that it may hold for up to a minute.
        os.utime(folder)
        names = os.listdir(folder)
    except FileNotFoundError:
        return 0
    return max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)


def claims(run_root: Path) -> list[Claim]:
    """All claims of a run, the newest last."""
    return [read_claim(run_root, number) for number in range(1, newest(run_root) + 1)]


def read_claim(run_root: Path, token: int) -> Claim:
    """Who made a token; of one that was never written to its end, the number alone."""
    try:
        fields = json.loads(_file(run_root, token).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return Claim(token)
    return Claim(**fields | {"hosts": tuple(fields["hosts"])})


def own_token() -> int | None:
    """The token that this process belongs to; None outside the attempts of a chain."""
    text = os.environ.get(VARIABLE, "")
    if text and not text.isdecimal():
        raise InputError(f"environment variable {VARIABLE}={text!r}: expected a number. Unset it.")
    return int(text) if text else None


def verify(run_root: Path) -> None:
    """Raise Superseded if a newer token owns the run. To be called right before a commit."""
    Fence(run_root).check()


@dataclass
class Fence:
    """The token of this process in a run."""

    run_root: Path
    token: int | None = field(default_factory=own_token)
    _checked: float = float("-inf")

    def check(self) -> None:
        """Raise Superseded if a newer token owns the run."""
        if self.token is None:
            return
        number = newest(self.run_root)
        self._checked = time.monotonic()
        if number > self.token:
            raise Superseded(
                f"{self.run_root}: a newer {read_claim(self.run_root, number)} owns this run; this one, number "
                f"{self.token}, stops without writing."
            )

    def check_now_and_then(self, seconds: float = CHECK_SECONDS) -> None:
        """As `check`, but an answer holds for so many seconds: for what is written many times a second."""
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


def _make(path: Path) -> int | None:
    """Create a file and open it; None if there is one already."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None
