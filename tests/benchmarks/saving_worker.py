"""One rank of the benchmark of saving: `torchrun -m tests.benchmarks.saving_worker RUN ROUNDS`.

Trains one step, so that the optimizer has its moments, then saves and loads. Rank 0 prints the measurements.
"""

import datetime
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()

import deepspeed
import torch
import torch.distributed as dist

from tests.benchmarks.peak import highest_bytes
from trainer.checkpoint.checkpointer import Checkpointer, load_checkpoint
from trainer.checkpoint.state import TrainState, newest_checkpoint
from trainer.config.train import CheckpointConfig
from trainer.coordinator import load_shared_tokens, make_sum_over_ranks
from trainer.engine import make_engine, train_step
from trainer.job import read_job
from trainer.model.tokenizer import load_tokenizer
from trainer.monitoring import Watchdog
from trainer.resolve import resolve_auto
from trainer.train import make_batches


def timed(work: Callable[[], object]) -> tuple[float, int]:
    """Seconds until every rank is done, and the peak increase of this rank's memory in bytes."""
    dist.barrier()
    started = time.perf_counter()
    with highest_bytes() as highest:
        work()
        dist.barrier()
    return time.perf_counter() - started, highest()


def main() -> None:
    run, num_rounds = Path(sys.argv[1]), int(sys.argv[2])
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo", timeout=datetime.timedelta(minutes=10))
    job = resolve_auto(read_job(run))
    tokenizer, num_added = load_tokenizer(job.model, None)
    tokens, tokens_hash = load_shared_tokens(job, tokenizer, job.sources)
    identity = job.identity(tokens_hash)
    batches = make_batches(tokens, job, dist.get_rank(), dist.get_world_size())
    engine = make_engine(job, tokenizer, num_added, batches.grad_accum_steps, dist.get_world_size())
    train_step(engine, batches.micro_batches(0), 1000, 1e-4)
    found: dict[str, list] = {"alone": [], "ours": [], "held": [], "committed": [], "load": []}
    state, all_sum = TrainState.first(dist.get_world_size(), identity), make_sum_over_ranks(600)
    watchdog = Watchdog(600, dist.get_rank())
    config = CheckpointConfig(every_steps=1, keep_last=1)
    with Checkpointer(engine, job.run.checkpoints, config, all_sum, watchdog) as checkpointer:
        for number in range(1, num_rounds + 1):
            folder = run / "alone"
            found["alone"].append(timed(lambda folder=folder: engine.save_checkpoint(str(folder), save_latest=False)))
            dist.barrier()
            if dist.get_rank() == 0:
                shutil.rmtree(folder)
            found["ours"].append(timed(lambda number=number: checkpointer.save(replace(state, step=number))))
            last = newest_checkpoint(job.run.checkpoints)
            found["load"].append(timed(lambda last=last: load_checkpoint(engine, last, identity, job.seed)))
    config = CheckpointConfig(every_steps=1, keep_last=1, local_dir=str(run / "local"))
    with Checkpointer(engine, job.run.checkpoints, config, all_sum, watchdog) as checkpointer:
        for number in range(1, num_rounds + 1):
            held = timed(lambda number=number: checkpointer.save(replace(state, step=num_rounds + number)))
            rest = timed(checkpointer.finish)
            found["held"].append(held)
            found["committed"].append((held[0] + rest[0], max(held[1], rest[1])))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
