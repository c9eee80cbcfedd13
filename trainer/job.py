"""What a training process reads from its run folder. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.config import ModelConfig, flatten
from cluster.errors import InputError
from cluster.model_source import locate_model, model_revision
from cluster.run.rundir import RunDir
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig


@dataclass(frozen=True)
class TrainJob:
    """One training: the sections of the resolved recipe that the ranks need, and the run folder."""

    run: RunDir
    model: ModelConfig
    config: TrainConfig
    seed: int

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return self.config.data or (DataSource(path=str(self.run.synthesized)),)

    def identity(self, tokens_hash: str) -> dict[str, object]:
        """Everything that shapes the result, by dotted key. The number of ranks, and when to save or validate, do not.

        `tokens_hash`: the hash of the encoded data.
        """
        settings = self.config.model_dump(mode="json", exclude=set(TrainConfig.MAY_CHANGE_ON_RESUME))
        held_out = self.config.validation.fraction if self.config.validation else None
        return flatten({"train": settings}) | {
            "train.data": [[source.epochs, source.weight] for source in self.sources],
            "train.validation.fraction": held_out,
            "model": model_revision(self.model),
            "the encoded examples": tokens_hash,
            "seed": self.seed,
        }


def read_job(run_dir: Path) -> TrainJob:
    """Read `<run_dir>/recipe.yaml`, the resolved recipe. Raises InputError if the file does not exist."""
    run = RunDir(run_dir)
    if not run.recipe.is_file():
        raise InputError(f"{run.recipe} does not exist. Start with `tunesmith train RECIPE`, which writes it.")
    recipe = yaml.safe_load(run.recipe.read_text())
    return TrainJob(run, locate_model(ModelConfig(**recipe["model"])), TrainConfig(**recipe["train"]), recipe["seed"])
