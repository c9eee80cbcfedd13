"""What a training process reads from its run folder, and the answer it leaves there."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import sha256_json
from cluster.model_source import locate_model, model_revision
from cluster.run.rundir import RunDir
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig


@dataclass(frozen=True)
class TrainJob:
    run: RunDir
    model: ModelConfig
    config: TrainConfig
    seed: int

    @property
    def sources(self) -> tuple[DataSource, ...]:
        return self.config.data or (DataSource(path=str(self.run.synthesized)),)

    def fingerprint(self, tokens_key: str) -> str:
        """Hash of all that shapes the result. When to save or validate and how many ranks there are does not."""
        settings = self.config.model_dump(mode="json", exclude=set(TrainConfig.NOT_DECIDING))
        shares = [[source.epochs, source.weight] for source in self.sources]
        held_out = self.config.validation.fraction if self.config.validation else None
        return sha256_json([settings, shares, held_out, model_revision(self.model), tokens_key, self.seed])


def read_job(run_dir: Path) -> TrainJob:
    """Read `<run_dir>/recipe.yaml`, the resolved recipe."""
    run = RunDir(run_dir)
    if not run.recipe.is_file():
        raise InputError(f"{run.recipe} does not exist. Start with `tunesmith train RECIPE`, which writes it.")
    recipe = yaml.safe_load(run.recipe.read_text())
    return TrainJob(run, locate_model(ModelConfig(**recipe["model"])), TrainConfig(**recipe["train"]), recipe["seed"])
