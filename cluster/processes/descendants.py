"""Processes that end with the process that started them, even if that one is killed.

die_with_parent()      # in a child: the kernel kills it when its parent ends
start_reaper()         # in a process whose children cannot call that: another process kills them when it is gone
end_descendants(15)    # in a process that called `adopt_orphans`: kill all descendants now
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time

import psutil

from cluster.errors import TunesmithError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>
CHECK_SECONDS = 0.5
SCAN_SECONDS = 2.0  # between scans for new descendants, which read all of /proc


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends. Call it early in a child process.

    Otherwise the ranks of a killed command would go on training in a run folder that its successor uses.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `end_descendants` finds them all."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(timeout_seconds: float) -> None:
    """Kill all descendants, also those that start meanwhile. Raises TunesmithError if one of them stays."""
    deadline = time.monotonic() + timeout_seconds
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=1)
        if time.monotonic() > deadline:
            raise TunesmithError(f"these processes were killed but have not ended: {', '.join(map(str, descendants))}")


def start_reaper() -> None:
    """Watch this process from another one, in a session of its own so that signals for this one do not reach it.

    vLLM computes in children of the process that it was started in, and these survive a SIGKILL of it: they would keep
    its GPU, memory and cores forever. PR_SET_PDEATHSIG has to be set in the children, where none of our code runs.
    """
    command = [sys.executable, "-m", "cluster.processes.descendants", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def reap(watched_pid: int) -> None:
    """Wait until our parent, `watched_pid`, is gone, and kill all descendants that it has had.

    Every descendant ever seen is remembered, because a child may be re-parented before the next scan.
    """
    descendants: set[psutil.Process] = set()  # compared by pid and start time, so a reused pid is another process
    next_scan = 0.0
    while os.getppid() == watched_pid:
        if time.monotonic() >= next_scan:
            descendants = {process for process in descendants if process.is_running()}
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(watched_pid).children(recursive=True)
                descendants |= {process for process in children if process.pid != os.getpid()}
            next_scan = time.monotonic() + SCAN_SECONDS
        time.sleep(CHECK_SECONDS)
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the watched process, and then this one
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reap(int(sys.argv[1]))
