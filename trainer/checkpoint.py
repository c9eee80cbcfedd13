"""Checkpoints that are whole or absent, and going on from the newest one.

checkpoints/step_000200/            renamed into place when complete
    mp_rank_*, zero_*               DeepSpeed: weights, optimizer; pickles, loaded only if the manifest holds
    rng-rank0.safetensors ...       random state of every rank
    weights/                        the weights (or adapter) in Hugging Face form: what export reads
    state.json                      step, samples seen, seed, world size
    manifest.json                   size and SHA-256 of all the above, written last
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from cluster.errors import InputError
from cluster.files import explain_full_disk, fsync_folder, write_json
from cluster.manifest import verify_manifest, write_manifest
from trainer.state import TrainState, read_state, step_folder
from trainer.weights import save_weights


def save(engine: DeepSpeedEngine, checkpoints: Path, state: TrainState, keep_last: int) -> Path:
    """Save a complete checkpoint. A collective: every rank has to call it at the same step."""
    folder = step_folder(checkpoints, state.step)
    partial = checkpoints / f".saving_{folder.name}"
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    with explain_full_disk(checkpoints):
        engine.save_checkpoint(str(checkpoints), tag=partial.name, save_latest=False)
        save_file(_rng_state(), partial / f"rng-rank{rank}.safetensors")
        save_weights(engine.module.lm, partial / "weights", max_shard_size="4GB")
        dist.barrier()
        if rank == 0:
            write_json(partial / "state.json", asdict(state))
            files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
            write_manifest(partial, files, step=state.step)
            for path in partial.rglob("*"):
                if path.is_dir():
                    fsync_folder(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(partial, folder)
            fsync_folder(checkpoints)
            for old in sorted(checkpoints.glob("step_*"))[:-keep_last]:
                shutil.rmtree(old)
    dist.barrier()
    return folder


def load(engine: DeepSpeedEngine, folder: Path, job: str, world_size: int) -> TrainState:
    """Put weights, optimizer and random state back into `engine`. A collective.

    Raises InputError if the checkpoint is corrupt, or belongs to another job or number of ranks.
    """
    if dist.get_rank() == 0:
        verify_manifest(folder)
    state = read_state(folder)
    if state.job != job:
        raise InputError(
            f"{folder}: made by other data, model or settings than this recipe's. "
            "Choose another run folder with `--run-dir`, or restore the recipe."
        )
    if state.world_size != world_size:
        raise InputError(
            f"{folder}: made by {state.world_size} ranks, started with {world_size}. Start it with {state.world_size}."
        )
    dist.barrier()
    engine.load_checkpoint(str(folder.parent), tag=folder.name)
    torch.set_rng_state(load_file(folder / f"rng-rank{dist.get_rank()}.safetensors")["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(load_file(folder / f"rng-rank{dist.get_rank()}.safetensors")["cuda"])
    return state


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
