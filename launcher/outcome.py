"""What a run came to, as an exit code, and how to wait for it.

    0   everything is done
    1   a stage failed, or it is not known what became of it
    2   a stage failed because of bad input
    3   the run has not ended: it runs or waits
    75  it was stopped, cancelled or not begun: `tunesmith resume` continues it

A run comes to the gravest of what its stages came to, and a sweep to that of its runs. It has not ended before all of
them have.
"""

import time
from pathlib import Path

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_LIVE, EXIT_RETRY
from cluster.run.rundir import RunDir
from launcher.slurm.client import Slurm
from launcher.status import DONE, FAILED, LIVE, UNKNOWN, RunStatus, StageStatus, read_statuses
from launcher.sweep import folders_of, read_index

SECONDS_BETWEEN_LOOKS = 10.0  # all users share Slurm's controller
_GRAVEST_FIRST = (EXIT_LIVE, EXIT_BAD_INPUT, EXIT_FAILED, EXIT_RETRY, EXIT_DONE)


def wait_for_end(root: Path, slurm: Slurm, stage: str | None = None) -> int:
    """Wait until a run, a sweep or one stage of a run has ended, and return the exit code of what it came to.

    An end other than success counts if it is still so at a second look: between two stages, or while files are on
    their way from a node, a run seems to have stopped. Waits also while Slurm does not answer.
    """
    earlier = None
    while True:
        statuses = read_statuses(folders_of(root), slurm)
        code = exit_code_of(root, statuses, stage)
        may_be_live = code == EXIT_LIVE or any(status.is_unanswered for status in statuses)
        if not may_be_live and code in (EXIT_DONE, earlier):
            return code
        earlier = None if may_be_live else code
        time.sleep(SECONDS_BETWEEN_LOOKS)


def exit_code_of(root: Path, statuses: list[RunStatus], stage: str | None = None) -> int:
    """The exit code of a run or a sweep with these statuses. `stage` limits it to one stage of each run."""
    stages = [(status.run, each) for status in statuses for each in status.stages if stage in (None, each.stage)]
    codes = {_code_of(run, each) for run, each in stages}
    if len(read_index(root)) > len(statuses):  # runs of the sweep that were not begun
        codes.add(EXIT_RETRY)
    return next(code for code in _GRAVEST_FIRST if code in codes | {EXIT_DONE})


def _code_of(run: RunDir, stage: StageStatus) -> int:
    if stage.state in LIVE:
        return EXIT_LIVE
    if stage.state == FAILED:
        is_bad_input = (run.read_result(stage.stage) or {}).get("exit_code") == EXIT_BAD_INPUT
        return EXIT_BAD_INPUT if is_bad_input else EXIT_FAILED
    return {DONE: EXIT_DONE, UNKNOWN: EXIT_FAILED}.get(stage.state, EXIT_RETRY)
