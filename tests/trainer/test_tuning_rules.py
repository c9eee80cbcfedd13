"""What cannot be combined is refused as the recipe is read, with a reason and a fix that works. So say the docs."""

import itertools
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster.errors import InputError
from launcher import recipe as recipes
from launcher.stages import run_stage
from trainer.config.train import TrainConfig
from trainer.config.tuning import METHODS, form_refusal, refusal

DOCS = Path(__file__).parents[2] / "docs" / "guides" / "lora.md"
SETTINGS = ("tuning", "zero_stage", "activation_checkpointing", "packing")
COMBINATIONS = list(itertools.product(METHODS, range(4), ("none", "full"), (False, True)))


def is_forbidden(tuning: str, zero_stage: int, checkpointing: str, packing: bool) -> bool:
    """The rules once more, in the fewest words."""
    return (
        (tuning in ("prefix", "prompt") and packing)
        or (tuning == "prefix" and checkpointing != "none")
        or (tuning == "qlora" and zero_stage == 3)
    )


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: "-".join(map(str, c)))
def test_a_combination_is_valid_or_refused_with_a_fix_that_works(combination: tuple) -> None:
    settings = {"precision": "fp32", **dict(zip(SETTINGS, combination, strict=True))}
    if not is_forbidden(*combination):
        assert TrainConfig(**settings).tuning == combination[0]
        return
    for _ in SETTINGS:  # at most one fix for each of them
        with pytest.raises(ValidationError) as raised:
            TrainConfig(**settings)
        message = raised.value.errors()[0]["msg"]
        found = re.search(
            rf"(\w+)(=\d)? does not work with tuning={combination[0]}: .+\. Set train\.(\w+)=(\w+)$", message
        )
        assert found, message
        assert found[1] == found[3]
        settings[found[3]] = yaml.safe_load(found[4])
        tuning, zero_stage, checkpointing, packing = (settings[name] for name in SETTINGS)
        if refusal(tuning, zero_stage, checkpointing != "none", packing) is None:
            break
    assert TrainConfig(**settings).tuning == combination[0]


def test_dora_is_not_combined_with_a_base_in_four_bits() -> None:
    with pytest.raises(ValidationError, match=r"has not been tested.*train\.lora\.dora=false"):
        TrainConfig(tuning="qlora", lora={"dora": True})


def write_recipe(folder: Path, tuning: str, form: str) -> Path:
    path = folder / "recipe.yaml"
    train = {"data": "chats.jsonl", "tuning": tuning, "packing": False}
    path.write_text(yaml.safe_dump({"name": "t", "model": {"path": "a/b"}, "train": train, "export": {"form": form}}))
    return path


@pytest.mark.parametrize("tuning", METHODS)
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_a_form_that_cannot_be_exported_is_refused_before_training(tmp_path: Path, tuning: str, form: str) -> None:
    path = write_recipe(tmp_path, tuning, form)
    cannot = {"full": "adapter", "prefix": "merged", "prompt": "merged", "adapter": "merged"}
    if cannot.get(tuning) != form:
        assert recipes.load(path, []).export.form == form
        return
    with pytest.raises(
        InputError, match=rf"export\.form={form} does not work with train\.tuning={tuning}.*Set export\.form=(\w+)"
    ) as raised:
        recipes.load(path, [])
    fix = re.search(r"Set (export\.form=\w+)", str(raised.value))[1]
    assert f"export.form={recipes.load(path, [fix]).export.form}" == fix


def test_qlora_without_a_gpu_is_refused_before_any_process_is_started(tmp_path: Path, monkeypatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    recipe = recipes.load(write_recipe(tmp_path, "qlora", "merged"), [])
    with pytest.raises(InputError, match=r"train\.tuning=qlora needs an NVIDIA GPU.*Set train\.tuning=lora"):
        run_stage("train", recipe)
    assert not (recipe.run.root / "logs").exists()


def test_qlora_without_its_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import torch

    from trainer.model.load import require_four_bits

    if importlib.util.find_spec("bitsandbytes") is not None:
        pytest.skip("bitsandbytes is installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(InputError, match=r"needs bitsandbytes, which is not installed.*uv pip install bitsandbytes"):
        require_four_bits()


def expected_table() -> list[str]:
    """The table of docs/guides/lora.md, from the rules themselves."""

    def mark(refused: str | None) -> str:
        return "yes" if refused is None else "no"

    lines = [
        "| `train.tuning` | | ZeRO stages | checkpointing | packing | merged export | added tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for tuning, method in METHODS.items():
        stages = [stage for stage in range(4) if refusal(tuning, stage, False, False) is None]
        cells = [
            f"`{tuning}`",
            method.title,
            ", ".join(map(str, stages)),
            mark(refusal(tuning, stages[0], True, False)),
            mark(refusal(tuning, stages[0], False, True)),
            mark(form_refusal(tuning, "merged")),
            f"ZeRO {', '.join(map(str, method.new_token_stages))}" if method.new_token_stages else "no",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def test_the_table_in_the_docs_is_the_one_in_the_code() -> None:
    lines = DOCS.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("| `train.tuning` |"))
    end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
    assert lines[start:end] == expected_table()
