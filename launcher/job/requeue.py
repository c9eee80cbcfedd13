"""Puts this job back into the queue, after an attempt that another one is to follow.

    python -P -m launcher.job.requeue STAGE RECIPE [key=value ...]

The job's script runs it when the supervisor has ended with EXIT_RETRY or was killed. Slurm has the first say: a
job that it has cancelled stays cancelled, and a job that it has requeued itself is not requeued again.

Slurm lets a requeued job wait for AuthInfo's cred_expire, two minutes by default, unless the job has a start time in
the future when its last attempt is over. So it gets one a few seconds ahead. Nodes on which attempts crashed are
excluded in the same command.
"""

import os
import sys
import time
from pathlib import Path

from cluster.errors import EXIT_DONE, TunesmithError
from cluster.files import write_json
from cluster.nodes.topology import attempt_number, restart_count
from cluster.processes.signals import ignore_stop_signals
from cluster.run import fence
from cluster.run.rundir import RunDir
from launcher.job import node_health
from launcher.recipe import load
from launcher.slurm.client import Slurm, SlurmError, SlurmNoAnswer
from launcher.slurm.submitted import SubmittedJob, own_job

RETRY_SECONDS = 5.0
START_DELAY_SECONDS = 15  # longer than the nodes need to end the attempt


def requeue(run: RunDir, job: SubmittedJob, slurm: Slurm) -> None:
    """Requeue the job unless Slurm has cancelled or requeued it already, and record what became of it.

    Asks again until Slurm answers: nothing else brings the stage to its end. Raises SlurmError if Slurm refuses.
    """
    while True:
        verify_own_claim(run, job)
        try:
            if not requeue_unless_ended(slurm, job.job_id):
                return record_cancelled(run, job)
            break
        except SlurmNoAnswer as error:
            print(f"requeue: {error}", file=sys.stderr, flush=True)
            time.sleep(RETRY_SECONDS)
        except SlurmError as error:
            event(run, job, "not requeued", reason=str(error))
            write_json(run.result(job.stage), {"status": "failed", "message": str(error)})
            raise
    node_health.catch_up(run)
    failed = node_health.to_exclude(
        run, int(os.environ["SLURM_JOB_NUM_NODES"]), os.environ.get("SLURM_JOB_PARTITION"), slurm
    )
    excluded = [*filter(None, [job.option("exclude")]), *failed]
    event(run, job, "requeued", excluded=failed)
    try:
        slurm.update(job.job_id, StartTime=f"now+{START_DELAY_SECONDS}", ExcNodeList=",".join(excluded))
    except SlurmError as error:  # the job starts a little later, and perhaps on the same nodes
        event(run, job, "requeued job not changed", reason=str(error))


def requeue_unless_ended(slurm: Slurm, job_id: str) -> bool:
    """Requeue the job unless Slurm has done so. Returns False if Slurm has ended the job for good."""
    fields = slurm.job_fields(job_id)
    if int(fields["Restarts"]) > restart_count():
        return True
    # At its time limit a job is no longer RUNNING, but its stage is to continue.
    if fields["JobState"] != "RUNNING" and fields["Reason"] != "TimeLimit":
        return False
    slurm.requeue(job_id)
    return True


def verify_own_claim(run: RunDir, job: SubmittedJob) -> None:
    """Raise Superseded if another attempt owns the run: this node may be cut off, or the run has other jobs."""
    own = [claim for claim in job.claims_of(fence.claims(run.root)) if claim.restart_count == restart_count()]
    if own:
        fence.Fence(run.root, own[-1].token).check()


def record_cancelled(run: RunDir, job: SubmittedJob) -> None:
    event(run, job, "cancelled")
    result = run.read_result(job.stage) or {"status": "preempted"}
    if result["status"] != "done":
        write_json(run.result(job.stage), result | {"cancelled": True})


def event(run: RunDir, job: SubmittedJob, name: str, **fields: object) -> None:
    run.event(job.stage, name, job=job.job_id, attempt=attempt_number(), **fields)


def main(argv: list[str]) -> int:
    ignore_stop_signals()  # Slurm ends the job's processes as soon as it is requeued
    stage, recipe_path, *overrides = argv
    try:
        run = RunDir(load(Path(recipe_path), overrides).run_dir.resolve())
        job_id, slurm = os.environ["SLURM_JOB_ID"], Slurm()
        if (job := own_job(run)) is not None:
            requeue(run, job, slurm)
        elif not requeue_unless_ended(slurm, job_id):  # submitted by hand with --requeue
            print(f"{stage}: Slurm has ended job {job_id}, which is not requeued.", flush=True)
    except TunesmithError as error:
        print(f"error: job {os.environ['SLURM_JOB_ID']} was not requeued: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
