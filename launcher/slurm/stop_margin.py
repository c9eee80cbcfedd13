"""How long before its time limit a job is asked to save and stop."""

from cluster.errors import InputError
from cluster.files import read_last_jsonl
from cluster.run.manifest import MANIFEST
from cluster.run.rundir import RunDir
from launcher.slurm_config import JobConfig, seconds_of
from trainer.checkpoint.state import newest_checkpoint

SLURM_SECONDS = 60  # Slurm may send the signal as much too late
SAVE_SECONDS = 90  # assumed for a first checkpoint; 300 s in all with the other values
STEP_SECONDS = 60  # assumed for a first step
FLUSH_SECONDS = 30  # other stages write as they go, or start from the beginning
LAST_STEPS = 100


def stop_margin_seconds(run: RunDir, stage: str) -> int:
    """Seconds from the signal to the time limit. For training: twice the time to save, the longest of the last steps,
    and the inaccuracy of Slurm.

    Saving and steps are timed by what an earlier attempt left. Without an earlier attempt they are assumed.
    """
    if stage != "train":
        return FLUSH_SECONDS + SLURM_SECONDS
    saving, step = last_save_seconds(run), longest_step_seconds(run)
    saving = SAVE_SECONDS if saving is None else saving
    step = STEP_SECONDS if step is None else step
    return round(2 * saving + step) + SLURM_SECONDS


def last_save_seconds(run: RunDir) -> float | None:
    """From the first to the last file of the newest checkpoint. The manifest is written last."""
    folder = newest_checkpoint(run.checkpoints)
    if folder is None:
        return None
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return max(0.0, (folder / MANIFEST).stat().st_mtime - min(times))


def longest_step_seconds(run: RunDir) -> float | None:
    seconds = [row["seconds"] for row in read_last_jsonl(run.metrics) if row.get("stage") == "train" and "step" in row]
    return max(seconds[-LAST_STEPS:], default=None)


def check_time(stage: str, config: JobConfig, stop_margin: int) -> None:
    """Raise InputError if a job with this time limit would be asked to stop as soon as it starts."""
    if config.time is not None and seconds_of(config.time) <= stop_margin:
        raise InputError(
            f"slurm.time={config.time} of {stage} is {seconds_of(config.time)} s, and the job is asked to save and "
            f"stop {stop_margin} s before its end. Give it more."
        )
