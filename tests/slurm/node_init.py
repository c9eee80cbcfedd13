"""PID 1 of one node of the bed: sets up its name, /tmp, /dev/shm and /etc/hosts, prints "ready", then reaps children.

Orphans of a namespace become children of its PID 1. One that does not wait for them leaves zombies, and whoever
waits for such a process to vanish (`slurmd`, `ray stop`) waits in vain.

    node_init.py NAME HOSTS_FILE STAGE_FOLDER TMPFS_MIB [PATH THAT STAYS VISIBLE ...]
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def private_tmp(stage: Path, size: str, visible: list[Path]) -> None:
    """Put a tmpfs over /tmp, keeping `visible` folders below it (a checkout or a virtual environment may lie there)."""
    mount("-t", "tmpfs", "-o", size, "tmpfs", str(stage))
    for path in visible:
        if path.is_relative_to("/tmp"):
            target = stage / path.relative_to("/tmp")
            target.mkdir(parents=True, exist_ok=True)
            mount("--rbind", str(path), str(target))
    os.chmod(stage, 0o1777)
    mount("--move", str(stage), "/tmp")


def reap_forever() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # sigwait wants it blocked; a pending one is kept
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass
        signal.sigwait({signal.SIGCHLD})


def main(name: str, hosts: str, stage: str, tmpfs_mib: str, *visible: str) -> None:
    socket.sethostname(name)
    size = f"size={tmpfs_mib}m"
    private_tmp(Path(stage), size, [Path(path) for path in visible])
    mount("-t", "tmpfs", "-o", size, "tmpfs", "/dev/shm")
    mount("--bind", hosts, "/etc/hosts")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    print("ready", flush=True)
    reap_forever()


if __name__ == "__main__":
    main(*sys.argv[1:])
