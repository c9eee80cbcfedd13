"""Values that change when a run is resumed."""

from collections.abc import Collection

from cluster.errors import InputError
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe, load

_NEVER = ("run_dir", "sweep")


def changed_recipe(recipe: Recipe, run: RunDir, overrides: list[str], swept: Collection[str] = ()) -> Recipe:
    """The recipe of a run with overrides. Changes nothing on the disk.

    Raises InputError naming the keys that results in the run folder depend on, or that say where the run is and which
    run of its sweep. `swept` are the keys of its sweep.
    """
    if not overrides:
        return recipe
    for key in (override.partition("=")[0].strip() for override in overrides):
        fixed = next(
            (each for each in (*_NEVER, *swept) if f"{key}.".startswith(f"{each}.") or each.startswith(f"{key}.")), None
        )
        if fixed is not None:
            raise InputError(
                f"command line: {key}: {fixed} cannot change on resume. Start another run with `tunesmith run`."
            )
    changed = load(run.recipe, overrides).model_copy(update={"run_dir": run.root})
    changed.check_run_folder(run)
    return changed
