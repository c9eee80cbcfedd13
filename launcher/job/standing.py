"""How far a stage of a run is, by what it has left on the disk. Loads neither torch nor Ray.

Output proves that a stage is done, an exit code never does; `progress` only ever has to be compared with itself. What
lies there may have been made from other settings than the recipe's: done.py asks for that too.
"""

from pathlib import Path

from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir
from trainer.checkpoint.state import is_trained, newest_checkpoint, read_state

PROVEN_BY_OUTPUT = ("synthesize", "train")  # the result of the others may be of an earlier time


def has_output(stage: str, run: RunDir) -> bool:
    """True if the output of the stage is there, whole."""
    match stage:
        case "synthesize":
            return is_sealed(run.synthesized)
        case "train":
            return is_trained(run)
        case "export":
            return is_sealed(run.export) and _says_done(stage, run)
        case _:
            return _says_done(stage, run)


def progress_of(stage: str, run: RunDir) -> float:
    """Steps in the newest checkpoint, bytes of finished requests, answers that are there: more is further."""
    match stage:
        case "train":
            last = newest_checkpoint(run.checkpoints)
            return 0 if last is None else read_state(last).step
        case "synthesize":
            return _bytes_of(run.requests, "*.log") + has_output(stage, run)
        case "evaluate":
            return len(list(run.evaluation.glob("*.json"))) + has_output(stage, run)
        case _:
            return float(has_output(stage, run))


def _says_done(stage: str, run: RunDir) -> bool:
    result = run.read_result(stage)
    return result is not None and result.get("status") == "done"


def _bytes_of(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))
