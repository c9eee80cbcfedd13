"""What the jobs of a run print, across all attempts, for as long as the run goes on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import InputError
from cluster.files import MIB
from cluster.run.rundir import RunDir
from launcher.slurm.submitted import Submitted, read_jobs

POLL_SECONDS = 0.5
SECONDS_BETWEEN_QUESTIONS = 10.0  # Slurm's controller serves everybody
MAX_BYTES_AT_ONCE = MIB


@dataclass
class LogFile:
    """One job's output, as far as it was read."""

    job: Submitted
    read_bytes: int = 0
    _unfinished: bytes = field(default=b"")

    def new_lines(self, is_last_time: bool = False) -> Iterator[str]:
        """Whole lines that came since; at last also one without its end."""
        if not self.job.log.is_file():
            return
        with open(self.job.log, "rb") as file:
            file.seek(self.read_bytes)
            while data := file.read(MAX_BYTES_AT_ONCE):
                self.read_bytes += len(data)
                *lines, self._unfinished = (self._unfinished + data).split(b"\n")
                yield from (line.decode(errors="replace") for line in lines)
        if is_last_time and self._unfinished:
            yield self._unfinished.decode(errors="replace")
            self._unfinished = b""


def log_jobs(run: RunDir, stage: str | None) -> list[Submitted]:
    """The jobs whose output is wanted, oldest first. Raises InputError if the run has none."""
    jobs = read_jobs(run)
    if not jobs:
        raise InputError(f"{run.root} has no jobs of Slurm: it ran on this machine, and printed to its terminal.")
    wanted = [job for job in jobs if stage in (None, job.stage)]
    if not wanted:
        raise InputError(f"{run.root} has no job of {stage}; there are {', '.join({job.stage: 0 for job in jobs})}.")
    return wanted


def print_logs(
    run: RunDir, stage: str | None, follow: bool, is_live: Callable[[], bool], say: Callable[[str], None]
) -> None:
    """Print every log of the run, a heading above each. With `follow` goes on until the run is not live any more."""
    files: dict[str, LogFile] = {}
    shown: Path | None = None
    asked, live = float("-inf"), True
    while True:
        if live and time.monotonic() - asked >= SECONDS_BETWEEN_QUESTIONS:
            live, asked = follow and is_live(), time.monotonic()
        for job in log_jobs(run, stage):  # read again: a job may have submitted its successor
            file = files.setdefault(job.job_id, LogFile(job))
            for line in file.new_lines(is_last_time=not live):
                if shown != job.log:
                    shown = job.log
                    say(f"==> {job.stage}, attempt {job.attempt}, job {job.job_id}: {shown}")
                say(line)
        if not live:
            return
        time.sleep(POLL_SECONDS)
