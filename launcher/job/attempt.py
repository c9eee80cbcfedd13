"""One attempt of a job that `<run>/jobs.jsonl` lists: it owns the run, and decides whether another attempt follows.

    claim a fencing token -> check the nodes -> run the stage -> decide by what is on the disk

    done             exit code 0: the job is over, and Slurm starts the job that waits for it (afterok)
    give up          exit code 1 or 2: the job has failed, and Slurm cancels the jobs that wait for it
    another attempt  exit code 75: the job's script requeues the job (requeue.py)

A requeued job keeps its id, so the jobs after it wait for it as before. It may begin while an attempt of the same job
still runs on a node that is cut off from the network. The fencing token (cluster/run/fence.py) makes that harmless.
Slurm itself requeues a job that it preempts, or whose node it has lost.

If a batch script is killed by SIGKILL on a node that stays up, the job fails and nothing requeues it. Use
`tunesmith resume`.
"""

import os
import shutil
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from cluster.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, EXIT_RETRY, InputError, TunesmithError
from cluster.files import write_json
from cluster.nodes.topology import attempt_number, restart_count
from cluster.run import fence
from cluster.run.rundir import RunDir
from launcher.done import is_done, progress_of
from launcher.job import node_health
from launcher.job.hang import WATCHED, HangWatch, StepWatch
from launcher.job.preflight import OnAllNodes, check_nodes
from launcher.recipe import Recipe, load
from launcher.slurm.client import Slurm, SlurmError
from launcher.slurm.snapshot import PROJECT, code_hash
from launcher.slurm.submitted import SubmittedJob, note_job_by_hand, own_job, read_jobs

FENCE_CHECK_SECONDS = 5.0


class Attempt:
    """This attempt of this job."""

    def __init__(
        self, run: RunDir, recipe: Recipe, job: SubmittedJob, parents: list[SubmittedJob], hosts: tuple[str, ...]
    ) -> None:
        self.run, self.recipe, self.slurm_config = run, recipe, recipe.slurm
        self.job, self.parents, self.hosts = job, parents, hosts
        self.stage = job.stage
        self.restart_count = restart_count()

    def execute(self, run_stage: Callable[[], int], on_all_nodes: OnAllNodes) -> int:
        """Run the stage and return the exit code of the job. Raises Superseded if a newer attempt owns the run.

        `run_stage` runs the stage and returns its exit code.
        """
        if (code := self.job.code) is not None and code.name != code_hash():
            return self._give_up_with_other_code(code)
        if missing := [parent for parent in self.parents if not is_done(parent.stage, self.recipe, self.run)]:
            return self._give_up_without_input(missing[0])
        node_health.catch_up(self.run)
        # The stage may be done although its attempt died after the last commit.
        if self._is_without_progress() and not self._is_done():
            return self._give_up_without_progress("each died without a message; the log of the job may say more")
        self._claim()
        try:
            if self._wants_preflight:
                check_nodes(self.run, self.job.job_id, self.hosts, on_all_nodes)
            code = run_stage()
        except fence.Superseded:
            raise
        except (TunesmithError, OSError) as error:  # from the preflight or a check: the stage has written no result
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = getattr(error, "exit_code", EXIT_FAILED)
            self._write_result(code, str(error), getattr(error, "kind", "error"))
        fence.verify(self.run.root)
        return self._finish(code)

    def checks(self) -> list[Callable[[], None]]:
        """What to call regularly while the stage runs, so after `_claim`, which makes what they use."""

        def check_fence() -> None:
            self._fence.check_throttled(FENCE_CHECK_SECONDS)

        def check_progress() -> None:
            self._hang_watch.check()

        step_watch = StepWatch(self.run.attempt_dir(self.job.job_id, self.restart_count))
        by_step = [step_watch.check] if self.stage == "train" else []
        return [check_fence, *by_step, *([check_progress] if self.stage in WATCHED else [])]

    # -- before the stage

    @property
    def _wants_preflight(self) -> bool:
        wanted = self.slurm_config.preflight
        return len(self.hosts) > 1 if wanted is None else wanted

    def _is_done(self) -> bool:
        return is_done(self.stage, self.recipe, self.run)

    def _is_without_progress(self) -> bool:
        """True if as many attempts in a row as the recipe allows have brought the stage no further."""
        claims = fence.claims(self.run.root)
        superseded = {before.token for before, after in pairwise(claims) if after.job_id != before.job_id}
        own = self.job.claims_of(claims)  # those that another job ended say nothing about the stage
        starts = [claim.progress for claim in own if claim.token not in superseded]
        count = 0
        for before, after in reversed(list(pairwise([*starts, progress_of(self.stage, self.run)]))):
            if after > before:
                break
            count += 1
        return count >= self.slurm_config.max_attempts_without_progress

    def _claim(self) -> None:
        progress, root = progress_of(self.stage, self.run), self.run.root
        # Of a job that had the same id before Slurm was installed anew.
        shutil.rmtree(self.run.attempt_dir(self.job.job_id, self.restart_count), ignore_errors=True)
        token = fence.claim(root, self.stage, self.job.job_id, self.hosts, progress, self.restart_count)
        os.environ[fence.TOKEN_VARIABLE] = str(token)
        self._fence = fence.Fence(root, token)
        self._hang_watch = HangWatch(self.run, self.stage, self.slurm_config)
        self._event("attempt started", fencing_token=token, hosts=self.hosts, progress=progress)
        if not self._is_done():
            self.run.result(self.stage).unlink(missing_ok=True)  # of an earlier attempt

    # -- after the stage

    def _finish(self, code: int) -> int:
        """Decide what becomes of the job, now that the stage has ended with `code`. Returns the job's exit code."""
        result = self.run.read_result(self.stage) or {}
        message = result.get("message", f"it ended with exit code {code}; its log says why")
        if code == EXIT_BAD_INPUT:
            return self._give_up(code, "bad input", message)
        if self._is_done():
            self._event("done", code=code)
            node_health.note(self.run, self._fence.token, self.hosts, failed=())
            return EXIT_DONE
        if result.get("kind") != "preflight":  # check_nodes has already recorded them
            folder = self.run.attempt_dir(self.job.job_id, self.restart_count)
            failed = () if code == EXIT_RETRY else node_health.failed_nodes(folder, self.hosts)
            node_health.note(self.run, self._fence.token, self.hosts, failed)
        if self._is_without_progress():
            return self._give_up_without_progress(message)
        if code == EXIT_DONE:
            code, message = EXIT_FAILED, "it ended with exit code 0, but its output is not there"
        self._event("preempted" if code == EXIT_RETRY else "crashed", code=code, reason=message)
        return EXIT_RETRY

    def _give_up_without_input(self, parent: SubmittedJob) -> int:
        return self._give_up(
            EXIT_BAD_INPUT, "bad input",
            f"{self.stage} began although {parent.stage} is not done: see {self.run.result(parent.stage)} and "
            f"{parent.log}. Fix the cause and submit the run again.",
        )  # fmt: skip

    def _give_up_with_other_code(self, submitted: Path) -> int:
        if submitted.resolve() == PROJECT:
            message = f"the code that was submitted, {submitted}, was changed since. Submit the run again."
        else:
            message = (
                f"the code that was submitted is {submitted}, and the job runs that in {PROJECT}. Look for settings of "
                "PYTHONPATH on the nodes, and submit the run again."
            )
        return self._give_up(EXIT_BAD_INPUT, "other code", message)

    def _give_up_without_progress(self, message: str) -> int:
        limit = self.slurm_config.max_attempts_without_progress
        return self._give_up(
            EXIT_FAILED, "no progress",
            f"NO PROGRESS: {limit} attempts in a row brought {self.stage} no further than "
            f"{progress_of(self.stage, self.run):g}. The last one: {message}. Fix the cause and submit the run again. "
            "slurm.max_attempts_without_progress is the number of attempts that may fail.",
        )  # fmt: skip

    def _give_up(self, code: int, kind: str, message: str) -> int:
        """End the job as failed. Slurm cancels the jobs that wait for this one."""
        self._write_result(code, message, kind)
        print(f"error: {message}", file=sys.stderr, flush=True)
        self._event("gave up", kind=kind, reason=message)
        return code

    def _write_result(self, code: int, message: str, kind: str) -> None:
        fence.verify(self.run.root)
        status = "preempted" if code == EXIT_RETRY else "failed"
        result = {"status": status, "exit_code": code, "kind": kind, "message": message}
        write_json(self.run.result(self.stage), result)

    def _event(self, event: str, **fields: object) -> None:
        self.run.event(self.stage, event, job=self.job.job_id, attempt=attempt_number(), **fields)


def open_attempt(stage: str, recipe_argv: list[str], hosts: tuple[str, ...]) -> Attempt | None:
    """This attempt of this job. None if a user has submitted the job with sbatch. Then it is noted in jobs.jsonl."""
    recipe = load(Path(recipe_argv[0]), recipe_argv[1:])
    run = RunDir(recipe.run_dir.resolve())
    own = own_job(run)
    if own is None:
        try:
            note_job_by_hand(run, stage, recipe_argv, Slurm())
        except SlurmError as error:
            print(f"`tunesmith status` will not know this job: {error}", file=sys.stderr, flush=True)
        return None
    if own.stage != stage:
        raise InputError(
            f"{run.jobs}: job {own.job_id} is {own.stage}, and this is {stage}. Submit the run again with `tunesmith "
            f"resume {run.root}`."
        )
    jobs = {job.job_id: job for job in read_jobs(run)}
    parents = [jobs[job_id] for job_id in own.parent_job_ids if job_id in jobs]
    return Attempt(run, recipe, own, parents, hosts)
