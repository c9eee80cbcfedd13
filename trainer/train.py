"""The training loop. Every rank runs one process of it, under torchrun:

    torchrun --standalone --nproc-per-node 2 -m trainer.train runs/demo

It reads the resolved recipe `runs/demo/recipe.yaml` and writes checkpoints, metrics.jsonl and result-train.json there.
The exit code is 0 if the training is complete, and 75 if it was asked to stop and has saved a checkpoint.
"""

import contextlib
import datetime
import gc
import io
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()  # before DeepSpeed is imported

import deepspeed
import torch.distributed as dist

from cluster.errors import EXIT_DONE, EXIT_RETRY, TunesmithError
from cluster.files import write_json
from cluster.log import stage_logger
from cluster.processes.descendants import die_with_parent
from cluster.processes.signals import StopRequest, ignore_stop_signals
from cluster.run.fence import verify
from cluster.run.rundir import RunDir
from trainer.checkpoint.checkpointer import Checkpointer, load_checkpoint
from trainer.checkpoint.state import TrainState, newest_checkpoint
from trainer.coordinator import agree_on_step, load_shared_tokens, make_sum_over_ranks
from trainer.data.batches import Batches
from trainer.data.sequence_parallel import SequenceParallelBatches
from trainer.data.tokens import Tokens
from trainer.engine import learning_rate, make_engine, train_step
from trainer.job import TrainJob, read_job
from trainer.logit_checks import check_logits
from trainer.metrics import StepLogger, step_logging
from trainer.model.tokenizer import load_tokenizer
from trainer.monitoring import Profiler, Watchdog
from trainer.resolve import resolve_auto
from trainer.validation import Validator

log = stage_logger("train")


def train(job: TrainJob, stop: StopRequest) -> dict:
    """Train to the end, or until any rank is asked to stop. Returns the result of the stage."""
    job = resolve_auto(job)
    config, run = job.config, job.run
    rank, world_size = dist.get_rank(), dist.get_world_size()
    all_sum = make_sum_over_ranks(config.process_group_timeout_seconds)
    watchdog = Watchdog(config.stall_timeout_seconds, rank)

    tokenizer, num_added_tokens = load_tokenizer(job.model, config.chat_template)
    tokens, tokens_hash = load_shared_tokens(job, tokenizer, job.sources)
    batches = make_batches(tokens, job, rank, world_size)
    validator = Validator(job, tokenizer, tokens, watchdog)

    torch.manual_seed(job.seed + rank)
    engine = make_engine(job, tokenizer, num_added_tokens, batches.grad_accum_steps, world_size)
    check_logits(engine, batches)  # packed documents do not see each other; the loss sees the model's real logits
    state = load_state(engine, job, job.identity(tokens_hash), batches.num_steps)

    # Left in the opposite order: copies of checkpoints end before the last metrics are written and the watchdog stops.
    with (
        watchdog,
        Profiler(config.profile if rank == 0 else None, run.profile) as profiler,
        step_logging(job, engine, batches, tokenizer, state.step) as metrics,
        Checkpointer(engine, run.checkpoints, config.checkpoint, all_sum, watchdog) as checkpointer,
    ):
        while state.step < batches.num_steps:
            agreed = agree_on_step(batches, state.step, all_sum, stop, checkpointer, watchdog)
            if agreed.should_stop:
                break
            profiler.before_step(state.step + 1)
            lr = learning_rate(config, state.step, batches.num_steps)
            loss_sum, grad_norm = train_step(engine, agreed.micro_batches, agreed.num_trained_tokens, lr)
            state = state.after_step(agreed.num_rows, agreed.num_tokens, agreed.num_trained_tokens, batches.num_steps)
            metrics.log_step(agreed, state, loss_sum, grad_norm, lr)
            state = replace(state, validation_loss=validator.maybe_run(engine, state))
            checkpointer.maybe_save(state, metrics.take_mean_loss)
        checkpointer.maybe_save(state, metrics.take_mean_loss, is_last=True)  # also after a request to stop
    return make_result(job, state, batches, metrics, validator)


def make_batches(tokens: Tokens, job: TrainJob, rank: int, world_size: int) -> Batches:
    """The batches of this rank."""
    kind = Batches if job.config.sequence_parallel_size == 1 else SequenceParallelBatches
    batches = kind(tokens, job.config, job.seed, rank, world_size)
    if rank == 0:
        for line in batches.describe():
            log.info(line)
        config = job.config
        log.info(f"{config.tuning}, ZeRO-{config.zero_stage}, {config.precision}; {batches.num_steps} steps")
    return batches


def load_state(engine: deepspeed.DeepSpeedEngine, job: TrainJob, identity: dict, num_steps: int) -> TrainState:
    """Load the newest checkpoint into `engine`, if there is one. Returns the state to start from. A collective."""
    newest = newest_checkpoint(job.run.checkpoints)
    if newest is None:
        return TrainState.first(dist.get_world_size(), identity)
    state = load_checkpoint(engine, newest, identity, job.seed)
    if dist.get_rank() == 0:
        log.info(f"resuming from {newest}, step {state.step} of {num_steps}")
    return replace(state, world_size=dist.get_world_size())


def make_result(job: TrainJob, state: TrainState, batches: Batches, metrics: StepLogger, validator: Validator) -> dict:
    """The content of result-train.json."""
    newest = newest_checkpoint(job.run.checkpoints)
    result = {
        "status": "done" if state.step >= batches.num_steps else "preempted",
        "step": state.step,
        "num_steps": batches.num_steps,
        "tuning": job.config.tuning,
        "num_documents": batches.tokens.num_documents,
        "dropped": batches.tokens.dropped,
        "notes": batches.tokens.notes,
        "num_tokens": state.num_tokens,
        "num_trained_tokens": state.num_trained_tokens,
        "tokens_per_second": metrics.tokens_per_second,
        "final_loss": metrics.loss,
        "checkpoint": str(newest) if newest else None,
    }
    return result if job.config.validation is None else {**result, "validation_loss": validator.last_loss}


def write_failure(run: RunDir, error: TunesmithError) -> None:
    """Write why training failed to result-train.json, which the launcher reads.

    Prints the error instead if the disk is full, or if a newer attempt owns the run.
    """
    try:
        verify(run.root)
        write_json(run.result("train"), {"status": "failed", "exit_code": error.exit_code, "message": str(error)})
    except (OSError, TunesmithError):
        print(f"error: {error}", file=sys.stderr, flush=True)


def init_distributed(timeout_seconds: float) -> None:
    """Choose this rank's GPU and create the process group."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = datetime.timedelta(seconds=timeout_seconds)
    with contextlib.redirect_stdout(io.StringIO()):  # every rank prints that it loaded the communication kernel
        load_comm_kernel()
        deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", timeout=timeout)


def main() -> int:
    die_with_parent()
    stop = StopRequest().install()
    gc.freeze()  # later garbage collections skip the million objects that the imports have made
    job = read_job(Path(sys.argv[1]))
    quieten_libraries()
    if os.environ["RANK"] == "0":
        verify(job.run.root)
        job.run.result("train").unlink(missing_ok=True)
    init_distributed(job.config.process_group_timeout_seconds)
    started = time.time()
    try:
        result = train(job, stop)
    except TunesmithError as error:
        write_failure(job.run, error)
        raise SystemExit(error.exit_code) from error
    except Exception as error:
        # If another rank fails, this one sees only a broken connection. The other rank has written the reason.
        failure = job.run.read_result("train")
        if failure is None or failure["status"] != "failed":
            raise
        raise SystemExit(failure["exit_code"]) from error
    ignore_stop_signals()  # the state is saved; a signal must not end a rank before the others write the result
    if dist.get_rank() == 0:
        verify(job.run.root)
        write_json(job.run.result("train"), {**result, "seconds": round(time.time() - started, 1)})
        job.run.event("train", result["status"])
    dist.barrier()
    dist.destroy_process_group()
    return EXIT_RETRY if result["status"] == "preempted" else EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
