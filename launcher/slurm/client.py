"""Slurm's commands, as the launcher and the jobs themselves call them.

    client = Slurm()
    job_id = client.submit(["sbatch", "--parsable", "script.sh"])
    client.queue([job_id])[job_id].state

Every command has a deadline and runs in a clean environment. Every error is a `SlurmError`. It is a `SlurmNoAnswer` if
nothing is known, and a `SlurmRefused` if Slurm said no. Imports nothing heavy: it is used inside jobs, also in images.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import InputError, TunesmithError

# What a job around this process, or the user's own settings, would add to a command. `clean_environment` leaves it out.
_LEFT_OUT = re.compile(
    r"(SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SCANCEL|SCONTROL|PMIX?|TUNESMITH)_.*"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
)
_KEPT = frozenset({"SLURM_CONF", "SLURM_JWT"})  # which cluster, and who asks
_NO_ANSWER = re.compile(r"unable to contact|connection refused|timed out|communication|connect failure", re.I)
_NO_CLUSTER = "Could not establish a configuration source"
_UNKNOWN_JOB = "Invalid job id specified"
_QUEUE_FIELDS = "%i|%T|%M|%D|%N|%E|%r"
COMMAND_SECONDS = 60
JOBS_PER_CALL = 500  # a command line has a limit
USABLE_NODES = "idle,allocated,mixed,completing"


class SlurmError(TunesmithError):
    """A command of Slurm failed."""


class SlurmNoAnswer(SlurmError):
    """Slurm gave no answer, so nothing is known."""


class SlurmRefused(SlurmError, InputError):
    """Slurm answered no."""


class NoSlurm(SlurmError, InputError):
    """This machine has no Slurm, or its commands find no cluster."""


@dataclass(frozen=True)
class QueuedJob:
    """What squeue shows of a job. A finished job is shown for a while too (MinJobAge, usually five minutes)."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED ...
    elapsed: str
    num_nodes: int
    nodes: str  # compressed, as in n[1-4]
    dependency: str
    reason: str

    @property
    def is_over(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    num_nodes: int
    time_limit: str  # as Slurm writes it; "infinite" means no limit
    is_up: bool


FINAL_STATES = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for a command of Slurm: without what belongs to a job around this process, and without the
    variables by which a user gives options to sbatch, squeue, sinfo and scancel."""
    return {name: value for name, value in environ.items() if name in _KEPT or not _LEFT_OUT.fullmatch(name)}


@dataclass(frozen=True)
class Slurm:
    """Slurm as the commands on this machine show it."""

    environ: Mapping[str, str] = field(default_factory=lambda: clean_environment(os.environ))
    timeout_seconds: float = COMMAND_SECONDS

    def call(self, argv: Sequence[str]) -> str:
        """Standard output of a command. Raises SlurmRefused, SlurmNoAnswer or NoSlurm."""
        try:
            done = subprocess.run(
                argv, env=self.environ, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=self.timeout_seconds, check=False,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise NoSlurm(
                f"{argv[0]} is not on this machine, so there is no Slurm here. Log in where jobs are submitted, or "
                "leave out --on slurm to run on this machine."
            ) from error
        except subprocess.TimeoutExpired as error:
            raise SlurmNoAnswer(f"{argv[0]} gave no answer in {self.timeout_seconds:g} s. Try again later.") from error
        if done.returncode != 0:
            message = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            if _NO_CLUSTER in message:
                raise NoSlurm(
                    f"{argv[0]} finds no configuration of a cluster on this machine. Log in where jobs are submitted, "
                    "set SLURM_CONF, or leave out --on slurm to run on this machine."
                )
            if _NO_ANSWER.search(message):
                raise SlurmNoAnswer(f"{argv[0]} could not reach Slurm's controller: {message}. Try again later.")
            raise SlurmRefused(f"{argv[0]}: {message}")
        return done.stdout

    def submit(self, argv: Sequence[str]) -> str:
        """Run an sbatch command and return the job's id."""
        output = self.call(argv).strip()
        job_id = output.split(";")[0]
        if not re.fullmatch(r"[0-9]+", job_id):
            raise SlurmRefused(f"sbatch answered {output!r}, which is not a job id.")
        return job_id

    def test(self, argv: Sequence[str]) -> None:
        """Ask whether a job like this could ever run. Raises SlurmRefused with Slurm's reason if not."""
        only_in_a_chain = ("--parsable", "--hold", "--dependency=", "--kill-on-invalid-dep=")
        options = [option for option in argv[1:] if not option.startswith(only_in_a_chain)]
        self.call([argv[0], "--test-only", *options])

    def queue(self, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
        """What Slurm knows of these jobs, by id. A job that it has forgotten is missing."""
        wanted = list(dict.fromkeys(job_ids))
        found: dict[str, QueuedJob] = {}
        for start in range(0, len(wanted), JOBS_PER_CALL):
            ids = ",".join(wanted[start : start + JOBS_PER_CALL])
            command = ["squeue", "--noheader", "--states=all", f"--jobs={ids}", f"--format={_QUEUE_FIELDS}"]
            try:
                lines = self.call(command).splitlines()
            except SlurmRefused as error:
                if _UNKNOWN_JOB not in str(error):
                    raise
                continue
            found |= {job.job_id: job for job in map(parse_queue_line, lines)}
        return {job_id: found[job_id] for job_id in wanted if job_id in found}

    def live(self, job_ids: Iterable[str]) -> list[QueuedJob]:
        """Those of these jobs that wait or run, in the same order."""
        return [job for job in self.queue(job_ids).values() if not job.is_over]

    def show_job(self, job_id: str) -> str:
        """What `scontrol --details show job` prints."""
        return self.call(["scontrol", "--details", "show", "job", job_id])

    def host_names(self, host_list: str) -> list[str]:
        """The names in a compressed list such as `gpu[01-03,7],login`."""
        return self.call(["scontrol", "show", "hostnames", host_list]).split()

    def partitions(self) -> list[Partition]:
        lines = self.call(["sinfo", "--noheader", "--format=%P|%D|%l|%a"]).splitlines()
        found: dict[str, Partition] = {}
        for line in lines:  # one for each state of nodes
            label, num_nodes, limit, state = line.split("|")
            name, earlier = label.rstrip("*"), found.get(label.rstrip("*"))
            total = int(num_nodes) + (earlier.num_nodes if earlier else 0)
            found[name] = Partition(name, label.endswith("*"), total, limit, state == "up")
        return list(found.values())

    def usable_nodes(self, partition: str | None) -> set[str]:
        """Nodes of a partition that run jobs or could. None means all partitions."""
        where = [f"--partition={partition}"] if partition else []
        command = ["sinfo", "--noheader", "--Node", "--format=%N", f"--states={USABLE_NODES}", *where]
        return set(self.call(command).split())

    def job_fields(self, job_id: str) -> dict[str, str]:
        """The fields that `scontrol show job` prints, such as JobState, Reason and Restarts."""
        words = self.call(["scontrol", "--oneliner", "show", "job", job_id]).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def requeue(self, job_id: str) -> None:
        self.call(["scontrol", "requeue", job_id])

    def release(self, job_id: str) -> None:
        self.call(["scontrol", "release", job_id])

    def update(self, job_id: str, **settings: str) -> None:
        """Change a job, as in `update("7", StartTime="now")`."""
        self.call(["scontrol", "update", f"JobId={job_id}", *(f"{name}={value}" for name, value in settings.items())])

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs in this order. A job that is over already is no error."""
        for job_id in job_ids:
            try:
                self.call(["scancel", job_id])
            except SlurmRefused as error:
                if _UNKNOWN_JOB not in str(error):
                    raise


def parse_queue_line(line: str) -> QueuedJob:
    job_id, state, elapsed, num_nodes, nodes, dependency, reason = line.split("|", 6)
    return QueuedJob(job_id, state, elapsed, int(num_nodes), nodes, dependency, reason)
