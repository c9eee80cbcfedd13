"""What the stages of this package left in a run folder, read without loading torch."""

from pathlib import Path

from cluster.files import sha256_json
from cluster.run.rundir import RunDir
from trainer.checkpoint.state import newest, read_state
from trainer.config.after import ExportConfig


def is_trained(run: RunDir) -> bool:
    """True if the newest checkpoint is the last one of its job."""
    last = newest(run.checkpoints)
    return last is not None and read_state(last).finished


def read_failure(run: RunDir) -> str | None:
    """What the ranks gave as the reason of their failure, if they could."""
    result = run.read_result("train")
    return result["message"] if result and result["status"] == "failed" else None


def export_key(source: Path, config: ExportConfig, name: str) -> str:
    """What tells an export of the checkpoint `source` from any other. Where it is uploaded to does not."""
    settings = config.model_dump(mode="json", exclude={"to", "hub_token"})
    return sha256_json([(source / "manifest.json").read_text(), settings, name])
