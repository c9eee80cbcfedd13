"""`tunesmith show` prints what models wrote, so that a person can read it."""

import io
import json
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console

from cluster.errors import InputError
from cluster.run.manifest import write_manifest
from cluster.run.rundir import RunDir
from launcher.show import MAX_CHARS, print_samples, spread


def shown(folder: Path, number: int) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_samples(folder, number, console)
    return console.file.getvalue()


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run of one seed and twenty written rows, and four questions."""
    run = RunDir(tmp_path)
    rows = [
        {
            "method": "seed" if number == 0 else "magpie",
            "messages": [
                {"role": "user", "content": f"question {number}:"},
                {"role": "assistant", "content": f"[bold] answer {number}:\nand more"},
            ],
        }
        for number in range(21)
    ]
    Dataset.from_list(rows).save_to_disk(str(run.synthesized))
    write_manifest(run.synthesized, [])
    run.evaluation.mkdir()
    for name in ("base", "tuned"):
        answers = [
            {"question": f"why {number}?", "answer": f"{name} {number} " + 1000 * "x", "references": ["a", "b"]}
            for number in range(4)
        ]
        run.answers(name).write_text(json.dumps({"rows": answers}))
    return run


def test_rows_are_spread_over_the_dataset_and_seeds_are_left_out(run: RunDir) -> None:
    text = shown(run.root, 2)
    assert "2 of the 20 rows" in text
    assert [number for number in range(21) if f"question {number}:" in text] == [6, 16]
    assert "user       question 6:\nassistant  [bold] answer 6:\n           and more\n" in text


def test_both_answers_stand_below_their_question(run: RunDir) -> None:
    text = shown(run.root, 1)
    cut = f"base 2 {(MAX_CHARS - 7) * 'x'} ..."
    after = cut.replace("base 2 ", "tuned 2 ").replace("x", "", 1)
    assert f"question   why 2?\nbefore     {cut}\nafter      {after}\nright      a | b\n" in text


def test_there_may_be_less_to_show_than_asked_for(run: RunDir) -> None:
    text = shown(run.root, 50)
    assert "20 of the 20 rows" in text and "4 of the 4 held-out questions" in text
    assert list(spread([3, 5], 9)) == [3, 5] and list(spread([], 3)) == []


def test_a_run_without_results_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to show"):
        shown(tmp_path, 3)
