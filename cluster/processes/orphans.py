"""Processes that end with the process that started them, even if that one is killed outright."""

import contextlib
import ctypes
import os
import signal
import time

import psutil

from cluster.errors import TunesmithError

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # <linux/prctl.h>


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends. To be called early in a child process.

    Otherwise the ranks of a killed command would train on, into a run folder that its successor is using.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, so that `end_descendants` finds all there are."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def end_descendants(timeout_seconds: float) -> None:
    """Kill all descendants, and those they start meanwhile. Raises TunesmithError for one that does not go."""
    deadline = time.monotonic() + timeout_seconds
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(descendants, timeout=1)
        if time.monotonic() > deadline:
            raise TunesmithError(f"killed, and still there: {', '.join(map(str, descendants))}")


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), f"prctl: {os.strerror(ctypes.get_errno())}")
