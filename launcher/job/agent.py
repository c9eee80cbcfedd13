"""torchrun as the supervisor of a node needs it: `python -m launcher.job.agent <torchrun's arguments>`.

It differs from torchrun in three things.
- It ends with the exit code of the rank that failed first, where torchrun ends with 1 whatever happened, so that
  "preempted, start me again" (75) and "bad input" (2) arrive at whoever started the job.
- It survives the signals that mean "save and stop". torchrun dies of SIGUSR1 and SIGUSR2, and on SIGTERM gives the
  ranks 30 s. Here the ranks decide, and those that did not save in time are ended by Slurm's own deadline.
- Its folder for what ranks say of their failures goes with it; torchrun leaves one in /tmp each time.
"""

import signal
import sys
import tempfile
from collections.abc import Iterable
from typing import Protocol

from cluster.errors import EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED
from cluster.processes.orphans import die_with_parent

HANDLED_BY_TORCH = "SIGINT,SIGQUIT"  # not SIGTERM


class Failure(Protocol):
    """The part of torch's ProcessFailure that decides."""

    exitcode: int  # negative: the number of the signal that killed the rank
    timestamp: int  # seconds


def exit_code_of(failures: Iterable[Failure]) -> int:
    """The exit code of the first failure, passing over ranks that were ended because another had failed."""
    ordered = sorted(failures, key=lambda failure: failure.timestamp)
    own = [failure for failure in ordered if failure.exitcode not in (-signal.SIGTERM, -signal.SIGKILL)]
    code = (own or ordered)[0].exitcode
    return code if code > 0 else 128 - code  # the shell's way to say "killed by signal N"


def main() -> int:
    die_with_parent()
    # An ignored signal stays ignored in the ranks, so it cannot kill one that has not yet come to its handler.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # A handler, unlike SIG_IGN, is not passed on: a rank without a handler of its own still dies of SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Only now: importing torch takes seconds, in which a signal would have been fatal.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as failures:
            run(parse_args(["--signals-to-handle", HANDLED_BY_TORCH, "--log-dir", failures, *sys.argv[1:]]))
    except ChildFailedError as error:
        code = exit_code_of(error.failures.values()) if error.failures else EXIT_FAILED
        if code != EXIT_PREEMPTED:  # which is no failure
            print(error, file=sys.stderr)
        return code
    finally:
        # Python's own end, a second with torch loaded, would put back the default, which kills.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
