"""Measures what training takes: `torchrun -m tests.trainer.memory_worker RESULT.json [--peak] RUN...`.

Every run folder is trained for two steps in this process group. `states`: bytes of all tensors after a backward pass of
the second step and before the optimizer step, less those that existed before the model. `peak`: the most bytes that
were allocated at a time during both steps, by the profiler's record of every allocation.
"""

import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from trainer.runtime import load_comm_kernel, quieten_libraries, set_accelerator_env

set_accelerator_env()

import deepspeed
import torch
import torch.distributed as dist
from torch.profiler import profile

from trainer.coordinator import load_shared_tokens
from trainer.engine import make_engine
from trainer.job import TrainJob, read_job
from trainer.model.tokenizer import load_tokenizer
from trainer.resolve import resolve_auto
from trainer.train import make_batches


def live_bytes() -> int:
    """Bytes of all storages of the tensors that were created since `gc.freeze`. Each storage counts once."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if issubclass(type(found), torch.Tensor) and found.device.type == "cpu":
            for tensor in (found, getattr(found, "ds_tensor", None)):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure(job: TrainJob, with_peak: bool) -> dict[str, int]:
    before = live_bytes()
    job = resolve_auto(job)
    tokenizer, num_added = load_tokenizer(job.model, None)
    tokens, _ = load_shared_tokens(job, tokenizer, job.sources)
    batches = make_batches(tokens, job, dist.get_rank(), dist.get_world_size())
    engine = make_engine(job, tokenizer, num_added, batches.grad_accum_steps, dist.get_world_size())
    micro_batches = batches.micro_batches(0)
    start = live_bytes() - before
    # Profiled from the first step on, so that no release is missed. Reading the profiler's records is slow.
    with profile(profile_memory=True) if with_peak else nullcontext() as profiler:
        accumulate(engine, micro_batches)
        engine.step()
        states = max(accumulate(engine, micro_batches, live_bytes)) - before
        engine.step()
    engine.destroy()
    if profiler is None:
        return {"states": states}
    total = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            peak = max(peak, total)
    return {"states": states, "peak": start + peak}


def accumulate(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list, look: Callable[[], int] = lambda: 0
) -> list[int]:
    """Forward and backward passes of all micro-batches, without the step. Returns the result of `look` after each."""
    seen = []
    for number, batch in enumerate(micro_batches, 1):
        engine.backward(engine(**batch.inputs) / 1000, scale_wrt_gas=False)
        seen.append(look())
        if number < len(micro_batches):
            engine.step()
    return seen


def main() -> None:
    quieten_libraries()
    torch.set_num_threads(1)
    load_comm_kernel()
    deepspeed.init_distributed(dist_backend="gloo")
    gc.freeze()  # `live_bytes` skips the objects of the libraries, which are many
    results = {}
    for run in [argument for argument in sys.argv[2:] if argument != "--peak"]:
        results[Path(run).name] = measure(read_job(Path(run)), "--peak" in sys.argv)
        gc.collect()
        if dist.get_rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(results, indent=2))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
