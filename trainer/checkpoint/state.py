"""Where checkpoints lie, how far each one is, and which may go; read without loading torch or DeepSpeed."""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.run.manifest import is_sealed
from trainer.config.checkpoints import CheckpointConfig


@dataclass(frozen=True)
class TrainState:
    """What is needed to go on besides weights, optimizer and random state."""

    step: int  # optimizer steps done
    num_rows: int  # rows consumed, over all ranks
    num_tokens: int  # tokens consumed, over all ranks
    num_trained_tokens: int  # of them, tokens with a label
    world_size: int
    job: str  # hash of everything that shapes the training; a checkpoint of another job is refused
    finished: bool = False
    train_loss: float | None = None  # mean over the steps since the checkpoint before
    validation_loss: float | None = None  # None where nothing was validated at this step


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def complete(checkpoints: Path) -> list[Path]:
    """All complete checkpoints, the newest last."""
    return [folder for folder in sorted(checkpoints.glob("step_*")) if is_sealed(folder)]


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    return folders[-1] if (folders := complete(checkpoints)) else None


def best_first(checkpoints: Path, metric: str) -> list[Path]:
    """Complete checkpoints that have this loss, the lowest first, and of equal ones the newer."""
    losses = {folder: getattr(read_state(folder), metric) for folder in reversed(complete(checkpoints))}
    return sorted((folder for folder, loss in losses.items() if loss is not None), key=lambda folder: losses[folder])


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises InputError if its file is missing or corrupt."""
    file = folder / "state.json"
    try:
        return TrainState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: corrupt ({error}). Remove {folder}: the run goes on from the one before.") from error


def no_longer_kept(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Complete checkpoints neither among the newest nor among the best. Of equally good ones the newer stay."""
    folders = complete(checkpoints)
    kept = set(folders[-config.keep_last :])
    if config.keep_best:
        kept.update(best_first(checkpoints, config.best)[: config.keep_best])
    return [folder for folder in folders if folder not in kept]
