"""Whether a stage is done, told by what it left and not by how its process ended."""

import json

from cluster.run.manifest import MANIFEST, is_sealed
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe
from trainer.checkpoint.state import best_checkpoints, is_trained, newest_checkpoint
from trainer.job import export_key


def is_done(stage: str, recipe: Recipe, run: RunDir) -> bool:
    """True if the result of the stage is there, whole, and made of what lies there now."""
    return _CHECKS[stage](recipe, run)


def what_again(stage: str, run: RunDir) -> str:
    """What another attempt at a stage that is not done begins with."""
    if stage == "train":
        last = newest_checkpoint(run.checkpoints)
        return f"goes on from {last.name}" if last else "begins anew, as no checkpoint is complete"
    if stage == "synthesize":
        return "goes on; finished requests are not made again" if run.requests.is_dir() else "begins anew"
    if stage == "evaluate":
        answers = len(list(run.evaluation.glob("*.json")))
        return f"goes on with the answers of {answers} models" if answers else "begins anew"
    return "is done again"


def _is_synthesized(recipe: Recipe, run: RunDir) -> bool:
    return is_sealed(run.synthesized)


def _is_trained(recipe: Recipe, run: RunDir) -> bool:
    return is_trained(run)


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
    result = run.read_result("export") or {}
    return result.get("status") == "done" and (recipe.export.to is None or "uploaded_to" in result)


def _is_evaluated(recipe: Recipe, run: RunDir) -> bool:
    """There are figures, of the export that is there."""
    result = run.read_result("evaluate") or {}
    if result.get("status") != "done" or not _is_exported(recipe, run):
        return False
    return run.result("evaluate").stat().st_mtime >= (run.export / MANIFEST).stat().st_mtime


_CHECKS = {"synthesize": _is_synthesized, "train": _is_trained, "export": _is_exported, "evaluate": _is_evaluated}
