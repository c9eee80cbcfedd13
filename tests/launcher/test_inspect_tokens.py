"""`tunesmith inspect tokens` shows what is trained, row by row, and leaves nothing behind."""

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from cluster.errors import InputError
from launcher.inspect_tokens import print_rows
from launcher.recipe import load
from tests.trainer.tools import IM_END, IM_START, make_tokenizer, save_llama, write_chats

CHATS = [
    [{"role": "user", "content": "Say fig"}, {"role": "assistant", "content": "fig, of course"}],
    [
        {"role": "user", "content": "Say [b]pear[/b]"}, {"role": "assistant", "content": "pear"},
        {"role": "user", "content": "Again"}, {"role": "assistant", "content": "naïve pear"},
    ],
    [{"role": "user", "content": "nobody answers"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inspected")
    model = save_llama(folder / "model", make_tokenizer(IM_START, IM_END), tied=True)
    write_chats(folder / "chats.jsonl", CHATS)
    train = {"data": str(folder / "chats.jsonl"), "max_seq_len": 256, "micro_batch_size": 1, "global_batch_size": 2}
    content = {"name": "test", "run_dir": str(folder / "run"), "model": {"path": str(model)}, "train": train}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def shown(recipe: Path, rows: int = 9, is_terminal: bool = False, *overrides: str) -> str:
    output = io.StringIO()
    colors = "truecolor" if is_terminal else None
    console = Console(file=output, force_terminal=is_terminal, color_system=colors, width=60, legacy_windows=False)
    print_rows(load(recipe, list(overrides)), rows, console)
    return output.getvalue()


def test_what_is_trained_is_marked_with_its_end_and_documents_have_borders(recipe: Path) -> None:
    text = shown(recipe)
    assert "━━ row 1: " in text
    assert text.count("── document ") == 2
    assert "chats.jsonl: " in text
    for expected in (
        "<|im_start|>user\nSay fig<|im_end|>\n<|im_start|>assistant\n[[fig, of course<|im_end|>]]\n",
        "Say [b]pear[/b]<|im_end|>\n<|im_start|>assistant\n[[pear<|im_end|>]]\n<|im_start|>user\nAgain",
        "[[naïve pear<|im_end|>]]",
    ):
        assert expected in text


def test_the_counts_say_what_was_dropped_and_how_full_rows_are(recipe: Path) -> None:
    text = shown(recipe, 0)
    assert "document 0" not in text
    assert "chats.jsonl: 2 examples, 1 dropped (no assistant turn: 1, in chats.jsonl:3)" in text
    assert "an epoch: 2 examples in 1 rows of up to 256 tokens, " in text
    assert "% full; " in text
    assert "of them with a loss (" in text


def test_a_terminal_gets_colors(recipe: Path) -> None:
    text = shown(recipe, 9, True)
    assert "[[" not in text
    assert "\x1b[32mfig, of course" in text, "trained text is green"
    assert "\x1b[7;32m<|im_end|>" in text, "end tokens stand out"
    assert "\x1b[2m<|im_start|>user" in text, "what is only read is dim"


def test_rows_come_in_the_order_of_training(recipe: Path) -> None:
    few = shown(recipe, 1, False, "train.packing=false")
    many = shown(recipe, 99, False, "train.packing=false", "train.num_epochs=2")
    assert many.startswith(few[: few.index("/")])
    assert many.count("━━ row") == 2, "the first epoch"


def test_it_writes_nothing_and_uses_what_a_run_has(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher import inspect_tokens as module
    from trainer.data.tokens import prepare_tokens

    before = shown(recipe)
    assert not (recipe.parent / "run").exists()
    run = load(recipe, [])
    tokenizer, _ = module.load_tokenizer(run.model, None)
    prepare_tokens(run.train, tokenizer, run.train.data, run.run.tokens)
    monkeypatch.setattr(module, "prepare_tokens", None)  # calling it would fail
    assert shown(recipe) == before


def test_a_run_without_data_is_told_what_to_do(recipe: Path) -> None:
    with pytest.raises(InputError, match="has no dataset yet"):
        shown(recipe, 1, False, "train.data=[]")
