"""Whether a stage is done, and how far it is: by what lies in the run folder, never by an exit code.

Loads neither torch nor Ray: the jobs of a run ask the same questions as the command line.
"""

import json

from cluster.run.manifest import MANIFEST, is_sealed
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe
from trainer.checkpoint.state import best_checkpoints, is_trained, newest_checkpoint, read_state
from trainer.export_job import export_key


def is_done(stage: str, recipe: Recipe, run: RunDir) -> bool:
    """True if the result of the stage is there, whole, and made of what lies there now."""
    match stage:
        case "synthesize":
            return is_sealed(run.synthesized)
        case "train":
            return is_trained(run)
        case "export":
            return _is_exported(recipe, run)
        case _:  # the figures are of the export that is there
            is_evaluated = _has_result_done("evaluate", run) and _is_exported(recipe, run)
            return is_evaluated and run.result("evaluate").stat().st_mtime >= (run.export / MANIFEST).stat().st_mtime


def progress_of(stage: str, run: RunDir) -> float:
    """Steps in the newest checkpoint, bytes of finished requests, or number of evaluated models. Only for comparison
    with an earlier value of the same stage."""
    match stage:
        case "train":
            last = newest_checkpoint(run.checkpoints)
            return 0 if last is None else read_state(last).step
        case "synthesize":
            return sum(path.stat().st_size for path in run.requests.glob("*.log")) + is_sealed(run.synthesized)
        case "evaluate":
            return len(list(run.evaluation.glob("*.json"))) + _has_result_done(stage, run)
        case _:
            return float(is_sealed(run.export) and _has_result_done(stage, run))


def resume_point(stage: str, run: RunDir) -> str:
    """Where another attempt at a stage that is not done begins, for people."""
    if stage == "train":
        last = newest_checkpoint(run.checkpoints)
        return f"goes on from {last.name}" if last else "starts from the beginning, as no checkpoint is complete"
    if stage == "synthesize":
        return "goes on; finished requests are kept" if run.requests.is_dir() else "starts from the beginning"
    if stage == "evaluate":
        answers = len(list(run.evaluation.glob("*.json")))
        return f"goes on with the answers of {answers} models" if answers else "starts from the beginning"
    return "is done again"


def _is_exported(recipe: Recipe, run: RunDir) -> bool:
    """The export is of the checkpoint that the recipe wants, in the form that it wants, and where it wants it."""
    if not is_trained(run) or not is_sealed(run.export):
        return False
    source = newest_checkpoint(run.checkpoints)
    if recipe.export.checkpoint == "best":
        source = next(iter(best_checkpoints(run.checkpoints, recipe.train.checkpoint.best)), None)
    made = json.loads((run.export / MANIFEST).read_text())
    if source is None or made.get("key") != export_key(source, recipe.export, recipe.name):
        return False
    return _has_result_done("export", run) and (recipe.export.to is None or "uploaded_to" in run.read_result("export"))


def _has_result_done(stage: str, run: RunDir) -> bool:
    return (run.read_result(stage) or {}).get("status") == "done"
