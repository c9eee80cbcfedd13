"""The training loop: one process of it runs on every rank, under torchrun.

    torchrun --standalone --nproc-per-node 2 -m trainer.train runs/demo

reads `runs/demo/recipe.yaml` (the resolved recipe) and writes checkpoints, metrics.jsonl and result-train.json there.
The exit code is 0 when the job is done and 75 when it was asked to stop and has saved.
"""

import contextlib
import datetime
import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from cluster.imports import without_collection

with without_collection():
    import torch

    from trainer.runtime import quieten_libraries, set_accelerator_env

    set_accelerator_env()

    import deepspeed
    import torch.distributed as dist

    from cluster.errors import EXIT_DONE, EXIT_PREEMPTED, InputError, TunesmithError
    from cluster.files import write_json
    from cluster.log import stage_logger
    from cluster.processes.descendants import die_with_parent
    from cluster.processes.signals import StopRequest, ignore_stop_signals
    from cluster.run.fence import verify
    from cluster.run.rundir import RunDir, append_jsonl
    from trainer.checkpoint import checkpointer as checkpoint
    from trainer.checkpoint.state import TrainState, newest_checkpoint, read_state
    from trainer.data.batches import Batches
    from trainer.data.tokens import Tokens, load_tokens, prepare_tokens
    from trainer.engine import learning_rate, make_engine, train_step
    from trainer.flops import Utilization
    from trainer.job import TrainJob, read_job
    from trainer.logit_checks import check_logits
    from trainer.metrics import Step, StepLine
    from trainer.model.load import load_tokenizer
    from trainer.model.sequence import SplitBatches
    from trainer.ranks import make_all_sum
    from trainer.resolve import settle
    from trainer.runtime import load_comm_kernel
    from trainer.trackers import reporting
    from trainer.validation import make_validation
    from trainer.watchdog import LossWatch, StallWatch, describe_rows, profiling

log = stage_logger("train")


def train(job: TrainJob, stop: StopRequest) -> dict:
    """Train to the end, or to the step at which any rank was asked to stop. Returns the result."""
    job = settle(job)
    config, run = job.config, job.run
    rank, world_size = dist.get_rank(), dist.get_world_size()
    all_sum = make_all_sum(config.process_group_timeout_seconds)
    tokenizer, num_added = load_tokenizer(job.model, config.chat_template)
    tokens, job_hash = shared_tokens(job, tokenizer)
    batches = make_batches(tokens, job, rank, world_size)
    if rank == 0:
        announce(job, batches)
    validation = make_validation(job, tokenizer, tokens)
    torch.manual_seed(job.seed + rank)
    engine = make_engine(job, tokenizer, num_added, batches.grad_accum_steps, world_size)
    check_logits(engine, batches)

    state = TrainState(0, 0, 0, 0, world_size, job_hash)
    if (last := newest_checkpoint(run.checkpoints)) is not None:
        state = replace(checkpoint.load(engine, last, job_hash, job.seed), world_size=world_size)
        if rank == 0:
            log.info(f"going on from {last}, step {state.step} of {batches.num_steps}")

    watch = LossWatch(
        config.watch, lambda step: describe_rows(batches.rows_of_step(step - 1), tokens, tokenizer.decode)
    )
    with (
        StallWatch(config.stall_timeout_seconds, rank) as stall,
        profiling(config.profile, run.profile, rank == 0) as profile,
        reporting(config.report_to if rank == 0 else (), run, config.model_dump(mode="json")) as report,
        checkpoint.Saver(engine, run.checkpoints, config.checkpoint, all_sum) as saver,
    ):
        utilization = Utilization(engine.module.lm, world_size)
        is_lazy = torch.cuda.is_available()
        line = StepLine(run, batches.num_steps, state.step, rank == 0, is_lazy, watch, utilization, report)
        saved_step, held_out_loss = state.step, None  # the loss on held-out data after the last step, where taken
        while state.step < batches.num_steps:
            stall.at(f"step {state.step + 1}, agreeing on it with the other ranks")
            micro_batches = batches.micro_batches(state.step)
            num_labels, stop_votes, *votes = all_sum(
                sum(batch.num_labels for batch in micro_batches), int(stop.is_set), *saver.votes()
            )
            saver.heed(*votes)
            if stop_votes:
                break
            profile(state.step + 1)
            stall.at(f"step {state.step + 1}, forward, backward and update")
            lr = learning_rate(config, state.step, batches.num_steps)
            loss_sum, grad_norm = train_step(engine, micro_batches, int(num_labels), lr)
            rows = batches.rows_of_step(state.step)
            lengths = tokens.lengths[[document for row in rows for document in row]]
            state = after_step(state, len(rows), int(lengths.sum()), int(num_labels), batches.num_steps)
            line.step(Step(state, loss_sum, grad_norm, lr, int(num_labels), lengths))
            if validation is not None:
                stall.at(f"step {state.step}, validating")
                held_out_loss = validation.at(engine, state.step, state.finished)
            if state.finished or state.step % config.checkpoint.every_steps == 0:
                stall.at(f"step {state.step}, saving")
                line.flush()
                saver.save(replace(state, train_loss=line.take_mean_loss(), validation_loss=held_out_loss))
                saved_step = state.step
        line.flush()
        if saved_step < state.step:
            stall.at(f"step {state.step}, saving")
            saver.save(replace(state, train_loss=line.take_mean_loss(), validation_loss=held_out_loss))
    answer = result(job, state, batches, tokens, line)
    return answer | ({"validation_loss": validation.last_loss} if validation is not None else {})


def after_step(state: TrainState, num_rows: int, num_tokens: int, num_labels: int, num_steps: int) -> TrainState:
    """The state when a step of so many rows, tokens and labels was added to it."""
    return replace(
        state, step=state.step + 1, num_rows=state.num_rows + num_rows, num_tokens=state.num_tokens + num_tokens,
        num_trained_tokens=state.num_trained_tokens + num_labels, finished=state.step + 1 == num_steps,
    )  # fmt: skip


def shared_tokens(job: TrainJob, tokenizer: object) -> tuple[Tokens, str]:
    """Rank 0 encodes the dataset, the others map its files. Also returns the hash of the whole job."""
    folder: list[str | None] = [None]
    if dist.get_rank() == 0:
        folder = [str(prepare_tokens(job.config, tokenizer, job.sources, job.run.tokens))]
    dist.broadcast_object_list(folder, src=0)
    path = Path(str(folder[0]))
    return load_tokens(path), job.fingerprint(path.name)


def make_batches(tokens: Tokens, job: TrainJob, rank: int, world_size: int) -> Batches:
    try:
        kind = Batches if job.config.sequence_parallel_size == 1 else SplitBatches
        return kind(tokens, job.config, job.seed, rank, world_size)
    except ValueError as error:
        word = ""
        if (last := newest_checkpoint(job.run.checkpoints)) is not None:
            word = f" {last} was made by {read_state(last).world_size} ranks; its job keeps its global_batch_size."
        raise InputError(f"{error}{word}") from error


def announce(job: TrainJob, batches: Batches) -> None:
    """Print the arithmetic of the job before it starts."""
    for line in batches.describe():
        log.info(line)
    log.info(f"{job.config.tuning}, ZeRO-{job.config.zero_stage}, {job.config.precision}; {batches.num_steps} steps")


def result(job: TrainJob, state: TrainState, batches: Batches, tokens: Tokens, line: StepLine) -> dict:
    return {
        "status": "done" if state.finished or state.step >= batches.num_steps else "preempted",
        "step": state.step,
        "num_steps": batches.num_steps,
        "tuning": job.config.tuning,
        "num_rows": tokens.num_documents,
        "dropped": tokens.dropped,
        "num_tokens": state.num_tokens,
        "num_trained_tokens": state.num_trained_tokens,
        "tokens_per_second": line.tokens_per_second,
        "final_loss": line.loss,
        "checkpoint": str(last) if (last := newest_checkpoint(job.run.checkpoints)) else None,
    }


def leave_word(run: RunDir, error: TunesmithError) -> None:
    """Write why training failed where the launcher reads it; on a disk too full for that, and if a newer attempt owns
    the run, print it."""
    try:
        verify(run.root)
        write_json(run.result("train"), {"status": "failed", "exit_code": error.exit_code, "message": str(error)})
    except (OSError, TunesmithError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def main() -> int:
    die_with_parent()
    stop = StopRequest().install()
    job = read_job(Path(sys.argv[1]))
    quieten_libraries()
    if os.environ["RANK"] == "0":
        verify(job.run.root)
        job.run.result("train").unlink(missing_ok=True)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(seconds=job.config.process_group_timeout_seconds)
    with contextlib.redirect_stdout(io.StringIO()):  # every rank tells that it built its communication kernel
        load_comm_kernel()
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)
    started = time.time()
    try:
        answer = train(job, stop)
    except TunesmithError as error:
        leave_word(job.run, error)
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        # What a rank sees when another one gives up is a broken connection; the other one has said why.
        word = job.run.read_result("train")
        if word is None or word["status"] != "failed":
            raise
        raise SystemExit(word["exit_code"]) from error
    ignore_stop_signals()
    if dist.get_rank() == 0:
        answer["seconds"] = round(time.time() - started, 1)
        verify(job.run.root)
        write_json(job.run.result("train"), answer)
        append_jsonl(job.run.events, {"time": round(time.time(), 3), "stage": "train", "event": answer["status"]})
    dist.barrier()
    dist.destroy_process_group()
    return EXIT_PREEMPTED if answer["status"] == "preempted" else EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
