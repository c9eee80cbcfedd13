"""Which checkpoints a run has, how far each one is, and which may be removed. Loads neither torch nor DeepSpeed."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import InputError
from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir
from trainer.config.train import CheckpointConfig


@dataclass(frozen=True)
class TrainState:
    """What a resumed training needs besides weights, optimizer and random state. Counts are over all ranks."""

    step: int  # optimizer steps done
    num_rows: int
    num_tokens: int
    num_trained_tokens: int  # tokens with a label
    world_size: int
    job: dict[str, object]  # everything that shapes the training; the checkpoint of another job is refused
    finished: bool = False
    train_loss: float | None = None  # mean over the steps since the previous checkpoint
    validation_loss: float | None = None  # None means that this step was not validated

    @classmethod
    def first(cls, world_size: int, job: dict[str, object]) -> "TrainState":
        """The state before the first step."""
        return cls(0, 0, 0, 0, world_size, job)

    def after_step(self, num_rows: int, num_tokens: int, num_trained_tokens: int, num_steps: int) -> "TrainState":
        """The state after one more step, whose own counts are given. `num_steps`: the steps of the whole training."""
        return replace(
            self,
            step=self.step + 1,
            num_rows=self.num_rows + num_rows,
            num_tokens=self.num_tokens + num_tokens,
            num_trained_tokens=self.num_trained_tokens + num_trained_tokens,
            finished=self.step + 1 == num_steps,
            train_loss=None,
            validation_loss=None,
        )


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return [folder for folder in sorted(checkpoints.glob("step_*")) if is_sealed(folder)]


def newest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint. None means that there is none."""
    return folders[-1] if (folders := complete_checkpoints(checkpoints)) else None


def best_checkpoints(checkpoints: Path, metric: str) -> list[Path]:
    """Complete checkpoints that have this loss, lowest first. Of equal losses the newer checkpoint comes first."""
    losses = {folder: getattr(read_state(folder), metric) for folder in reversed(complete_checkpoints(checkpoints))}
    return sorted((folder for folder, loss in losses.items() if loss is not None), key=lambda folder: losses[folder])


def expired_checkpoints(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Complete checkpoints that are neither among the newest nor among the best ones that `config` keeps."""
    folders = complete_checkpoints(checkpoints)
    kept = set(folders[-config.keep_last :])
    if config.keep_best:
        kept.update(best_checkpoints(checkpoints, config.best)[: config.keep_best])
    return [folder for folder in folders if folder not in kept]


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises InputError if its file is missing or corrupt."""
    file = folder / "state.json"
    try:
        return TrainState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file}: corrupt ({error}). Remove {folder}: the run then resumes from the previous checkpoint."
        ) from error


def is_trained(run: RunDir) -> bool:
    """True if the newest checkpoint is the last one of its job."""
    newest = newest_checkpoint(run.checkpoints)
    return newest is not None and read_state(newest).finished
