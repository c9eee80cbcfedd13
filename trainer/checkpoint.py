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

from cluster.errors import InputError, TunesmithError
from cluster.files import fsync_folder, write_json
from cluster.manifest import verify_manifest, write_manifest
from trainer.disk import explain_failed_write
from trainer.state import TrainState, read_state, step_folder
from trainer.weights import save_weights


def save(engine: DeepSpeedEngine, checkpoints: Path, state: TrainState, keep_last: int) -> Path:
    """Save a complete checkpoint. A collective: every rank has to call it at the same step.

    Raises InputError if the disk is full; what was written of this checkpoint is then removed.
    """
    folder = step_folder(checkpoints, state.step)
    partial = checkpoints / f".saving_{folder.name}"
    rank = dist.get_rank()
    try:
        with explain_failed_write(checkpoints.parent):
            if rank == 0:
                for leftover in checkpoints.glob(".saving_*"):
                    shutil.rmtree(leftover)
                partial.mkdir(parents=True)
            dist.barrier()
            engine.save_checkpoint(str(checkpoints), tag=partial.name, save_latest=False)
            save_file(_rng_state(), partial / f"rng-rank{rank}.safetensors")
            save_weights(engine.module.lm, partial / "weights", max_shard_size="4GB")
            dist.barrier()
            if rank == 0:
                write_json(partial / "state.json", asdict(state))
                _put_in_place(partial, folder, state.step)
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if rank == 0:
        for old in sorted(checkpoints.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old)
    dist.barrier()
    return folder


def _put_in_place(partial: Path, folder: Path, step: int) -> None:
    files = sorted(str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file())
    write_manifest(partial, files, step=step)
    for path in (partial, *partial.rglob("*")):
        fsync_folder(path)  # files as well: none of this may be lost once older checkpoints are removed
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    fsync_folder(folder.parent)


def load(engine: DeepSpeedEngine, folder: Path, job: str, world_size: int) -> TrainState:
    """Put weights, optimizer and random state back into `engine`. A collective.

    Raises InputError if the checkpoint is corrupt, or belongs to another job or number of ranks.
    """
    if dist.get_rank() == 0:
        verify_manifest(folder)
    dist.barrier()
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
    loaded_from, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if loaded_from is None:
        raise TunesmithError(f"{folder}: DeepSpeed could not load this checkpoint; its message is above.")
    random_state = load_file(folder / f"rng-rank{dist.get_rank()}.safetensors")
    torch.set_rng_state(random_state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(random_state["cuda"])
    return state


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
