"""A process that ends another's descendants when that one is gone, however it went.

    start_reaper()          # in the process whose children must not survive it

vLLM computes in children of the process that it was started in, and they outlive a SIGKILL of it: they hold its GPU,
its memory and its cores for good. The kernel's PR_SET_PDEATHSIG would have to be set in those children, where nothing
of ours runs, so this process watches from outside. It ends with what it watches.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time

import psutil

CHECK_SECONDS = 0.5
LOOK_SECONDS = 2.0  # how often new descendants are looked for: it reads all of /proc


def start_reaper() -> None:
    """Watch this process from another one, in a session of its own so that no signal meant for this one meets it."""
    command = [sys.executable, "-m", "cluster.processes.reaper", str(os.getpid())]
    subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)


def reap(watched_pid: int) -> None:
    """Wait until our parent, `watched_pid`, is gone, and kill the descendants that it ever had.

    Ever: those whose own parent ended first, as the last look may be at one that is on its way out, are nobody's then.
    """
    descendants: set[psutil.Process] = set()  # equal by id and start, so a reused id is never taken for one
    next_look = 0.0
    while os.getppid() == watched_pid:
        if time.monotonic() >= next_look:
            descendants = {process for process in descendants if process.is_running()}
            with contextlib.suppress(psutil.NoSuchProcess):
                found = psutil.Process(watched_pid).children(recursive=True)
                descendants |= {process for process in found if process.pid != os.getpid()}
            next_look = time.monotonic() + LOOK_SECONDS
        time.sleep(CHECK_SECONDS)
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends what is watched, and then this
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reap(int(sys.argv[1]))
