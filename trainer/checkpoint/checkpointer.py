"""Checkpoints that are whole or absent, and loading the newest one.

checkpoints/step_000200/            renamed into place when complete
    mp_rank_*, zero_*               DeepSpeed: trained weights, optimizer; pickles, loaded only if the manifest holds
    rng-rank0.safetensors ...       random state of every rank
    weights/                        the weights (or adapter) in Hugging Face form, which export reads
    state.json                      step, counts, losses, world size
    manifest.json                   size and SHA-256 of all the above, written last
"""

import copy
import hashlib
import shutil
import socket
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
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
    commit_checkpoint,
    explain_failed_write,
    move_files,
    partial_folder,
    remove_unfinished,
)
from trainer.checkpoint.state import TrainState, read_state
from trainer.checkpoint.universal import CLIENT_STATE, convert, universal_folder
from trainer.checkpoint.weights import save_weights
from trainer.config.train import CheckpointConfig
from trainer.monitoring import Diverged, Watchdog


class Checkpointer:
    """Saves the checkpoints of one training. All methods but `copy_flags` are collectives: every rank calls them.

    With `local_dir` every rank writes its part to its node's own disk, and a thread copies it to the run folder. Once
    the ranks have agreed, before a step, that all parts are there, rank 0 commits the checkpoint, in a thread as well.
    """

    def __init__(
        self, engine: DeepSpeedEngine, checkpoints: Path, config: CheckpointConfig,
        all_sum: Callable[..., list[float]], watchdog: Watchdog,
    ):  # fmt: skip
        self.engine, self.checkpoints, self.config = engine, checkpoints, config
        self.all_sum, self.watchdog = all_sum, watchdog
        self.rank = dist.get_rank()
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self.task: Future = Future()  # what the thread does, or did last
        self.task.set_result(None)
        self.copied_step: int | None = None  # of the checkpoint that is being copied
        self.local = local_folder(Path(config.local_dir), checkpoints, self.rank) if config.local_dir else None
        engine.module.register_state_dict_post_hook(drop_frozen_duplicates)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Complete the pending checkpoint. After an error this is possible only if every rank has raised it."""
        if kind is None or issubclass(kind, Diverged):
            self.finish()
            if self.local:
                shutil.rmtree(self.local, ignore_errors=True)  # DeepSpeed leaves its own scripts there

    def maybe_save(self, state: TrainState, take_mean_loss: Callable[[], float | None], is_last: bool = False) -> None:
        """Save if a checkpoint is due after this step, or if `is_last` and the step is not saved yet.

        `take_mean_loss` returns the mean loss since the last call. It waits for the GPU, so it is called only to save.
        """
        if not (is_last or state.finished or state.step % self.config.every_steps == 0):
            return
        self.watchdog.set_location(f"step {state.step}, saving")
        train_loss = take_mean_loss()
        if train_loss is not None:  # None means no step since the last save
            self.save(replace(state, train_loss=train_loss))

    def save(self, state: TrainState) -> None:
        """Save a checkpoint. With `local_dir` this returns when the previous one is complete and this one is local.

        Raises InputError if the disk is full. What was written of this checkpoint is then removed.
        """
        self.finish()
        partial = partial_folder(self.checkpoints, state.step)
        target = self.local / partial.name if self.local else partial
        try:
            with explain_failed_write(self.local or self.checkpoints.parent):
                if self.rank == 0:
                    verify(self.checkpoints.parent)
                    remove_unfinished(self.checkpoints)
                    partial.mkdir(parents=True)
                if self.local:
                    shutil.rmtree(self.local, ignore_errors=True)
                    target.mkdir(parents=True)
                dist.barrier()
                write_parts(self.engine, target, state)
                dist.barrier()
            if self.rank == 0 and not self.local:
                commit_checkpoint(self.checkpoints, state.step, self.config)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if self.local:
            self.task = self.thread.submit(move_files, target, partial)
            self.copied_step = state.step
        dist.barrier()

    def copy_flags(self) -> tuple[int, int]:
        """(1 if this rank's background task has failed, 1 if it is done). The sums over all ranks go to `advance`."""
        is_done = self.task.done()
        return int(is_done and self.task.exception() is not None), int(is_done)

    def advance(self, num_failed: float, num_done: float) -> None:
        """Commit a checkpoint that all ranks have copied. Raises, on every rank, if any rank has failed."""
        if num_failed:
            self._raise_together()
        if self.copied_step is not None and num_done == dist.get_world_size():
            if self.rank == 0:
                self.task = self.thread.submit(commit_checkpoint, self.checkpoints, self.copied_step, self.config)
            self.copied_step = None

    def finish(self) -> None:
        """Wait until the pending checkpoint is complete. Raises, on every rank, if that failed on any."""
        if self.local is None:
            return
        for _ in ("copy", "commit"):
            self.task.exception()  # waits
            self.advance(*self.all_sum(*self.copy_flags()))

    def _raise_together(self) -> None:
        """Raise the same error on every rank, so that whichever one the user reads has the reason."""
        error = self.task.exception() if self.task.done() else None
        own = None if error is None else (getattr(error, "exit_code", 1), f"{type(error).__name__}: {error}")
        failures: list[tuple[int, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, own)
        exit_code, message = max(filter(None, failures))
        raise (InputError if exit_code == EXIT_BAD_INPUT else TunesmithError)(
            f"a checkpoint could not be copied from {self.config.local_dir} to {self.checkpoints}: {message} "
            "The newest complete checkpoint is intact, and the same command resumes from it."
        )


def local_folder(local_dir: Path, checkpoints: Path, rank: int) -> Path:
    """Where a rank writes first. Every run and node has its own folder, even if `local_dir` is a shared disk."""
    owner = f"{checkpoints.resolve()} {socket.gethostname()}"
    return local_dir / f"tunesmith-{hashlib.sha256(owner.encode()).hexdigest()[:12]}" / f"rank-{rank}"


def write_parts(engine: DeepSpeedEngine, folder: Path, state: TrainState) -> None:
    """Write this rank's part of a checkpoint to a folder that exists. A collective.

    Frozen weights are left out, because every start reads them from the base model.
    """
    engine.save_checkpoint(
        str(folder.parent), tag=folder.name, client_state=CLIENT_STATE, save_latest=False,
        exclude_frozen_parameters=has_frozen(engine),
    )  # fmt: skip
    save_file(_rng_state(), folder / f"rng-rank{dist.get_rank()}.safetensors")
    save_weights(engine.module.lm, folder / "weights", max_shard_size="4GB")
    if dist.get_rank() == 0:
        write_json(folder / "state.json", asdict(state))


def drop_frozen_duplicates(module: torch.nn.Module, state_dict: dict, prefix: str, _: dict) -> None:
    """Leave out second names of frozen weights, such as a tied head: DeepSpeed excludes only their first names."""
    first = {name for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name not in first and not parameter.requires_grad:
            state_dict.pop(prefix + name, None)


def has_frozen(engine: DeepSpeedEngine) -> bool:
    return any(not parameter.requires_grad for parameter in engine.module.parameters())


def load_checkpoint(engine: DeepSpeedEngine, folder: Path, job: dict[str, object], seed: int) -> TrainState:
    """Load weights, optimizer and random state into `engine`, whatever number of ranks saved them. A collective.

    Raises InputError if the checkpoint is corrupt or belongs to another job.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        verify_manifest(folder)
    dist.barrier()
    state = read_state(folder)
    if differing := sorted(key for key in state.job.keys() | job.keys() if state.job.get(key) != job.get(key)):
        listed = ", ".join(f"{key} (was {state.job.get(key)}, now {job.get(key)})" for key in differing[:5])
        raise InputError(
            f"{folder}: saved by another job than this recipe's: {listed}. "
            "Choose another run folder with `--run-dir`, or restore what it was."
        )
    # Without ZeRO every rank holds the whole state, so any number of ranks can load it.
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
    # Not strict if weights are frozen, because the checkpoint does not have them.
    loaded_from, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_module_strict=not has_frozen(engine)
    )
    if loaded_from is None:
        raise TunesmithError(f"{folder}: DeepSpeed could not load this checkpoint; its message is above.")


def _load_universal(engine: DeepSpeedEngine, folder: Path) -> None:
    if dist.get_rank() == 0:
        convert(folder)
    dist.barrier()
    # ZeRO-3 gives every group the settings of the first one, which would decay norms and biases.
    own = [{key: value for key, value in g.items() if key != "params"} for g in engine.optimizer.param_groups]
    # The engine reads this flag when it loads. Set from the start, it would forbid to load an ordinary checkpoint.
    engine._config.load_universal_checkpoint = True
    _load_deepspeed(engine, universal_folder(folder))
    engine._config.load_universal_checkpoint = False
    for group, settings in zip(engine.optimizer.param_groups, own, strict=True):
        group.update(settings)
    # ZeRO-3 also gives all groups the same step counter, which every group would then increment.
    for state in engine.optimizer.optimizer.state.values():
        state["step"] = copy.deepcopy(state["step"])


def new_rank_seed(seed: int, step: int, rank: int) -> int:
    """Seed of a rank that resumes at `step` with another number of ranks, for which no random state was saved."""
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
