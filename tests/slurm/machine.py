"""One machine of the bed: net, uts, mount and pid namespaces with their own host name, address, /tmp and /dev/shm.

Every link lives in the namespaces (the bridge too, in that of the "switch"), so the host never sees one, any number
of beds can run side by side, and the death of a namespace's PID 1 takes all of it along. `setpriv --pdeathsig` and
`unshare --kill-child` tie that PID 1 to the process that made it: even `kill -9` of the tests leaves nothing running.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

NODE_INIT = Path(__file__).with_name("node_init.py")
PROJECT = Path(__file__).resolve().parents[2]
VISIBLE = tuple(dict.fromkeys(str(Path(path).resolve()) for path in (PROJECT, sys.prefix, sys.base_prefix)))
TMPFS_MIB = 512  # of /tmp and of /dev/shm, each; memory is taken only by what is written
BRIDGE = "br0"
DEATH_SECONDS = 30


class Machine:
    """A started machine. `folder` is the bed's, with etc/hosts and log/; `switch` is None for the switch itself."""

    def __init__(self, folder: Path, name: str, address: str = "", switch: "Machine | None" = None) -> None:
        self.name, self.address, self.switch = name, address, switch
        self.init_pid = 0
        self._log = folder / "log" / f"{name}-namespaces.log"
        stage = folder / "stage" / name
        stage.mkdir(parents=True, exist_ok=True)
        argv = ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--uts", "--mount", "--pid", "--fork"]
        argv += ["--kill-child", "--mount-proc", "--propagation", "private", "--", sys.executable, str(NODE_INIT)]
        argv += [name, str(folder / "etc/hosts"), str(stage), str(TMPFS_MIB), *VISIBLE]
        with open(self._log, "ab") as log:
            self._unshare = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
            )
        try:
            self._await_init()
            if switch is None:
                self._ip("link", "add", BRIDGE, "type", "bridge")
                self._ip("link", "set", BRIDGE, "up")
            else:
                self._plug_into(switch)
        except BaseException:
            self.kill()
            raise

    def _await_init(self) -> None:
        line = self._unshare.stdout.readline()  # empty if PID 1 died, so a failed mount cannot hang us
        outer = self._unshare.pid
        if line != "ready\n":
            raise RuntimeError(f"machine {self.name}: setting up its namespaces failed:\n{self._log.read_text()}")
        self.init_pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text().split()[0])

    def _ip(self, *arguments: str) -> None:
        """Run `ip` in this machine's network, but among the host's processes, so that pids mean what they mean here."""
        subprocess.run(["nsenter", "-t", str(self.init_pid), "-n", "ip", *arguments], check=True)

    def _plug_into(self, switch: "Machine") -> None:
        peer = ("peer", "name", "eth0", "netns", str(self.init_pid))
        switch._ip("link", "add", self._port, "type", "veth", *peer)
        switch._ip("link", "set", self._port, "master", BRIDGE, "up")
        self._ip("address", "add", f"{self.address}/24", "dev", "eth0")
        self._ip("link", "set", "eth0", "up")

    @property
    def _port(self) -> str:
        return f"to-{self.name}"

    @property
    def alive(self) -> bool:
        return self._unshare.poll() is None

    @property
    def network(self) -> str:
        """The kernel's name of the network namespace, as in `net:[4026532001]`."""
        return os.readlink(f"/proc/{self.init_pid}/ns/net")

    def run(self, *argv: str, cwd: Path, env: dict[str, str], timeout_seconds: float = 60) -> str:
        """Run a command on this machine and return its standard output. Raises CalledProcessError with both streams."""
        return subprocess.run(
            ["nsenter", "-t", str(self.init_pid), "-n", "-u", "-m", "-p", f"--wdns={cwd}", "--", *argv],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=timeout_seconds,
        ).stdout

    def partition(self) -> None:
        """Cut the network. Everything on the machine goes on running."""
        self.switch._ip("link", "set", self._port, "down")

    def heal(self) -> None:
        """Mend the network that `partition` cut."""
        self.switch._ip("link", "set", self._port, "up")

    def fill_tmp(self) -> int:
        """Fill /tmp to the last byte and return the number of bytes it took."""
        tmp = Path(f"/proc/{self.init_pid}/root/tmp")
        free = os.statvfs(tmp)
        num_bytes = free.f_bavail * free.f_bsize
        with open(tmp / "filler", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        return num_bytes

    def empty_tmp(self) -> None:
        """Take back what `fill_tmp` did."""
        Path(f"/proc/{self.init_pid}/root/tmp/filler").unlink()

    def kill(self) -> None:
        """Die like a machine whose power fails: off the network first, so that no message gets out. Idempotent."""
        if self.alive and self.init_pid and self.switch is not None and self.switch.alive:
            with contextlib.suppress(subprocess.CalledProcessError):  # absent where plugging in is what failed
                self.switch._ip("link", "delete", self._port)
        if self.alive:
            os.kill(self.init_pid or self._unshare.pid, signal.SIGKILL)
        self._unshare.wait(DEATH_SECONDS)  # the kernel ends PID 1 only after all others of its namespace
        self._unshare.stdout.close()
