"""A recipe is checked as a whole before anything starts; an error names the place and the nearest right key."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from cluster.errors import InputError
from cluster.run.rundir import RunDir
from launcher import recipe as recipes
from launcher.recipe import Recipe
from launcher.status import read_run

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
GOOD = """\
name: test
model:
  path: some/model
train:
  data: chats.jsonl
  learning_rate: 1e-3
  checkpoint:
    every_steps: 5
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as raised:
        recipes.load(path, list(overrides))
    return str(raised.value)


def test_a_recipe_is_its_file_over_the_defaults(write) -> None:
    recipe = recipes.load(write(GOOD), [])
    assert recipe.train.learning_rate == 1e-3
    assert [source.path for source in recipe.train.data] == ["chats.jsonl"]
    assert recipe.train.checkpoint.every_steps == 5
    assert recipe.train.num_epochs == Recipe.model_fields["train"].default.num_epochs
    assert recipe.run_dir == Path("runs/test")


def test_the_command_line_comes_before_the_file(write) -> None:
    overrides = [
        "train.learning_rate=0.5",
        "train.data=[a.jsonl,b.jsonl]",
        "seed=3",
        "run_dir=/x",
        "train.packing=false",
    ]
    recipe = recipes.load(write(GOOD), overrides)
    assert recipe.train.learning_rate == 0.5
    assert [source.path for source in recipe.train.data] == ["a.jsonl", "b.jsonl"]
    assert recipe.seed == 3
    assert recipe.run_dir == Path("/x")
    assert recipe.train.packing is False
    assert recipe.train.checkpoint.every_steps == 5


def test_the_best_checkpoint_can_be_exported_only_where_one_is_kept(write) -> None:
    assert "Set train.checkpoint.keep_best=1" in error_of(write(GOOD), "export.checkpoint=best")
    kept = ["train.checkpoint.keep_best=1", "train.checkpoint.best=train_loss"]
    recipe = recipes.load(write(GOOD), ["export.checkpoint=best", *kept])
    assert recipe.export.checkpoint == "best"


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("  learning_rate", "  learning_rte", 6, "train.learning_rte: unknown key; did you mean `learning_rate`?"),
        (
            "    every_steps",
            "    every_step",
            8,
            "train.checkpoint.every_step: unknown key; did you mean `every_steps`?",
        ),
        (
            "  data: chats.jsonl",
            "  data: [{path: a, wieght: 2}]",
            5,
            "train.data.0.wieght: unknown key; did you mean `weight`?",
        ),
        (
            "  data: chats.jsonl",
            "  data: [{path: a, weight: 2}, b]",
            5,
            "train.data: b has no weight, while other sources",
        ),
        ("train:", "trian:", 4, "trian: unknown key; did you mean `train`?"),
        ("    every_steps", "    qqqqqq", 8, "train.checkpoint.qqqqqq: unknown key; known: every_steps, keep_last"),
        ("1e-3", "fast", 6, "train.learning_rate: Input should be a valid number"),
        ("1e-3", "-1", 6, "train.learning_rate: Input should be greater than 0"),
        (
            "every_steps: 5",
            "every_steps: 0",
            8,
            "train.checkpoint.every_steps: Input should be greater than or equal to 1",
        ),
        (
            "model:\n  path: some/model",
            "model: some/model",
            2,
            "model: a section of keys. Write `model: {path: some/model}`",
        ),
        ("name: test", "name: ../test", 1, "name: String should match pattern"),
        ("  data: chats.jsonl", "  zero_stage: 4", 5, "train.zero_stage: Input should be 'auto', 0, 1, 2 or 3"),
        ("  data: chats.jsonl", "  tuning: prefix", 4, "train: packing does not work with tuning=prefix"),
        ("  data: chats.jsonl", "  zero_stage: 0", 4, "train: zero_stage=0 works only with precision=fp32"),
        ("  data: chats.jsonl", "  attention: flash_attention_2", 4, "train: flash attention on packed rows needs"),
    ],
)
def test_an_error_names_the_file_the_line_the_key_and_the_fix(
    write, old: str, new: str, line: int, expected: str
) -> None:
    path = write(GOOD.replace(old, new))
    assert error_of(path).startswith(f"{path}:{line}: {expected}")


def test_all_errors_are_reported_at_once(write) -> None:
    path = write(GOOD.replace("learning_rate", "learning_rte").replace("every_steps", "every_step"))
    assert sorted(line.split(": ")[0] for line in error_of(path).splitlines()) == [f"{path}:6", f"{path}:8"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rte=1", "command line: train.learning_rte: unknown key; did you mean `learning_rate`?"),
        ("train.learning_rate=fast", "command line: train.learning_rate: Input should be a valid number"),
        ("train.learning_rate", "'train.learning_rate' is not of the form key.sub=value."),
        (
            "train.gradient_checkpointing=true",
            "command line: train.gradient_checkpointing: unknown key; did you mean `activation_checkpointing`?",
        ),
        ("max_steps=2", "command line: max_steps: unknown key; did you mean `train.max_steps`?"),
        ("model=models/a", "command line: model: a section of keys. Write `model: {path: models/a}`"),
        ("traim.seed=1", "command line: traim: unknown key; did you mean `train`?"),
        ("export.form=adapter", "command line: export.form=adapter does not work with train.tuning=full"),
        ("train.tuning=prefix", "command line: train: packing does not work with tuning=prefix"),
    ],
)
def test_an_error_of_an_override_is_put_down_to_the_command_line(write, override: str, expected: str) -> None:
    assert error_of(write(GOOD), override).startswith(expected)


def test_an_error_of_the_file_is_not_put_down_to_an_override_of_another_key(write) -> None:
    path = write(GOOD.replace("  data: chats.jsonl", "  tuning: prefix") + "export:\n  form: adapter\n")
    assert error_of(path, "train.num_epochs=1").startswith(f"{path}:4: train: packing does not work with")
    path = write(GOOD + "export:\n  form: adapter\n")
    assert error_of(path, "train.num_epochs=1").startswith(
        f"{path}: export.form=adapter does not work with train.tuning=full"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: [", "not YAML"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values"),
        ("", ": name: Field required"),
        ("name: test\n", ": model: Field required"),
        (
            "name: test\ntrain:\n  seed: 1\nname: other\n",
            ":4: the key `name` is already in line 1. Remove one of them.",
        ),
        ("train:\n  data:\n  - path: a\n    path: b\n", ":4: the key `path` is already in line 3"),
        ("name: a\nmodel:\n\tpath: b\n", ":3: a tab. Indent with spaces."),
        ("name: ${nowhere}\nmodel: {path: a}\n", "Interpolation key 'nowhere' not found"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(write, text: str, expected: str) -> None:
    path = write(text)
    assert expected in error_of(path)
    assert str(path) in error_of(path)


def test_a_missing_recipe_is_an_error(tmp_path: Path) -> None:
    assert error_of(tmp_path / "absent.yaml").startswith(f"{tmp_path}/absent.yaml: there is no such recipe")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_project_is_valid(path: Path) -> None:
    recipe = recipes.load(path, [])
    again = Recipe(**yaml.safe_load(yaml.safe_dump(recipe.model_dump(mode="json"))))
    assert again == recipe, "a resolved recipe does not read back as it was"


def repeated_defaults(written: dict, config: BaseModel, section: str = "") -> Iterator[str]:
    """Dotted keys of `written` whose value is the default of `config`'s field."""
    for key, value in written.items():
        field = type(config).model_fields[key]
        if isinstance(value, dict) and isinstance(inner := getattr(config, key), BaseModel):
            yield from repeated_defaults(value, inner, f"{section}{key}.")
        elif field.get_default(call_default_factory=True) == getattr(config, key):
            yield section + key


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_repeats_no_default(path: Path) -> None:
    written = yaml.safe_load(path.read_text())
    assert set(repeated_defaults(written, recipes.load(path, []))) <= {"synthesize.method"}


def saved(write, tmp_path: Path, *overrides: str) -> RunDir:
    recipe = recipes.load(write(GOOD), [f"run_dir={tmp_path / 'run'}", *overrides])
    run = recipe.run.create()
    recipe.save(run)
    return run


def test_the_run_folder_gets_the_resolved_recipe(write, tmp_path: Path) -> None:
    run = saved(write, tmp_path, "train.num_epochs=7")
    values = yaml.safe_load(run.recipe.read_text())
    assert values["train"]["num_epochs"] == 7
    assert values["train"]["betas"] == [0.9, 0.999]
    assert Recipe(**values).train.num_epochs == 7


@pytest.mark.parametrize("name", ["verdict-train.json", "generations", "gen-41-0"])
def test_a_run_folder_of_an_older_layout_is_refused(write, tmp_path: Path, name: str) -> None:
    recipe = recipes.load(write(GOOD), [f"run_dir={tmp_path / 'run'}"])
    (recipe.run_dir / name).mkdir(parents=True)
    for open_folder in (recipe.save, lambda run: read_run(run.root)):
        (recipe.run_dir / "recipe.yaml").write_text("name: older")
        with pytest.raises(InputError, match=f"{name} was written by an older version of tunesmith") as raised:
            open_folder(recipe.run)
        assert raised.value.exit_code == 2


def test_before_there_are_results_a_recipe_may_change(write, tmp_path: Path) -> None:
    saved(write, tmp_path)
    run = saved(write, tmp_path, "train.learning_rate=0.5", "seed=9")
    assert yaml.safe_load(run.recipe.read_text())["seed"] == 9


@pytest.mark.parametrize(
    ("made", "override", "allowed"),
    [
        ("checkpoints/step_000001", "train.learning_rate=0.5", False),
        ("checkpoints/step_000001", "model.path=other/model", False),
        ("checkpoints/step_000001", "seed=1", False),
        ("checkpoints/step_000001", "train.checkpoint.every_steps=9", True),
        ("checkpoints/step_000001", "train.num_processes=3", True),
        ("checkpoints/step_000001", "train.watch.spike_window=9", True),
        ("checkpoints/step_000001", "synthesize.num_instructions=7", True),
        ("checkpoints/step_000001", "export.dtype=bf16", True),
        ("checkpoints/step_000001", "engine.num_replicas=3", True),
        ("checkpoints/.saving_step_000001", "train.learning_rate=0.5", True),
        ("data/synthesized", "synthesize.num_instructions=7", False),
        ("data/synthesized", "seed=1", False),
        ("data/synthesized", "train.learning_rate=0.5", True),
        ("data/synthesized", "engine.num_replicas=3", True),
    ],
)
def test_what_has_shaped_results_may_not_change(write, tmp_path: Path, made: str, override: str, allowed: bool) -> None:
    run = saved(write, tmp_path)
    (run.root / made).mkdir(parents=True)
    before = run.recipe.read_text()
    if allowed:
        saved(write, tmp_path, override)
        assert run.recipe.read_text() != before
        return
    key, value = override.split("=")
    with pytest.raises(InputError, match=rf"{key} \(was .*, now {value}\).*--run-dir"):
        saved(write, tmp_path, override)
    assert run.recipe.read_text() == before
