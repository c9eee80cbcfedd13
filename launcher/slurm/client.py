"""The commands of Slurm that the launcher uses, with a deadline each and errors that say what to do."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import InputError, TunesmithError
from launcher.slurm_config import seconds_of

# Of a job in which we may run ourselves: a new job must not take over what was asked for the old one.
_INHERITED = re.compile(
    r"(SLURM|SBATCH|SRUN|PMIX?|TUNESMITH)_.*|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
)
_KEPT = frozenset({"SLURM_CONF", "SLURM_JWT"})  # which cluster, and who asks
_SILENCE = re.compile(r"unable to contact|connection refused|timed out|communication|connect failure", re.I)
_NO_CLUSTER = "Could not establish a configuration source"
_UNKNOWN_JOB = "Invalid job id specified"
_FIELDS = "%i|%T|%M|%D|%N|%E|%r"
JOBS_A_CALL = 500  # a command line has a limit


class SlurmSilent(TunesmithError):
    """Slurm gave no answer, so nothing is known."""


class NoSlurm(InputError):
    """This machine has no Slurm, or its commands know of no cluster."""


class SlurmRefused(InputError):
    """Slurm answered that it will not."""


@dataclass(frozen=True)
class Queued:
    """What squeue says about a job. Finished jobs are there for a while too (MinJobAge, usually five minutes)."""

    job_id: str
    state: str  # PENDING, RUNNING, COMPLETED, FAILED ...
    elapsed: str
    num_nodes: int
    nodes: str  # compressed, as in n[1-4]
    dependency: str
    reason: str

    @property
    def is_over(self) -> bool:
        return self.state in OVER


@dataclass(frozen=True)
class Partition:
    name: str
    is_default: bool
    num_nodes: int
    limit_seconds: int | None  # None: no limit
    is_up: bool


OVER = frozenset(
    {
        "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED",
        "REVOKED", "TIMEOUT",
    }
)  # fmt: skip


def scrubbed(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what belongs to a job around us, or would add options to those that are shown."""
    return {name: value for name, value in environ.items() if name in _KEPT or not _INHERITED.fullmatch(name)}


@dataclass(frozen=True)
class Slurm:
    """Slurm as its commands on this machine show it."""

    environ: Mapping[str, str] = field(default_factory=lambda: scrubbed(os.environ))
    timeout_seconds: float = 60

    def call(self, argv: Sequence[str]) -> str:
        """Standard output of a command. Raises SlurmRefused, SlurmSilent or NoSlurm."""
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
            raise SlurmSilent(f"{argv[0]} gave no answer in {self.timeout_seconds:g} s. Try again later.") from error
        if done.returncode != 0:
            said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            if _NO_CLUSTER in said:
                raise NoSlurm(
                    f"{argv[0]} finds no configuration of a cluster on this machine. Log in where jobs are submitted, "
                    "set SLURM_CONF, or leave out --on slurm to run on this machine."
                )
            if _SILENCE.search(said):
                raise SlurmSilent(f"{argv[0]} could not reach Slurm's controller: {said}. Try again later.")
            raise SlurmRefused(f"{argv[0]}: {said}")
        return done.stdout

    def submit(self, argv: Sequence[str]) -> str:
        """Run an sbatch command and return the job's id."""
        said = self.call(argv).strip()
        job_id = said.split(";")[0]
        if not re.fullmatch(r"[0-9]+", job_id):
            raise SlurmRefused(f"sbatch answered {said!r}, which is no job's id.")
        return job_id

    def test(self, argv: Sequence[str]) -> None:
        """Ask whether a job like this could ever run. Raises SlurmRefused with Slurm's reason if not."""
        places = ("--parsable", "--hold", "--dependency=", "--kill-on-invalid-dep=")
        self.call([argv[0], "--test-only", *[word for word in argv[1:] if not word.startswith(places)]])

    def queue(self, job_ids: Iterable[str]) -> dict[str, Queued]:
        """What Slurm knows about these jobs, by id; those it has forgotten are missing."""
        wanted = list(dict.fromkeys(job_ids))
        found: dict[str, Queued] = {}
        for start in range(0, len(wanted), JOBS_A_CALL):
            ids = ",".join(wanted[start : start + JOBS_A_CALL])
            try:
                said = self.call(["squeue", "--noheader", "--states=all", f"--jobs={ids}", f"--format={_FIELDS}"])
            except SlurmRefused as error:
                if _UNKNOWN_JOB not in str(error):
                    raise
                continue
            found |= {job.job_id: job for job in map(parse_queue_line, said.splitlines())}
        return {job_id: job for job_id, job in found.items() if job_id in wanted}

    def partitions(self) -> list[Partition]:
        lines = self.call(["sinfo", "--noheader", "--format=%P|%D|%l|%a"]).splitlines()
        found: dict[str, Partition] = {}
        for line in lines:  # one a state of nodes
            label, num_nodes, limit, state = line.split("|")
            name, earlier = label.rstrip("*"), found.get(label.rstrip("*"))
            total = int(num_nodes) + (earlier.num_nodes if earlier else 0)
            found[name] = Partition(name, label.endswith("*"), total, seconds_of(limit), state == "up")
        return list(found.values())

    def release(self, job_id: str) -> None:
        self.call(["scontrol", "release", job_id])

    def cancel(self, job_ids: Sequence[str]) -> None:
        """End jobs in this order. One that is over already is no error."""
        for job_id in job_ids:
            try:
                self.call(["scancel", job_id])
            except SlurmRefused as error:
                if _UNKNOWN_JOB not in str(error):
                    raise


def parse_queue_line(line: str) -> Queued:
    job_id, state, elapsed, num_nodes, nodes, dependency, reason = line.split("|", 6)
    return Queued(job_id, state, elapsed, int(num_nodes), nodes, dependency, reason)
