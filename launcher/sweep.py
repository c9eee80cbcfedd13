"""A sweep: one run, with a folder of its own, for each combination of the values in a recipe's `sweep:`.

<run>/sweep.json names them with their values; <run>/sweep/<name>/ is the run folder of one.
"""

import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InputError
from cluster.files import write_json
from cluster.run.rundir import RunDir
from launcher.recipe import Recipe, load

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._]+")


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    name: str
    values: dict[str, object]
    recipe: Recipe


def members_of(path: Path, overrides: list[str], recipe: Recipe) -> list[Member]:
    """The runs of a sweep. Empty if the recipe is not one. Raises InputError naming the run that is not valid."""
    if not recipe.sweep:
        return []
    keys, members = list(recipe.sweep), []
    for number, values in enumerate(itertools.product(*recipe.sweep.values()), 1):
        name = member_name(number, dict(zip(keys, values, strict=True)))
        settings = [f"{key}={json.dumps(value)}" for key, value in zip(keys, values, strict=True)]
        try:
            member = load(path, [*overrides, *settings])
        except InputError as error:
            raise InputError(f"run {name} of the sweep: {error}") from error
        changes = {"name": f"{recipe.name}-{name}", "run_dir": recipe.run.sweep / name, "sweep": {}}
        members.append(Member(name, dict(zip(keys, values, strict=True)), member.model_copy(update=changes)))
    return members


def member_name(number: int, values: dict[str, object]) -> str:
    """`003_learning_rate-0.001_rank-8`. The number keeps names apart that would otherwise be the same."""
    parts = [f"{key.rpartition('.')[2]}-{_NOT_IN_NAMES.sub('-', str(value))}" for key, value in values.items()]
    return f"{number:03d}_{'_'.join(parts)}"[:100]


def save_index(sweep: RunDir, members: list[Member]) -> None:
    """Write the list of the sweep's runs. Raises InputError if the folder holds a single run or another sweep."""
    file = sweep.create().sweep_index
    index = {"runs": [{"name": member.name, "values": member.values} for member in members]}
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
