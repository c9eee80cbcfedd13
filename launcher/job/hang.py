"""Watches from outside whether a stage makes progress: a rank that is stopped, or blocked in the kernel, cannot.

The stage appends to `metrics.jsonl`: training for every step, synthesis once in a while. The stage makes progress if
the file grows, by the clock of this machine. A file that has not grown yet has a time limit as well. Time in which the
watch itself stood still, because Slurm suspended the job, does not count.
"""

import time
from collections.abc import Callable
from pathlib import Path

from cluster.errors import TunesmithError
from cluster.processes.awake import AwakeClock
from cluster.run.rundir import RunDir
from launcher.slurm_config import SlurmConfig

WATCHED = ("synthesize", "train")  # the others report no steps; the time limit of their job ends them
MIN_LIMIT_SECONDS = 900.0
TIMES_LONGEST_GAP = 10
LOST_SECONDS = 120.0
LOOK_SECONDS = 5.0


class Hung(TunesmithError):
    """The stage was ended because it made no progress."""

    kind = "hung"

    def __init__(self, message: str, grace_seconds: float) -> None:
        super().__init__(message)
        self.grace_seconds = grace_seconds  # to save and stop


class StepWatch:
    """Whether srun notices the end of a training step. It does not if the slurmstepd of a node was killed.

    A minute after the first node has ended, srun ends the others (--wait=60). So a step is lost if it goes on much
    longer after the first exit report (launcher/job/node.py).
    """

    def __init__(self, attempt_dir: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._attempt_dir, self._clock = attempt_dir, AwakeClock(clock)
        self._next_look = 0.0
        self._reported_at: float | None = None

    def check(self) -> None:
        """Raise TunesmithError if a node has ended and the step goes on."""
        now = self._clock()
        if self._reported_at is None and now >= self._next_look:  # the folder is on a shared file system
            self._next_look = now + LOOK_SECONDS
            if any(self._attempt_dir.glob("node-*.exit.json")):
                self._reported_at = now
        if self._reported_at is not None and now > self._reported_at + LOST_SECONDS:
            raise TunesmithError(
                f"a node ended {LOST_SECONDS:.0f} s ago, and srun goes on: the slurmstepd of a node was killed. The "
                f"reports of the nodes are in {self._attempt_dir}"
            )


class HangWatch:
    """Whether a stage makes progress, checked regularly while it runs."""

    def __init__(
        self, run: RunDir, stage: str, slurm_config: SlurmConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._stage, self._slurm_config, self._clock = run, stage, slurm_config, AwakeClock(clock)
        self._size = self._file_size()
        self._since = self._clock()
        self._longest_gap: float | None = None  # between two growths; None before the first one

    def check(self) -> None:
        """Raise Hung if the stage has made no progress for too long."""
        now, size = self._clock(), self._file_size()
        seconds = now - self._since
        if size != self._size:
            # The time before the first growth is start-up, which does not count as a gap between steps.
            self._longest_gap = 0.0 if self._longest_gap is None else max(self._longest_gap, seconds)
            self._size, self._since = size, now
        elif seconds > self.limit_seconds:
            raise Hung(self._describe(seconds), self._slurm_config.hang_grace_seconds)

    @property
    def limit_seconds(self) -> float:
        if self._longest_gap is None:
            return self._slurm_config.start_timeout_seconds
        return self._slurm_config.hang_timeout_seconds or max(MIN_LIMIT_SECONDS, TIMES_LONGEST_GAP * self._longest_gap)

    def _file_size(self) -> int:
        return self._run.metrics.stat().st_size if self._run.metrics.exists() else 0

    def _describe(self, seconds: float) -> str:
        if self._longest_gap is None:
            what, key = "not begun a step", "start_timeout_seconds"
        else:
            what, key = "made no step", "hang_timeout_seconds"
        return (
            f"HUNG: {self._stage} has {what} for {seconds:.0f} s (slurm.{key}, here {self.limit_seconds:.0f} s) and "
            "was ended. Look in the log for the stacks that ranks print when they wait for a long time "
            "(train.watch.stall_timeout_seconds): all ranks wait for the one that prints none, or is elsewhere."
        )
