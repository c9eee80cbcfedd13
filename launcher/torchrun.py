"""torchrun on this machine: its ranks get the stop signals, and its exit code is that of the rank that failed first.

    with StopRequest(interrupts=True) as stop:
        code = run_torchrun(["--standalone", "--nproc-per-node=2"], ["-m", "trainer.train", "runs/demo"], stop)

`run_torchrun` starts `python -m launcher.torchrun`, which is `main` below: torchrun itself, but for four things.
- It ends with the exit code of the rank that failed first, so that "preempted, start me again" (75) and "bad input" (2)
  arrive. torchrun ends with 1 whatever happened.
- It survives the signals that mean "save and stop". torchrun dies of SIGUSR1 and SIGUSR2, and gives the ranks 30 s on
  SIGTERM. Here the ranks decide how long they need.
- It prints no report of a rank that ended with 75 or 2. What that rank itself reports is all that there is to know.
- It removes the folder in which the ranks describe their failures. torchrun leaves one in /tmp each time.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RETRY
from cluster.processes.descendants import die_with_parent
from cluster.processes.signals import StopRequest

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

HANDLED_BY_TORCH = "SIGINT,SIGQUIT"  # not SIGTERM
EXPLAINED = (EXIT_RETRY, EXIT_BAD_INPUT)  # the exit codes of ranks that report why they end
POLL_SECONDS = 0.5


def run_torchrun(
    options: list[str],
    command: list[str],
    stop: StopRequest,
    environ: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Run `command` (a script or `-m module`, then arguments) as the ranks of this machine. Returns the exit code.

    `environ` is added to this process's environment. `check` is called every POLL_SECONDS; what it raises ends the
    ranks. No process that was started here is left at the end.
    """
    stop.interrupts = False
    # -P, PYTHONSAFEPATH: a folder `launcher` or `trainer` in the user's working directory is not ours.
    argv = [sys.executable, "-P", "-m", "launcher.torchrun", *options, *command]
    environ = {**os.environ, **(environ or {}), "PYTHONSAFEPATH": "1"}
    torchrun = subprocess.Popen(argv, env=environ, process_group=0)
    try:
        while (code := torchrun.poll()) is None:
            check()
            ranks = find_ranks(torchrun.pid)
            for _ in range(len(stop.pending)):
                signum = stop.pending.popleft()
                signum = signal.SIGTERM if signum == signal.SIGINT else signum
                if signum == signal.SIGTERM and not ranks:
                    return EXIT_RETRY  # no rank has begun, so there is nothing to save
                if not ranks or not send_signal(ranks, signum):
                    stop.pending.append(signum)
            with contextlib.suppress(subprocess.TimeoutExpired):
                torchrun.wait(POLL_SECONDS)
        return code if code >= 0 else 128 - code
    finally:
        _kill_group(torchrun)


def find_ranks(torchrun_pid: int) -> list[psutil.Process]:
    """The rank processes that torchrun has started so far."""
    try:
        children = psutil.Process(torchrun_pid).children()
    except psutil.NoSuchProcess:  # torchrun has just ended
        return []
    return [child for child in children if _is_rank(child)]


def _is_rank(process: psutil.Process) -> bool:
    try:
        return "LOCAL_RANK" in process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has just ended, or starts: the kernel then denies a user
        return False


def send_signal(ranks: list[psutil.Process], signum: int) -> bool:
    """Pass a stop signal on to the ranks. False if it has to be tried again later.

    SIGUSR1 and SIGUSR2 wait until every rank has its handler: a rank that still imports its libraries ignores them.
    """
    try:
        if signum != signal.SIGTERM and not all(_has_handler(rank, signum) for rank in ranks):
            return False
        for rank in ranks:
            rank.send_signal(signum)
    except (psutil.NoSuchProcess, FileNotFoundError):
        pass  # a rank has just ended, and torchrun ends the others
    return True


def _has_handler(process: psutil.Process, signum: int) -> bool:
    """Whether the process has a handler for the signal (the mask SigCgt of proc(5))."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    return False


def _kill_group(torchrun: subprocess.Popen) -> None:
    """End whatever is left of torchrun and its ranks, such as the data loaders of a rank that was killed."""
    with contextlib.suppress(ProcessLookupError):  # usually nothing is left
        os.killpg(torchrun.pid, signal.SIGKILL)
    torchrun.wait()


def exit_code_of(failures: Iterable["ProcessFailure"]) -> int:
    """The exit code of the first failure. Ranks that were ended because another had failed do not count.

    A negative `exitcode` is the number of the signal that killed the rank.
    """
    ordered = sorted(failures, key=lambda failure: failure.timestamp)
    own = [failure for failure in ordered if failure.exitcode not in (-signal.SIGTERM, -signal.SIGKILL)]
    code = (own or ordered)[0].exitcode
    return code if code > 0 else 128 - code  # as the shell reports "killed by signal N"


def main() -> int:
    """torchrun, with its arguments. A process of its own, so that nothing it does to signals reaches the launcher."""
    die_with_parent()
    # An ignored signal stays ignored in the ranks, so it cannot kill a rank that has no handler yet.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    # A handler, unlike SIG_IGN, is not inherited: a rank without a handler of its own still dies of SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: None)
    # Only now: importing torch takes seconds, in which a signal would have been fatal.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    torch_log = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    torch_log.addFilter(lambda record: not (record.args and record.args[0] in EXPLAINED))  # "failed (exitcode: 2) ..."
    try:
        with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as failures:
            run(parse_args(["--signals-to-handle", HANDLED_BY_TORCH, "--log-dir", failures, *sys.argv[1:]]))
    except ChildFailedError as error:
        code = exit_code_of(error.failures.values()) if error.failures else EXIT_FAILED
        if code not in EXPLAINED:
            print(error, file=sys.stderr)
        return code
    finally:
        # While Python ends, which takes a second with torch loaded, the default action would kill this process.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
