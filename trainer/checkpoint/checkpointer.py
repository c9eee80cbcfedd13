"""Checkpoints that are whole or absent, and going on from the newest one.

checkpoints/step_000200/            renamed into place when complete
    mp_rank_*, zero_*               DeepSpeed: trained weights, optimizer; pickles, loaded only if the manifest holds
    rng-rank0.safetensors ...       random state of every rank
    weights/                        the weights (or adapter) in Hugging Face form: what export reads
    state.json                      step, samples seen, losses, world size
    manifest.json                   size and SHA-256 of all the above, written last
"""

import copy
import hashlib
import shutil
import socket
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from cluster.errors import EXIT_BAD_INPUT, InputError, TunesmithError
from cluster.files import write_json
from cluster.run.fence import verify
from cluster.run.manifest import verify_manifest
from trainer.checkpoint.commit import (
    Background,
    copy_files,
    explain_failed_write,
    partial_folder,
    put_in_place,
    remove_partial,
)
from trainer.checkpoint.state import TrainState, read_state
from trainer.checkpoint.universal import CLIENT_STATE, convert, universal_folder
from trainer.checkpoint.weights import save_weights
from trainer.config.train import CheckpointConfig
from trainer.ranks import AllSum
from trainer.watchdog import Diverged


class Saver:
    """Makes the checkpoints of one training. All methods but `votes` are collectives: every rank has to call them.

    With `local_dir` every rank writes its part to its node's own disk and copies it to the run folder in a thread. When
    all have said, at a step boundary, that theirs is there, rank 0 seals the checkpoint, in a thread as well.
    """

    def __init__(self, engine: DeepSpeedEngine, checkpoints: Path, config: CheckpointConfig, all_sum: AllSum):
        self.engine, self.checkpoints, self.config, self.all_sum = engine, checkpoints, config, all_sum
        self.rank = dist.get_rank()
        self.background = Background()
        self.copied_step: int | None = None  # of the checkpoint that is being copied
        self.local = local_folder(Path(config.local_dir), checkpoints, self.rank) if config.local_dir else None
        engine.module.register_state_dict_post_hook(drop_frozen_duplicates)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Complete the checkpoint on its way; after an error only if that is one that every rank raises."""
        if kind is None or issubclass(kind, Diverged):
            self.finish()
            if self.local:
                shutil.rmtree(self.local, ignore_errors=True)  # DeepSpeed leaves scripts of its own there

    def save(self, state: TrainState) -> None:
        """Save a checkpoint. With `local_dir` the one before is complete afterwards, and this one is on its way.

        Raises InputError if the disk is full; what was written of this checkpoint is then removed.
        """
        self.finish()
        partial = partial_folder(self.checkpoints, state.step)
        place = self.local / partial.name if self.local else partial
        try:
            with explain_failed_write(self.local or self.checkpoints.parent):
                if self.rank == 0:
                    verify(self.checkpoints.parent)
                    remove_partial(self.checkpoints)
                    partial.mkdir(parents=True)
                if self.local:
                    shutil.rmtree(self.local, ignore_errors=True)
                    place.mkdir(parents=True)
                dist.barrier()
                write_parts(self.engine, place, state)
                dist.barrier()
            if self.rank == 0 and not self.local:
                put_in_place(self.checkpoints, state.step, self.config)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.local:
            self.background.start(copy_files, place, partial)
            self.copied_step = state.step
        dist.barrier()

    def votes(self) -> tuple[int, int]:
        """(1 if this rank's work in the background has failed, 1 if it is done). To be summed over the ranks."""
        is_done = self.background.is_done  # asked first: what is done has its error, if there is one
        return int(self.background.error is not None), int(is_done)

    def heed(self, num_failed: float, num_done: float) -> None:
        """Act on the summed votes: seal a checkpoint that all have copied, raise if any rank has failed."""
        if num_failed:
            self._raise_together()
        if self.copied_step is not None and num_done == dist.get_world_size():
            if self.rank == 0:
                self.background.start(put_in_place, self.checkpoints, self.copied_step, self.config)
            self.copied_step = None

    def finish(self) -> None:
        """Wait until the checkpoint on its way is complete. Raises what kept it from that, on every rank."""
        if self.local is None:
            return
        for _ in ("copy", "seal"):
            self.background.wait()
            self.heed(*self.all_sum(*self.votes()))

    def _raise_together(self) -> None:
        """Every rank raises the same error, so that the one that the user reads says why."""
        error = self.background.error
        own = None if error is None else (getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}")
        words: list[tuple[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(words, own)
        code, word = max(filter(None, words))
        raise (InputError if code == EXIT_BAD_INPUT else TunesmithError)(
            f"a checkpoint could not be copied from {self.config.local_dir} to {self.checkpoints}: {word} "
            "The newest complete one is untouched; the same command goes on from it."
        )


def local_folder(local_dir: Path, checkpoints: Path, rank: int) -> Path:
    """Where a rank writes first. Runs and nodes do not meet there, even if `local_dir` turns out to be shared."""
    owner = f"{checkpoints.resolve()} {socket.gethostname()}"
    return local_dir / f"tunesmith-{hashlib.sha256(owner.encode()).hexdigest()[:12]}" / f"rank-{rank}"


def write_parts(engine: DeepSpeedEngine, place: Path, state: TrainState) -> None:
    """Write this rank's part of a checkpoint to a folder that exists. A collective.

    Frozen weights are left out: they are those of the base model, which is read anew on every start.
    """
    engine.save_checkpoint(
        str(place.parent), tag=place.name, client_state=CLIENT_STATE, save_latest=False,
        exclude_frozen_parameters=has_frozen(engine),
    )  # fmt: skip
    save_file(_rng_state(), place / f"rng-rank{dist.get_rank()}.safetensors")
    save_weights(engine.module.lm, place / "weights", max_shard_size="4GB")
    if dist.get_rank() == 0:
        write_json(place / "state.json", asdict(state))


def drop_frozen_duplicates(module: torch.nn.Module, state_dict: dict, prefix: str, _: dict) -> None:
    """Leave out second names of frozen weights, such as a tied head: DeepSpeed excludes them by their first alone."""
    first = {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in first and not parameter.requires_grad:
            state_dict.pop(prefix + name, None)


def has_frozen(engine: DeepSpeedEngine) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


def load(engine: DeepSpeedEngine, folder: Path, job: str, seed: int) -> TrainState:
    """Put weights, optimizer and random state back into `engine`, whatever number of ranks saved them. A collective.

    Raises InputError if the checkpoint is corrupt or belongs to another job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        verify_manifest(folder)
    dist.barrier()
    state = read_state(folder)
    if state.job_hash != job:
        raise InputError(
            f"{folder}: made by other data, model or settings than this recipe's. "
            "Choose another run folder with `--run-dir`, or restore the recipe."
        )
    # Without ZeRO every rank holds all of the state, and DeepSpeed loads it as it is.
    if state.world_size != world_size and engine.zero_optimization_stage() > 0:
        _load_universal(engine, folder)
    else:
        _load_deepspeed(engine, folder)
    if state.world_size == world_size:
        _set_rng_state(load_file(folder / f"rng-rank{rank}.safetensors"))
    else:
        torch.manual_seed(new_rank_seed(seed, state.step, rank))
    return state


def _load_deepspeed(engine: DeepSpeedEngine, folder: Path) -> None:
    # Not strict where weights are frozen, as those are not in it.
    loaded_from, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_module_strict=not has_frozen(engine)
    )
    if loaded_from is None:
        raise TunesmithError(f"{folder}: DeepSpeed could not load this checkpoint; its message is above.")


def _load_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    if dist.get_rank() == 0:
        convert(folder)
    dist.barrier()
    # ZeRO-3 would give every group the settings of the first, and so decay norms and biases.
    own = [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]
    # Read by the engine when it loads; in the configuration from the start it would bar the other way of loading.
    engine._config.load_universal_checkpoint = True
    _load_deepspeed(engine, universal_folder(folder))
    engine._config.load_universal_checkpoint = False
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(settings)
    # ZeRO-3 also gives all groups one tensor that counts steps, and so each of them would count for all.
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])


def new_rank_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank that goes on at `step` with another number of ranks, for whom no random state was saved."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
