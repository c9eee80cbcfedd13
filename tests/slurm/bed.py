"""A real Slurm on one machine: munge, slurmctld and slurmd on machines of their own (see machine.py).

    with SlurmBed(num_nodes=3) as bed:
        job = bed.sbatch(script, "an argument", options=["--nodes=2"])
        bed.wait_state(job, {"COMPLETED"}, timeout_seconds=60)
        print(bed.output(job))
        bed.nodes["n2"].partition()

Works with Debian 12's Slurm 22.05; needs root, and no other daemon, cgroup, database or configuration of the host.
`bed.shared` is a folder all machines see, as a shared file system is.
"""

import contextlib
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tests.slurm.machine import Machine

PARENT = Path("/var/tmp")  # not /tmp, which every machine has for itself
PREFIX = "tunesmith-slurm-"
PROGRAMS = (
    "munged",
    "mungekey",
    "slurmctld",
    "slurmd",
    "sbatch",
    "scontrol",
    *("ip", "nsenter", "unshare", "setpriv", "ps"),
)
FINAL_STATES = frozenset({"CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"})
SUBNET = "10.77.0"
CONTROLLER_ADDRESS = f"{SUBNET}.1"
POLL_SECONDS = 0.1
UP_SECONDS = 60
JOB_IDS_FORGOTTEN = 1000  # more than a bed's slurmctld gives between two of its deaths
CLIENT_SECONDS = 240  # a slurmctld that was killed does not answer for a minute or two when it is back

# CPUs, memory and GPUs are claims (config_overrides; two harmless device files per node stand for GPUs).
# cred_expire=5 makes a requeued job eligible after seconds, not two minutes; smaller values are ignored.
SLURM_CONF = """\
ClusterName=bed
SlurmctldHost=ctl({controller})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/run/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
DebugFlags=NO_CONF_HASH
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/completed-jobs.txt
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=100000,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=15
KillWait=5
MinJobAge=600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
DefMemPerCPU=500
GresTypes=gpu
NodeName=n[1-{num_nodes}] NodeAddr={subnet}.1[1-{num_nodes}] CPUs=4 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=20 State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 State=UP
"""
GRES_CONF = "NodeName=n[1-{num_nodes}] Name=gpu File=/dev/null,/dev/zero\n"
CGROUP_CONF = "CgroupAutomount=no\n"


def why_impossible() -> str | None:
    """Why no bed can be made here, or None."""
    if os.geteuid() != 0:
        return "making namespaces and links needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"{', '.join(missing)} not found; on Debian: apt-get install slurm-wlm munge iproute2"
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    trial = subprocess.run(command, capture_output=True, text=True)
    return f"making namespaces fails here: {trial.stderr.strip()}" if trial.returncode else None


def sweep_abandoned_folders() -> None:
    """Remove the folders of beds whose process was killed; a living one holds a lock on its folder."""
    for folder in PARENT.glob(f"{PREFIX}*"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)


class SlurmBed:
    """A running cluster of nodes n1, n2, ... and a controller. Use as a context manager; see the module's docstring."""

    def __init__(self, num_nodes: int = 3) -> None:
        self.num_nodes = num_nodes
        self.nodes: dict[str, Machine] = {}
        self._job_outputs: dict[int, Path] = {}
        self._first_job_id = 1

    def __enter__(self) -> "SlurmBed":
        sweep_abandoned_folders()
        self._make_folder()
        try:
            self.switch = Machine(self.folder, "switch")
            self.controller = Machine(self.folder, "ctl", CONTROLLER_ADDRESS, self.switch)
            self._start_controller()
            for index in range(1, self.num_nodes + 1):
                self._start_node(f"n{index}")
            for name in self.nodes:
                self.wait_node(name, {"IDLE"}, UP_SECONDS)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        machines = [*self.nodes.values(), getattr(self, "controller", None), getattr(self, "switch", None)]
        for machine in machines:
            if machine is not None:
                machine.kill()
        shutil.rmtree(self.folder)
        os.close(self._lock)

    def _make_folder(self) -> None:
        hidden = Path(tempfile.mkdtemp(dir=PARENT, prefix=f".{PREFIX}"))
        self._lock = os.open(hidden, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.folder = hidden.rename(PARENT / hidden.name[1:])  # seen by sweepers only now that it is locked
        self.folder.chmod(0o755)  # munged insists on a path that others may enter
        self.shared = self.folder / "shared"
        for name in ("etc", "run", "log", "spool", "state", "shared"):
            (self.folder / name).mkdir()
        hosts = {"127.0.0.1": "localhost", CONTROLLER_ADDRESS: "ctl"}
        hosts |= {self._node_address(f"n{index}"): f"n{index}" for index in range(1, self.num_nodes + 1)}
        (self.folder / "etc/hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts.items()))
        values = {"folder": self.folder, "num_nodes": self.num_nodes, "subnet": SUBNET}
        (self.folder / "etc/slurm.conf").write_text(SLURM_CONF.format(controller=CONTROLLER_ADDRESS, **values))
        (self.folder / "etc/gres.conf").write_text(GRES_CONF.format(num_nodes=self.num_nodes))
        (self.folder / "etc/cgroup.conf").write_text(CGROUP_CONF)
        # What a login shell would have and nothing of ours: a job must not owe its success to the tests' environment.
        self.env = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
        self.env |= {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.env |= {"SLURM_CONF": str(self.folder / "etc/slurm.conf")}

    @staticmethod
    def _node_address(name: str) -> str:
        return f"{SUBNET}.1{name.removeprefix('n')}"

    def _start_controller(self) -> None:
        key, run, log = self.folder / "etc/munge.key", self.folder / "run", self.folder / "log"
        self._on(self.controller, "mungekey", "--create", f"--keyfile={key}")
        paths = (f"--key-file={key}", f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid")
        paths += (f"--log-file={log}/munged.log", f"--seed-file={run}/munge.seed")
        self._on(self.controller, "munged", *paths)
        self._on(self.controller, "slurmctld", "-c")

    def _start_node(self, name: str) -> None:
        self.nodes[name] = Machine(self.folder, name, self._node_address(name), self.switch)
        self._on(self.nodes[name], "slurmd", "-N", name)

    def restart(self, name: str) -> None:
        """Power a node off, and on again with an empty /tmp. Its jobs have failed, and Slurm sees it idle.

        The node is marked as down, because Slurm notices only after minutes that a node was off for seconds. To see it
        notice by itself, `kill` the node and wait for DOWN* before the restart.
        """
        self.nodes[name].kill()
        self.client("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=power")
        self._start_node(name)
        self.wait_node(name, {"IDLE"}, UP_SECONDS)

    @contextlib.contextmanager
    def powered_off(self, name: str) -> Iterator[None]:
        """A block that begins with a node's power going off; at its end the node is on again."""
        self.nodes[name].kill()
        try:
            yield
        finally:
            self.restart(name)

    @contextlib.contextmanager
    def configured(self, *lines: str) -> Iterator[None]:
        """The cluster with these lines more in slurm.conf, as an admin adds them to a running one; then as before."""
        path = self.folder / "etc/slurm.conf"
        before = path.read_text()
        try:
            path.write_text(before + "".join(f"{line}\n" for line in lines))
            self.client("scontrol", "reconfigure")
            yield
        finally:
            path.write_text(before)
            self.client("scontrol", "reconfigure")

    def kill_slurmd(self, name: str) -> None:
        """Kill the node's slurmd alone. What runs there goes on, and Slurm hears of it until SlurmdTimeout is over."""
        pid = (self.folder / f"run/slurmd-{name}.pid").read_text().strip()
        self._on(self.nodes[name], "kill", "-KILL", pid)

    def start_slurmd(self, name: str) -> None:
        """Start it again, and wait until Slurm takes the node back."""
        self._on(self.nodes[name], "slurmd", "-N", name)
        self.wait_node(name, {"IDLE", "ALLOCATED", "MIXED"}, 120)

    def kill_controller(self) -> None:
        """Kill slurmctld as its machine's failure would. Jobs run on."""
        pid = (self.folder / "run/slurmctld.pid").read_text().strip()
        self._on(self.controller, "kill", "-KILL", pid)

    def start_controller(self) -> None:
        """Start slurmctld again, from the state that it had saved.

        As an admin would, with a higher FirstJobId: it has forgotten its last seconds, and would give the ids of the
        jobs of those seconds to others, which the nodes then refuse to start.
        """
        conf = self.folder / "etc/slurm.conf"
        lines = [line for line in conf.read_text().splitlines() if not line.startswith("FirstJobId=")]
        self._first_job_id += JOB_IDS_FORGOTTEN
        conf.write_text("\n".join([*lines, f"FirstJobId={self._first_job_id}", ""]))
        self._on(self.controller, "slurmctld")
        self._wait("slurmctld answers", self._answers, UP_SECONDS, str)

    def _answers(self) -> bool:
        try:
            return bool(self.node_states())
        except subprocess.CalledProcessError:
            return False

    def _on(self, machine: Machine, *argv: str) -> str:
        try:
            return machine.run(*argv, cwd=self.shared, env=self.env)
        except subprocess.CalledProcessError as error:
            said = error.stdout + error.stderr
            raise RuntimeError(f"{' '.join(argv)} on {machine.name}: {said}\n{self.log()}") from error

    def client(self, *argv: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a Slurm command on the controller with `env` added to a bare login's environment; returns its output."""
        where = {"cwd": cwd or self.shared, "env": self.env | (env or {})}
        return self.controller.run(*argv, **where, timeout_seconds=CLIENT_SECONDS)

    def sbatch(
        self,
        script: Path,
        *args: str,
        options: Iterable[str] = (),
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> int:
        """Submit `script` with arguments and sbatch `options` from the folder `cwd`; returns the job's id."""
        job = int(self.client("sbatch", "--parsable", *options, str(script), *args, cwd=cwd, env=env).split(";")[0])
        self._job_outputs[job] = Path(self.job(job)["StdOut"])
        return job

    def job(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`."""
        words = self.client("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def squeue(self) -> dict[int, str]:
        """State of every job that is not over, by id."""
        lines = self.client("squeue", "--noheader", "--format=%A %T").splitlines()
        return {int(number): state for number, state in (line.split() for line in lines)}

    def write_script(self, name: str, body: str) -> Path:
        """Write a bash script into the shared folder and return its path."""
        path = self.shared / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        return path

    def output(self, job: int) -> str:
        """What the job's script has printed so far."""
        path = self._job_outputs[job]
        return path.read_text(errors="replace") if path.exists() else ""

    def log(self, num_lines: int = 20) -> str:
        """The last lines of every daemon's log."""
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            tails.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-num_lines:]))
        return "\n".join(tails)

    def wait_state(self, job: int, states: set[str], timeout_seconds: float) -> dict[str, str]:
        """Wait until the job is in one of `states` and return its fields. Fails at once if it ends in another."""

        def reached() -> dict[str, str] | None:
            fields = self.job(job)
            if fields["JobState"] in states:
                return fields
            if fields["JobState"] in FINAL_STATES:
                details = f"{self.output(job)}\n{self.log()}"
                raise AssertionError(f"job {job} is {fields['JobState']}, not {states}:\n{details}")
            return None

        return self._wait(f"job {job} in {states}", reached, timeout_seconds, lambda: self.output(job))

    def wait_output(self, job: int, text: str, timeout_seconds: float) -> None:
        """Wait until the job's script has printed `text`. Fails at once if the job ends without it."""

        def printed() -> bool:
            over = self.job(job)["JobState"] in FINAL_STATES  # first: then its last output is there below
            if text not in self.output(job) and over:
                raise AssertionError(f"job {job} ended without {text!r}:\n{self.output(job)}\n{self.log()}")
            return text in self.output(job)

        self._wait(f"{text!r} in job {job}", printed, timeout_seconds, lambda: self.output(job))

    def node_states(self) -> dict[str, str]:
        """State of every node by name, as in `sinfo`: IDLE, ALLOCATED, DOWN* (the star: it does not answer) ..."""
        lines = self.client("sinfo", "--noheader", "--Node", "--partition=low", "--format=%N %T").splitlines()
        return {name: state.upper() for name, state in (line.split() for line in lines)}

    def resume_drained(self) -> None:
        """Take nodes back that Slurm has drained: it does so when it is killed between the start of a job and the
        note of it, and finds the job's id in use afterwards."""
        for name, state in self.node_states().items():
            if state.startswith("DRAIN"):
                self.client("scontrol", "update", f"NodeName={name}", "State=RESUME")
                self.wait_node(name, {"IDLE", "ALLOCATED", "MIXED"}, UP_SECONDS)

    def wait_node(self, name: str, states: set[str], timeout_seconds: float) -> None:
        """Wait until Slurm sees the node in one of `states`."""
        self._wait(f"node {name} in {states}", lambda: self.node_states()[name] in states, timeout_seconds, str)

    def _wait(self, what: str, check: Callable, timeout_seconds: float, details: Callable[[], str]) -> Any:
        deadline = time.monotonic() + timeout_seconds
        while not (found := check()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not in {timeout_seconds} s: {what}\n{details()}\n{self.log()}")
            time.sleep(POLL_SECONDS)
        return found
