"""What a training process reads from its run folder, and the answer it leaves there."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import sha256_json
from cluster.model_source import locate_model, model_revision
from cluster.rundir import RunDir
from trainer.config import TrainConfig

SYNTHESIZED = "synthesized"  # the dataset of the run itself, below `data/`


@dataclass(frozen=True)
class TrainJob:
    run: RunDir
    model: ModelConfig
    config: TrainConfig
    seed: int

    @property
    def data_paths(self) -> list[Path]:
        return [Path(path) for path in self.config.data] or [self.run.data / SYNTHESIZED]

    def fingerprint(self, tokens_key: str) -> str:
        """Hash of all that shapes the result. How often to save and how long to wait for ranks are not part of it."""
        settings = self.config.model_dump(mode="json", exclude={"checkpoint", "data", "process_group_timeout_seconds"})
        return sha256_json([settings, model_revision(self.model), tokens_key, self.seed])


def read_job(run_dir: Path) -> TrainJob:
    """Read `<run_dir>/recipe.yaml`, the resolved recipe."""
    run = RunDir(run_dir)
    if not run.recipe.is_file():
        raise InputError(f"{run.recipe} does not exist. Start with `tunesmith train RECIPE`, which writes it.")
    recipe = yaml.safe_load(run.recipe.read_text())
    return TrainJob(run, locate_model(ModelConfig(**recipe["model"])), TrainConfig(**recipe["train"]), recipe["seed"])
