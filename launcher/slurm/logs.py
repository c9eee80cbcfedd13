"""What the jobs of a run print, in all their attempts, for as long as the run goes on."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import InputError
from cluster.files import MIB
from cluster.run.rundir import RunDir
from launcher.slurm.submitted import SubmittedJob, read_jobs

POLL_SECONDS = 0.5
SECONDS_BETWEEN_QUERIES = 10.0  # all users share Slurm's controller
MAX_BYTES_AT_ONCE = MIB


@dataclass
class LogFile:
    """The output of one job, as far as it was read."""

    job: SubmittedJob
    read_bytes: int = 0
    _unfinished: bytes = field(default=b"")

    def new_lines(self, is_last_time: bool = False) -> Iterator[str]:
        """The lines that were completed since the last call. The last time also an incomplete line."""
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


def log_jobs(run: RunDir, stage: str | None) -> list[SubmittedJob]:
    """The jobs of the run or of one stage, oldest first. Raises InputError if there are none."""
    jobs = read_jobs(run)
    if not jobs:
        raise InputError(f"{run.root} has no jobs of Slurm: it ran on this machine, and printed to its terminal.")
    wanted = [job for job in jobs if stage in (None, job.stage)]
    if not wanted:
        raise InputError(f"{run.root} has no job of {stage}; there are {', '.join({job.stage: 0 for job in jobs})}.")
    return wanted


def print_logs(
    run: RunDir, stage: str | None, follow: bool, is_live: Callable[[], bool], print_line: Callable[[str], None]
) -> None:
    """Print every log of the run, with a heading above each. With `follow`, go on for as long as the run is live."""
    files: dict[str, LogFile] = {}
    shown: Path | None = None
    is_announced = False
    last_query, live = float("-inf"), True
    while True:
        if live and time.monotonic() - last_query >= SECONDS_BETWEEN_QUERIES:
            live, last_query = follow and is_live(), time.monotonic()
        for job in log_jobs(run, stage):  # read again: the run may have been submitted again
            file = files.setdefault(job.job_id, LogFile(job))
            for line in file.new_lines(is_last_time=not live):
                if shown != job.log:
                    shown = job.log
                    print_line(f"==> {job.stage}, job {job.job_id}: {shown}")
                print_line(line)
        if shown is None and not is_announced and not any(file.job.log.is_file() for file in files.values()):
            is_announced = True
            print_line(f"No output yet: no job has begun. `tunesmith status {run.root}` shows what they wait for.")
        if not live:
            return
        time.sleep(POLL_SECONDS)
