"""What an export is made of, and what tells whether one that exists is still right. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from cluster.config import ModelConfig
from cluster.errors import InputError
from cluster.files import sha256_json
from cluster.log import stage_logger
from cluster.run.rundir import RunDir
from trainer.checkpoint.state import best_checkpoints, newest_checkpoint, read_state
from trainer.config.export import ExportConfig
from trainer.config.train import TrainConfig

log = stage_logger("export")


@dataclass(frozen=True)
class ExportJob:
    run: RunDir
    name: str
    model: ModelConfig
    train: TrainConfig
    config: ExportConfig


def choose_checkpoint(job: ExportJob) -> Path:
    """The checkpoint that the recipe selects. Raises InputError if there is none."""
    source = newest_checkpoint(job.run.checkpoints)
    if source is None:
        raise InputError(f"{job.run.checkpoints}: there is no complete checkpoint. Run `tunesmith train` first.")
    if job.config.checkpoint == "newest":
        return source
    metric = job.train.checkpoint.best
    if not (folders := best_checkpoints(job.run.checkpoints, metric)):
        raise InputError(
            f"{job.run.checkpoints}: no checkpoint has a {metric}, so there is no best one. Set "
            "export.checkpoint=newest, or train with train.validation or with train.checkpoint.best=train_loss."
        )
    log.info(f"{folders[0]} has the lowest {metric}: {getattr(read_state(folders[0]), metric):.4f}")
    return folders[0]


def export_key(source: Path, config: ExportConfig, name: str) -> str:
    """Hash of everything that shapes an export of the checkpoint `source`. Where it is uploaded to does not."""
    settings = config.model_dump(mode="json", exclude={"to", "hub_token"})
    return sha256_json([(source / "manifest.json").read_text(), settings, name])
