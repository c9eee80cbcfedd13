"""A sweep is one run for each combination of values, each in a folder of its own."""

from pathlib import Path

import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from cluster.errors import InputError
from cluster.files import write_json
from cluster.run.rundir import RunDir
from launcher.cli import app
from launcher.print_status import print_runs
from launcher.recipe import Recipe, load
from launcher.status import find_runs, read_statuses
from launcher.sweep import folders_of, members_of, read_index, save_index
from tests.launcher.slurm_chain import FakeSlurm

VALUES = {"name": "tiny", "model": {"path": "some/model"}, "train": {"data": ["rows.jsonl"], "precision": "fp32"}}
SWEEP = {"train": {"learning_rate": ["1e-3", 0.01]}, "train.lora.rank": [4, 8]}


def write(folder: Path, **sections: object) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(VALUES | {"run_dir": str(folder / "run")} | sections))
    return folder / "recipe.yaml"


def members(path: Path, *overrides: str):
    return members_of(path, list(overrides), load(path, list(overrides)))


def test_every_combination_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs = members(write(tmp_path, sweep=SWEEP), "train.tuning=lora", "seed=3")
    assert [recipe.run_dir.name for _, recipe in runs] == [
        "001_learning_rate-1e-3_rank-4", "002_learning_rate-1e-3_rank-8", "003_learning_rate-0.01_rank-4",
        "004_learning_rate-0.01_rank-8",
    ]  # fmt: skip
    settings = [(recipe.train.learning_rate, recipe.train.lora.rank, recipe.seed) for _, recipe in runs]
    assert settings == [(0.001, 4, 3), (0.001, 8, 3), (0.01, 4, 3), (0.01, 8, 3)]
    _, first = runs[0]
    assert first.run_dir.parent == tmp_path / "run" / "sweep" and first.sweep == {}
    again = Recipe(**yaml.safe_load(yaml.safe_dump(first.model_dump(mode="json"))))
    assert again.name == "tiny-001_learning_rate-1e-3_rank-4"


def test_a_recipe_without_a_sweep_is_its_only_run(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert members(path) == [({}, load(path, []))]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({"train.learning_rate": []}, "train.learning_rate needs at least one value"),
        ({"train.learning_rate": [1, 1]}, "no value twice"),
        ({"run_dir": ["a", "b"]}, "run_dir is set by the sweep itself"),
        ({"train.learning_rate": 3}, "valid tuple"),
    ],
)
def test_a_sweep_that_makes_no_runs_is_refused(tmp_path: Path, sweep: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(write(tmp_path, sweep=sweep), [])


def test_an_invalid_value_is_reported_with_its_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"run 002_learning_rate-fast of the sweep: .*learning_rate: Input should"):
        members(write(tmp_path, sweep={"train.learning_rate": [0.1, "fast"]}))


def test_one_stage_of_a_sweep_is_refused(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, sweep=SWEEP), [])
    with pytest.raises(InputError, match=r"tiny is a sweep over train.learning_rate, train.lora.rank"):
        recipe.save(recipe.run.create())


def test_the_folder_remembers_its_runs_and_refuses_others(tmp_path: Path) -> None:
    runs = members(write(tmp_path, sweep=SWEEP))
    save_index(RunDir(tmp_path / "run"), runs)
    save_index(RunDir(tmp_path / "run"), runs)
    assert [values for _, values in read_index(tmp_path / "run")] == [values for values, _ in runs]
    with pytest.raises(InputError, match="holds another sweep"):
        save_index(RunDir(tmp_path / "run"), runs[:2])
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(InputError, match="holds a single run"):
        save_index(RunDir(tmp_path / "single"), runs)


def test_one_table_has_the_values_the_states_and_what_came_of_them(tmp_path: Path) -> None:
    runs = members(write(tmp_path, sweep={"train.learning_rate": [0.1, 0.2]}))
    save_index(RunDir(tmp_path / "run"), runs)
    recipes = [recipe for _, recipe in runs]
    for recipe in recipes:
        recipe.save(recipe.run.create())
    write_json(recipes[1].run.result("train"), {"status": "failed", "message": "no", "validation_loss": 1.25})
    group = {"num_rows": 4, "exact_match": 0.5, "rouge_l": 0.1}
    figures = {"models": {"tuned": {"a": group, "b": group | {"exact_match": 1.0, "num_rows": 12}}}}
    write_json(recipes[1].run.result("evaluate"), {"status": "done", **figures})
    found = find_runs(tmp_path)
    assert [place for place, _ in found] == folders_of(tmp_path / "run") == [recipe.run_dir for recipe in recipes]
    console = Console(width=200, record=True)
    print_runs(
        list(zip(read_statuses([p for p, _ in found], FakeSlurm()), (v for _, v in found), strict=True)), console
    )
    rows = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in console.export_text().splitlines()]
    assert ["001_learning_rate-0.1", "0.1", "NOT STARTED", "train", "-", "", ""] in rows
    assert ["002_learning_rate-0.2", "0.2", "FAILED", "train", "-", "1.2500", "87.5%"] in rows


def test_each_run_of_a_sweep_is_a_chain_and_the_folder_stands_for_all(tmp_path: Path, monkeypatch) -> None:
    slurm = FakeSlurm()
    monkeypatch.setattr("launcher.slurm.client.Slurm", lambda: slurm)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n')
    train = VALUES["train"] | {"data": [str(tmp_path / "rows.jsonl")]}
    recipe, run = write(tmp_path, train=train, sweep={"train.learning_rate": [0.1, 0.2]}), tmp_path / "run"

    def tunesmith(*arguments: str) -> str:
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 0, done.output + str(done.exception)
        return done.output

    assert "sbatch --parsable --hold --job-name=tiny-002_learning_rate-0.2-train" in tunesmith(
        "plan", str(recipe), "--on", "slurm"
    )
    output = tunesmith("run", str(recipe), "--on", "slurm")
    assert output.count("$ sbatch") == 6 and output.count("$ scontrol release") == 2
    assert [path.name for path in run.iterdir() if (path / "slurm").exists()] == []
    assert len(list((run / "code").iterdir())) == 1 and not list(run.glob("sweep/*/code"))  # one copy for all
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in tunesmith("status", str(run)).splitlines()
    ]
    assert ["001_learning_rate-0.1", "0.1", "WAITING", "train", "101"] in rows
    assert "cancelled 103, 102, 101" in tunesmith("cancel", str(run))
    output = tunesmith("resume", str(run))
    assert output.count("$ sbatch") == 6 and "train: starts from the beginning" in output
    assert "logs/train-%j.log" in output and f"--chdir={Path.cwd()}" in output


def test_a_sweep_runs_no_more_at_once_than_its_recipe_says(tmp_path: Path, monkeypatch) -> None:
    slurm = FakeSlurm()
    monkeypatch.setattr("launcher.slurm.client.Slurm", lambda: slurm)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say a.", "output": "a"}\n')
    train = VALUES["train"] | {"data": [str(tmp_path / "rows.jsonl")]}
    recipe = write(tmp_path, train=train, sweep={"seed": [1, 2, 3, 4, 5]}, slurm={"max_runs_at_once": 2})

    def places(*command: object) -> list[str]:
        """What the first job of each run waits for."""
        slurm.said.clear()
        done = CliRunner().invoke(app, list(map(str, command)))
        assert done.exit_code == 0, done.output + str(done.exception)
        held = [words for words in slurm.said if "--hold" in words and "--test-only" not in words]
        return [next((word for word in words if word.startswith("--dependency=")), "") for words in held]

    ended = [f"--dependency=afterany:{job_id}" for job_id in (103, 106, 109)]
    assert places("run", recipe, "--on", "slurm") == ["", "", *ended]
    status = CliRunner().invoke(app, ["status", str(tmp_path / "run" / "sweep" / "003_seed-3")]).output
    assert "for job 103" in status
    places("cancel", tmp_path / "run")
    cancelled = [int(words[1]) for words in slurm.said if words[0] == "scancel"]
    assert cancelled == sorted(cancelled, reverse=True)  # so that no run starts because another is cancelled
    slurm.queue_lines.clear()
    again = places("resume", tmp_path / "run", "slurm.max_runs_at_once=1")
    assert again[0] == "" and len(set(again)) == 5
