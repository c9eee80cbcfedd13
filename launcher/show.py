"""Rows of a run's dataset, and its models' answers to held-out questions, as text to read: `tunesmith show RUN`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from cluster.errors import InputError
from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir

MAX_CHARS = 600  # of one text; what is longer is cut
TITLES = {"base": "before", "tuned": "after"}


def print_samples(folder: Path, number: int, console: Console) -> None:
    """Print `number` rows that models wrote, then as many questions with the answers before and after tuning.

    Both are spread evenly over the run. Raises InputError if the run has neither rows nor answers.
    """
    run = RunDir(folder)
    answers = {name: file for name in TITLES if (file := run.answers(name)).is_file()}
    if not answers and not is_sealed(run.synthesized):
        raise InputError(
            f"{folder}: there is nothing to show: no dataset and no answers. Run a recipe with this run_dir."
        )
    if is_sealed(run.synthesized):
        _print_rows(run.synthesized, number, console)
    if answers:
        _print_answers({name: json.loads(file.read_text())["rows"] for name, file in answers.items()}, number, console)


def _print_rows(dataset: Path, number: int, console: Console) -> None:
    from datasets import load_from_disk  # slow to import

    rows = load_from_disk(str(dataset))
    written = [place for place, method in enumerate(rows["method"]) if method != "seed"]
    chosen = list(spread(written, number))
    _print_heading(console, f"{len(chosen)} of the {len(written):,} rows that were written, in {dataset}")
    for place in chosen:
        _print_entry(console, [(turn["role"], turn["content"]) for turn in rows[place]["messages"]])


def _print_answers(answers: dict[str, list[dict]], number: int, console: Console) -> None:
    """answers: the scored rows by model. All models answered the same questions."""
    questions = next(iter(answers.values()))
    chosen = list(spread(range(len(questions)), number))
    _print_heading(console, f"{len(chosen)} of the {len(questions):,} held-out questions")
    for place in chosen:
        of_models = [(TITLES[name], rows[place]["answer"]) for name, rows in answers.items()]
        right = " | ".join(questions[place]["references"])
        _print_entry(console, [("question", questions[place]["question"]), *of_models, ("right", right)])


def spread(places: Sequence[int], number: int) -> Iterator[int]:
    """At most `number` of the places, evenly spread over them."""
    count = min(number, len(places))
    return (places[(2 * which + 1) * len(places) // (2 * count)] for which in range(count))


def _print_heading(console: Console, text: str) -> None:
    console.print(Text(f"\n{text}", style="bold"))


def _print_entry(console: Console, parts: list[tuple[str, str]]) -> None:
    console.print()
    for name, text in parts:
        shown = text.strip()
        shown = shown if len(shown) <= MAX_CHARS else f"{shown[:MAX_CHARS]} ..."
        indented = shown.replace("\n", "\n" + " " * 11)
        console.print(Text.assemble((f"{name:<11}", "dim"), indented), soft_wrap=True)
