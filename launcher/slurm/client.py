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
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cluster.errors import InputError, TunesmithError

# What a job around this process, or the user's own settings, would add to a command. `clean_environment` leaves it out.
_LEFT_OUT = re.compile(
    r"(_?SLURM|SBATCH|SALLOC|SRUN|SQUEUE|SINFO|SACCT|SCANCEL|SCONTROL|PMIX?|TUNESMITH)_.*"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?RANK|(LOCAL_)?WORLD_SIZE"
)
_KEPT = frozenset({"SLURM_CONF", "SLURM_JWT"})  # which cluster, and who asks
_NO_ANSWER = re.compile(
    r"unable to contact|connection refused|timed out|communication|connect(ion)? failure|zero bytes|standby mode"
    r"|transport endpoint|temporarily unable|temporarily unavailable|authentication error",
    re.I,
)
_NO_CLUSTER = "Could not establish a configuration source"
_UNKNOWN_JOB = "Invalid job id specified"
_QUEUE_FIELDS = "%i|%T|%M|%D|%N|%E|%r|%V|%j"
_TIME_FIELDS, _PLACE_FIELDS = "%i|%S|%L|%l|%P", "%i|%Q|%r"
_JOB_ID = re.compile(r"^([0-9]+)(?:;\S*)?$", re.MULTILINE)  # with the cluster's name where there are several
COMMAND_SECONDS = 60
FIND_SECONDS, POLL_SECONDS = 10.0, 1.0  # until a job is in the queue whose sbatch got no answer
JOBS_PER_CALL = 500  # a command line has a limit
CONFIRMED_JOBS = 8  # the newest ones: two chains of four jobs
_WAITS_FOR_RESOURCES = ("Priority", "Resources", "None")  # None: Slurm has not looked at the job yet
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
    submit_time: str  # local time, as in 2026-11-28T12:30:00
    name: str

    @property
    def is_over(self) -> bool:
        return self.state in FINAL_STATES


@dataclass(frozen=True)
class JobTimes:
    """When a job starts and ends, in Slurm's own notation."""

    start: str  # of a job that waits, what Slurm expects; N/A if it expects nothing yet
    left: str
    limit: str
    partition: str  # several with commas between them if the job takes any of them


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

    def submit(self, argv: Sequence[str], name: str) -> str:
        """Run the sbatch command of a job whose `name` no other job has, and return the job's id.

        sbatch may print more than the id, or get no answer although Slurm took the job. Then the name finds the job.
        """
        try:
            ids, error = _JOB_ID.findall(output := self.call(argv)), None
        except SlurmNoAnswer as no_answer:
            ids, output, error = [], "", no_answer
        deadline = time.monotonic() + FIND_SECONDS
        while len(ids) != 1 and time.monotonic() < deadline:
            if ids := [job.job_id for job in self.find([name])]:
                break
            time.sleep(POLL_SECONDS)
        if len(ids) != 1:
            raise error or SlurmRefused(f"sbatch printed {output!r}, and Slurm has {len(ids)} jobs named {name}.")
        return ids[0]

    def test(self, argv: Sequence[str]) -> None:
        """Ask whether a job like this could ever run. Raises SlurmRefused with Slurm's reason if not."""
        only_in_a_chain = ("--parsable", "--hold", "--dependency=", "--kill-on-invalid-dep=")
        options = [option for option in argv[1:] if not option.startswith(only_in_a_chain)]
        self.call([argv[0], "--test-only", *options])

    def queue(self, job_ids: Iterable[str]) -> dict[str, QueuedJob]:
        """What Slurm knows of the jobs with these ids. A job that it has forgotten is missing."""
        wanted = list(dict.fromkeys(job_ids))
        found: dict[str, QueuedJob] = {}
        for start in range(0, len(wanted), JOBS_PER_CALL):
            ids = wanted[start : start + JOBS_PER_CALL]
            try:
                jobs = self._squeue(f"--jobs={','.join(ids)}")
            except SlurmRefused as error:
                if _UNKNOWN_JOB not in str(error):
                    raise
                continue
            if not jobs:
                self._confirm_unknown(ids[-CONFIRMED_JOBS:])
            found |= {job.job_id: job for job in jobs}
        return {job_id: found[job_id] for job_id in wanted if job_id in found}

    def times(self, job_id: str) -> JobTimes | None:
        """None means that Slurm has forgotten the job."""
        found = self._lines("--states=all", f"--jobs={job_id}", f"--format={_TIME_FIELDS}")
        return JobTimes(*found[0][1:]) if found else None

    def place(self, job_id: str, partition: str) -> tuple[int, int] | None:
        """(place, number) among the jobs that wait for resources of a partition. None if the job does not.

        Slurm may hide other users' jobs (PrivateData), and may start a job before those ahead of it (backfill).
        """
        found = self._lines("--states=PENDING", f"--partition={partition}", f"--format={_PLACE_FIELDS}")
        waiting = [(-int(priority), number) for number, priority, reason in found if reason in _WAITS_FOR_RESOURCES]
        order = [number for _, number in sorted(waiting, key=lambda job: (job[0], int(re.match(r"\d+", job[1])[0])))]
        return (order.index(job_id) + 1, len(order)) if job_id in order else None

    def _lines(self, *options: str) -> list[list[str]]:
        """The fields of each line that squeue prints. The last option is the format."""
        lines = self.call(["squeue", "--noheader", *options]).splitlines()
        return [line.split("|") for line in lines if line.count("|") == options[-1].count("|")]

    def find(self, names: Iterable[str]) -> list[QueuedJob]:
        """The jobs with these names that wait or run."""
        return [job for job in self._squeue(f"--name={','.join(names)}") if not job.is_over]

    def _squeue(self, which: str) -> list[QueuedJob]:
        output = self.call(["squeue", "--noheader", "--states=all", which, f"--format={_QUEUE_FIELDS}"])
        return [parse_queue_line(line) for line in output.splitlines() if line.count("|") >= _QUEUE_FIELDS.count("|")]

    def _confirm_unknown(self, job_ids: Sequence[str]) -> None:
        """Raise SlurmNoAnswer if Slurm knows one of these jobs: an empty answer of squeue may be no answer."""
        for job_id in job_ids:
            try:
                self.show_job(job_id)
            except SlurmRefused as error:
                if _UNKNOWN_JOB in str(error):
                    continue
                raise
            raise SlurmNoAnswer(f"squeue printed nothing, although Slurm knows job {job_id}. Try again later.")

    def show_job(self, job_id: str, *options: str) -> str:
        """What `scontrol show job` prints. Raises SlurmNoAnswer if that is nothing."""
        output = self.call(["scontrol", *options, "show", "job", job_id])
        if "JobId=" not in output:
            raise SlurmNoAnswer(f"scontrol printed nothing about job {job_id}. Try again later.")
        return output

    def host_names(self, host_list: str) -> list[str]:
        """The names in a compressed list such as `gpu[01-03,7],login`."""
        return self.call(["scontrol", "show", "hostnames", host_list]).split()

    def partitions(self) -> list[Partition]:
        lines = self.call(["sinfo", "--noheader", "--format=%P|%D|%l|%a"]).splitlines()
        found: dict[str, Partition] = {}
        for line in lines:  # one for each state of nodes
            if line.count("|") != 3:
                continue  # a message to all users
            label, num_nodes, limit, state = line.split("|")
            name, earlier = label.rstrip("*"), found.get(label.rstrip("*"))
            total = int(num_nodes) + (earlier.num_nodes if earlier else 0)
            found[name] = Partition(name, label.endswith("*"), total, limit, state == "up")
        if not found:
            raise SlurmNoAnswer("sinfo printed no partition. Try again later.")
        return list(found.values())

    def usable_nodes(self, partition: str | None) -> set[str]:
        """Nodes of a partition that run jobs or could. None means all partitions."""
        where = [f"--partition={partition}"] if partition else []
        command = ["sinfo", "--noheader", "--Node", "--format=%N", f"--states={USABLE_NODES}", *where]
        nodes = set(self.call(command).split())
        if not nodes:
            raise SlurmNoAnswer("sinfo printed no usable node.")
        return nodes

    def job_fields(self, job_id: str) -> dict[str, str]:
        """The fields that `scontrol show job` prints, such as JobState, Reason and Restarts."""
        words = self.show_job(job_id, "--oneliner").split()
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
    job_id, state, elapsed, num_nodes, *texts = line.split("|", _QUEUE_FIELDS.count("|"))
    return QueuedJob(job_id, state, elapsed, int(num_nodes), *texts)
