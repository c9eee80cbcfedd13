"""A sweep: one run, with a folder of its own, for each combination of the values in a recipe's `sweep:`.

<run>/sweep.json names them with their values; <run>/sweep/<name>/ is the run folder of one.
"""

import itertools
import json
import re
from pathlib import Path

from cluster.errors import InputError
from cluster.files import write_json
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe, load

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


def members_of(path: Path, overrides: list[str], recipe: Recipe) -> list[tuple[dict[str, object], Recipe]]:
    """(values, recipe) of each run of a sweep. A recipe that is none is its own only run.

    Raises InputError naming the run that is not valid.
    """
    if not recipe.sweep:
        return [({}, recipe)]
    members = []
    for number, combination in enumerate(itertools.product(*recipe.sweep.values()), 1):
        values = dict(zip(recipe.sweep, combination, strict=True))
        name = member_name(number, values)
        try:
            member = load(path, [*overrides, *(f"{key}={json.dumps(value)}" for key, value in values.items())])
        except InputError as error:
            raise InputError(f"run {name} of the sweep: {error}") from error
        changes = {"name": f"{recipe.name}-{name}", "run_dir": recipe.run.sweep / name, "sweep": {}}
        members.append((values, member.model_copy(update=changes)))
    return members


def member_name(number: int, values: dict[str, object]) -> str:
    """`003_learning_rate-0.001_rank-8`. The number keeps names apart that would otherwise be the same."""
    parts = [f"{key.rpartition('.')[2]}-{_NOT_IN_NAMES.sub('-', str(value))}" for key, value in values.items()]
    return f"{number:03d}_{'_'.join(parts)}"[:100]


def save_index(sweep: RunDir, members: list[tuple[dict[str, object], Recipe]]) -> None:
    """Write the list of the sweep's runs. Raises InputError if the folder holds a single run or another sweep."""
    file = sweep.create().sweep_index
    index = {"runs": [{"name": recipe.run_dir.name, "values": values} for values, recipe in members]}
    if sweep.recipe.exists():
        raise InputError(
            f"{sweep.root} holds a single run. Choose another folder with `--run-dir`, or remove this one."
        )
    if file.is_file() and json.loads(file.read_text()) != json.loads(json.dumps(index)):
        raise InputError(
            f"{sweep.root} holds another sweep. Choose another folder with `--run-dir`, or remove this one."
        )
    write_json(file, index)


def folders_of(root: Path) -> list[Path]:
    """The folders of a sweep's runs that were started. For a single run, its own folder."""
    members = read_index(root)
    return [folder for folder, _ in members if RunDir(folder).recipe.is_file()] if members else [root]


def read_index(root: Path) -> list[tuple[Path, dict[str, object]]]:
    """(run folder, values) of each run of the sweep in `root`. Empty if it is not a sweep's folder."""
    sweep = RunDir(root)
    if not sweep.sweep_index.is_file():
        return []
    runs = json.loads(sweep.sweep_index.read_text())["runs"]
    return [(sweep.sweep / run["name"], run["values"]) for run in runs]
