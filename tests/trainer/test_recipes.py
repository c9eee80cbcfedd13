"""The recipes of real models: each trains a tiny model here with its own settings, except for sizes and precision."""

import json
from pathlib import Path

import pytest
import yaml

from launcher.recipe import load
from tests.trainer.tools import chat_documents, train_here, write_chats

RECIPES = Path(__file__).parents[2] / "recipes"
# Name -> the published numbers: sequences a step, epochs, peak learning rate, tokens a sequence.
PUBLISHED = {
    "alpaca_7b": (128, 3, 2e-5, 512),
    "alpaca_13b": (128, 5, 1e-5, 512),
    "vicuna_7b": (128, 3, 2e-5, 2048),
    "wizardlm_7b": (64, 3, 2e-5, 2048),
    "instructgpt_sft": (32, 16, 9.65e-6, 2048),
    "tulu3_8b_4nodes": (128, 2, 5e-6, 4096),
}
NUM_DOCUMENTS = 150


def published_file(name: str, folder: Path) -> Path:
    """Conversations in the shape in which this recipe's data was published."""
    chats = chat_documents(NUM_DOCUMENTS)
    path = folder / yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["train"].get("data", "chats.jsonl")
    if name == "vicuna_7b":
        speaker = {"user": "human", "assistant": "gpt"}
        rows = [
            {"id": str(number), "conversations": [{"from": speaker[m["role"]], "value": m["content"]} for m in chat]}
            for number, chat in enumerate(chats)
        ]
    elif path.suffix == ".jsonl":
        return write_chats(path, chats)
    else:
        rows = [{"instruction": chat[0]["content"], "input": "", "output": chat[1]["content"]} for chat in chats]
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("name", [*PUBLISHED, "self_instruct"])
def test_a_published_recipe_has_the_published_numbers(name: str) -> None:
    """recipes/self_instruct.yaml tunes as Alpaca did."""
    train = load(RECIPES / f"{name}.yaml", []).train
    found = (train.global_batch_size, train.num_epochs, train.learning_rate, train.max_seq_len)
    assert (train.batch_unit, found) == ("examples", PUBLISHED.get(name, PUBLISHED["alpaca_7b"]))


@pytest.mark.parametrize("name", [path.stem for path in sorted(RECIPES.glob("*.yaml"))])
def test_a_recipe_of_a_real_model_trains_a_tiny_model(one_rank, tmp_path: Path, chat_model: Path, name: str) -> None:
    data = published_file(name, tmp_path)
    small = [f"model.path={chat_model}", f"train.data={data}", "train.precision=fp32", "train.num_processes=1"]
    recipe = load(RECIPES / f"{name}.yaml", [*small, "train.max_seq_len=256", "train.max_steps=2"])
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    result = train_here(run)
    assert (result["status"], result["step"]) == ("done", 2)
    seen = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert seen["step"] == 1 and 0 < seen["loss"] < 20
