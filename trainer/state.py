"""Where checkpoints lie and how far each one is; read without loading torch or DeepSpeed."""

import json
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.manifest import is_sealed


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


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = [folder for folder in sorted(checkpoints.glob("step_*")) if is_sealed(folder)]
    return complete[-1] if complete else None


def read_state(folder: Path) -> TrainState:
    """The state of a checkpoint. Raises InputError if its file is missing or corrupt."""
    file = folder / "state.json"
    try:
        return TrainState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{file}: corrupt ({error}). Remove {folder}: the run goes on from the one before.") from error
