"""One attempt of a chained job: who owns the run, who goes on if this one dies, and whether anybody should.

    claim a token -> submit the standby -> let the children wait for it -> run the stage -> settle

The standby is a job that waits for the end of this one. If the stage is done it is cancelled, which frees the children;
if this attempt dies, with a word or with its whole node, the standby runs, and is an attempt like this one. A stage
that ends for good without being done takes the rest of the chain with it.
"""

import os
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED, InputError, TunesmithError
from cluster.files import write_json
from cluster.nodes.topology import expand_host_list
from cluster.run import fence
from cluster.run.rundir import RunDir
from launcher.job import node_health as ledger
from launcher.job.chain import (
    CONTINUED,
    STANDBY_OF,
    Chain,
    Job,
    SlurmSilent,
    ask,
    is_alive,
    submit,
    successor_argv,
)
from launcher.job.hang import WATCHED, HangWatch
from launcher.job.preflight import OnAllNodes, check_nodes
from launcher.job.standing import PROVEN_BY_OUTPUT, has_output, progress_of
from launcher.slurm_config import SlurmConfig

SETTLE_SECONDS = 120  # how long an attempt that ends tries to reach Slurm
RETRY_SECONDS = 5.0
STANDBY_RETRY_SECONDS = 60.0
FENCE_SECONDS = 5.0


class Attempt:
    """This job, as a part of a chain. `standby` is the job that goes on if this one does not; None: there is none."""

    def __init__(self, run: RunDir, policy: SlurmConfig, chain: Chain, own: Job) -> None:
        self.run, self.policy, self.chain, self.own = run, policy, chain, own
        self.stage = own.stage
        self.hosts = tuple(expand_host_list(os.environ["SLURM_JOB_NODELIST"]))
        self.standby: Job | None = None
        self._next_try = 0.0

    def execute(self, run_stage: Callable[[], int], on_all_nodes: OnAllNodes) -> int:
        """The whole of an attempt. Returns its exit code; raises Superseded if a newer one owns the run.

        `run_stage` runs the stage and returns its exit code.
        """
        if self.is_cancelled:
            self._event("began although the run was cancelled")
            return EXIT_PREEMPTED
        if not self._has_input():
            return EXIT_BAD_INPUT
        ledger.catch_up(self.run)
        # An attempt that died between its last commit and its end leaves a stage that is done, and no more to gain.
        is_over = self.stage in PROVEN_BY_OUTPUT and has_output(self.stage, self.run)
        if self._is_pointless() and not is_over:
            return self._stop_without_progress("each died without a word; their logs may say more")
        self._claim()
        self.keep_standby()
        try:
            if self.policy.preflight if self.policy.preflight is not None else len(self.hosts) > 1:
                check_nodes(self.run, self.own.job_id, self.hosts, on_all_nodes)
            code = run_stage()
        except fence.Superseded:
            raise
        except TunesmithError as error:  # preflight or a watch: the stage itself has not said anything
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = error.exit_code
            self._write_result_file(code, str(error), getattr(error, "kind", "error"))
        fence.verify(self.run.root)
        return self._settle(code)

    @property
    def is_cancelled(self) -> bool:
        """Whether a user has ended the run: then no job of it may be followed by another."""
        return self.run.cancelled.exists()

    def watches(self) -> list[Callable[[], None]]:
        """What is to be looked at while the stage runs. They are first called when the attempt has claimed the run."""
        watches: list[Callable[[], None]] = [self._check_fence, self.keep_standby]
        if self.stage in WATCHED:
            watches.append(lambda: self._hang_watch())
        return watches

    def _check_fence(self) -> None:
        self._fence.check_throttled(FENCE_SECONDS)

    # -- before

    def _has_input(self) -> bool:
        """False if a stage before this one is not done. Then this job waits for it again, or the chain ends here."""
        missing = [parent for parent in self.chain.parents_of(self.stage) if not has_output(parent, self.run)]
        if not missing:
            return True
        living = [job for parent in missing if is_alive((job := self.chain.of_stage(parent)[-1]).job_id)]
        if len(living) == len(missing):
            again = self._submit(":".join(["afterany", *(job.job_id for job in living)]), living)
            self._event("came too early", waits_for=missing, next_job=again.job_id)
            self._move_children(again)
            return False
        self._stop(
            EXIT_BAD_INPUT, "bad input",
            f"{self.stage} began although {', '.join(missing)} is not done: what it left is in "
            f"{self.run.root}/result-{missing[0]}.json and the log of job "
            f"{self.chain.of_stage(missing[0])[-1].job_id}. Mend that and submit the run again.",
        )  # fmt: skip
        return False

    def _is_pointless(self) -> bool:
        return self._num_without_progress() >= self.policy.max_attempts_without_progress

    def _num_without_progress(self) -> int:
        """How many attempts, up to the last one, brought the stage no further."""
        jobs = {job.job_id for job in self.chain.of_stage(self.stage)}
        starts = [claim.progress for claim in fence.claims(self.run.root) if claim.job_id in jobs]
        count = 0
        for before, after in reversed(list(pairwise([*starts, progress_of(self.stage, self.run)]))):
            if after > before:
                break
            count += 1
        return count

    def _claim(self) -> None:
        progress = progress_of(self.stage, self.run)
        token = fence.claim(self.run.root, self.stage, self.own.job_id, self.hosts, progress)
        os.environ[fence.TOKEN_VARIABLE] = str(token)
        self._fence = fence.Fence(self.run.root, token)
        self._hang_watch = HangWatch(self.run, self.stage, self.policy)
        self._event("attempt started", fencing_token=token, hosts=self.hosts, progress=progress)
        if not has_output(self.stage, self.run):
            self.run.result(self.stage).unlink(missing_ok=True)  # of an earlier attempt

    def keep_standby(self) -> None:
        """See to it that there is a standby. Called now and then, for Slurm may not answer for a while."""
        if self.standby is not None or time.monotonic() < self._next_try or self.is_cancelled:
            return
        try:
            self.standby = self._submit(f"afterany:{self.own.job_id}", [self.own])
            self._event("standby submitted", standby=self.standby.job_id)
            self._move_children(self.standby)
        except SlurmSilent as error:
            self._next_try = time.monotonic() + STANDBY_RETRY_SECONDS
            self._event("no standby yet", reason=str(error))

    # -- after

    def _settle(self, code: int) -> int:
        """Decide what becomes of the chain, now that the stage has ended with `code`."""
        proven = has_output(self.stage, self.run) and (self.stage in PROVEN_BY_OUTPUT or code == EXIT_DONE)
        result = self.run.read_result(self.stage) or {}
        message = result.get("message", f"it ended with exit code {code}; its log says why")
        if code == EXIT_BAD_INPUT:
            self._stop(code, "bad input", message)
            return code
        if proven:
            self._event("done", code=code)
            ledger.note(self.run, self.own.job_id, self.hosts, failed=())
            self._cancel([self.standby] if self.standby else [])
            return EXIT_DONE
        if self.is_cancelled:
            self._event("cancelled", code=code)
            self._cancel([self.standby] if self.standby else [])
            return code if code != EXIT_DONE else EXIT_FAILED
        self._note_nodes(code, result.get("kind", ""))
        if self._is_pointless():
            return self._stop_without_progress(message)
        what = "preempted" if code == EXIT_PREEMPTED else "crashed"
        if code == EXIT_DONE:
            code, message = EXIT_FAILED, "it ended with exit code 0, but what it should have made is not there"
        self._ensure_standby()
        self._event(what, code=code, reason=message, standby=self.standby.job_id if self.standby else None)
        return code

    def _note_nodes(self, code: int, kind: str) -> None:
        failed = () if code == EXIT_PREEMPTED else ledger.culprits(self.run, self.own.job_id, self.hosts)
        if kind == "preflight":
            return  # it has told the ledger itself which node it was
        ledger.note(self.run, self.own.job_id, self.hosts, failed=failed)

    def _ensure_standby(self) -> None:
        """Whatever it takes within SETTLE_SECONDS: after this nobody else sees to it that the stage goes on."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while True:
            try:
                if self.standby is None or not is_alive(self.standby.job_id):
                    self.standby = self._submit(f"afterany:{self.own.job_id}", [self.own])
                    self._move_children(self.standby)
                elif bad := self._suspects():
                    ask(["scontrol", "update", f"JobId={self.standby.job_id}", f"ExcNodeList={','.join(bad)}"])
                    self._event("nodes excluded", nodes=bad, standby=self.standby.job_id)
                return
            except SlurmSilent as error:
                if time.monotonic() > deadline:
                    self._event(
                        "slurm does not answer", reason=str(error), standby=self.standby and self.standby.job_id
                    )
                    return
                self._wait_to_retry()

    def _stop_without_progress(self, message: str) -> int:
        limit = self.policy.max_attempts_without_progress
        self._stop(
            EXIT_FAILED, "no progress",
            f"NO PROGRESS: {limit} attempts in a row brought {self.stage} no further than "
            f"{progress_of(self.stage, self.run):g}, so a next one would not either. The last: {message}. Mend that "
            "and submit the run again; slurm.max_attempts_without_progress says how many may fail.",
        )  # fmt: skip
        return EXIT_FAILED

    def _stop(self, code: int, kind: str, message: str) -> None:
        """The end of the chain: say why, and cancel the standby and all that waits for this stage."""
        self._write_result_file(code, message, kind)
        print(f"error: {message}", file=sys.stderr, flush=True)
        rest = [self.chain.of_stage(child)[-1] for child in self.chain.descendants_of(self.stage)]
        self._event("stopped", kind=kind, reason=message, cancelled=[job.job_id for job in rest])
        self._cancel([*rest, *([self.standby] if self.standby else [])])

    # -- Slurm and the run folder

    def _submit(self, dependency: str, parents: list[Job]) -> Job:
        jobs = self.chain.of_stage(self.stage)
        argv = successor_argv(jobs[0].argv, dependency, self._suspects())
        job_id = submit(argv, standby_of=self.own.job_id)
        job = Job(
            self.stage, job_id, jobs[-1].attempt + 1, tuple(parent.job_id for parent in parents), tuple(argv), CONTINUED
        )
        self.chain.add(job)
        return job

    def _suspects(self) -> list[str]:
        return ledger.to_exclude(self.run, len(self.hosts), os.environ.get("SLURM_JOB_PARTITION"))

    def _move_children(self, newest: Job) -> None:
        """Let the stages that wait for this one wait for its newest job, and for other stages as before."""
        for child in self.chain.children_of(self.stage):
            waits = [newest.job_id]
            for parent in self.chain.parents_of(child):
                if parent != self.stage and not has_output(parent, self.run):
                    waits.append(self.chain.of_stage(parent)[-1].job_id)
            job = self.chain.of_stage(child)[-1]
            try:
                ask(["scontrol", "update", f"JobId={job.job_id}", f"Dependency=afterany:{':'.join(waits)}"])
            except SlurmSilent as error:  # a child that starts too early finds its input missing, and waits again
                self._event("child not moved", child=child, child_job=job.job_id, reason=str(error))

    def _cancel(self, jobs: list[Job]) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        for job in jobs:
            while True:
                try:
                    ask(["scancel", job.job_id])
                    break
                except SlurmSilent as error:
                    if time.monotonic() > deadline:  # it finds the stage done, or pointless, and ends by itself
                        self._event("not cancelled", other_job=job.job_id, reason=str(error))
                        break
                    self._wait_to_retry()

    def _wait_to_retry(self) -> None:
        """Slurm does not answer a node that is cut off: whoever took over meanwhile decides."""
        fence.verify(self.run.root)
        time.sleep(RETRY_SECONDS)

    def _write_result_file(self, code: int, message: str, kind: str) -> None:
        fence.verify(self.run.root)
        status = "preempted" if code == EXIT_PREEMPTED else "failed"
        result = {"status": status, "exit_code": code, "kind": kind, "message": message}
        write_json(self.run.result(self.stage), result)

    def _event(self, event: str, **fields: object) -> None:
        self.run.event(self.stage, event, job=self.own.job_id, attempt=self.own.attempt, **fields)


def open_attempt(stage: str, recipe_argv: list[str], environ: os._Environ) -> Attempt | None:
    """This job as an attempt of a chain; None if jobs.jsonl of its run does not know it."""
    from launcher.recipe import load

    recipe = load(Path(recipe_argv[0]), recipe_argv[1:])
    run = RunDir(recipe.run_dir.resolve())
    chain = Chain(run)
    own = chain.find(environ.get("SLURM_JOB_ID", ""))
    predecessor = chain.find(environ.get(STANDBY_OF, ""))
    if own is None and predecessor is not None and predecessor.stage == stage:
        # Who submitted this job died before it could write that down.
        parents, argv = (predecessor.job_id,), chain.of_stage(stage)[0].argv
        own = Job(stage, environ["SLURM_JOB_ID"], predecessor.attempt + 1, parents, argv, CONTINUED)
        chain.add(own)
    if own is None:
        return None
    if own.stage != stage:
        raise InputError(f"{chain.path}: job {own.job_id} is {own.stage}, and this is {stage}.")
    return Attempt(run, recipe.slurm, chain, own)
