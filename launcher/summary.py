"""The tables at the end of a run. Every number is from the results that the stages wrote."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.run.rundir import RunDir
from launcher.recipe import Recipe

NUM_EXAMPLES = 5
MAX_ANSWER_CHARS = 50  # the answers of an untuned model are long


def print_summary(recipe: Recipe, console: Console) -> None:
    """Print tables of the data, the training and the accuracy, then folders and the next commands."""
    run = recipe.run
    synthesis, training, export, evaluation = (
        run.read_result(stage) for stage in ("synthesize", "train", "export", "evaluate")
    )
    if synthesis and not recipe.train.data:
        console.print(synthesis_table(synthesis))
    if training:
        console.print(training_table(training))
    if evaluation:
        console.print(accuracy_table(evaluation))
        console.print(examples_table(run))
    console.print("\nResults:")
    for label, path, result in (
        ("dataset", run.synthesized, synthesis),
        ("checkpoints", run.checkpoints, training),
        ("model", run.export, export),
        ("answers", run.evaluation, evaluation),
    ):
        if result and path.exists():
            console.print(f"  {label:<12} {path}", markup=False, highlight=False)
    if export:
        console.print("\nNext:")
        for line in next_steps(recipe):
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)


def synthesis_table(result: dict) -> Table:
    table = _table("Synthesis", "", "count")
    table.add_row("requests to the model", f"{result['num_requests']:,}")
    table.add_row("instructions generated", f"{result['num_generated']:,}")
    table.add_row("instructions accepted", f"{result['num_accepted']:,}")
    for reason, count in sorted(result["rejected"].items(), key=lambda item: -item[1]):
        table.add_row(f"  rejected: {reason}", f"{count:,}")
    table.add_row("rows in the dataset", f"{result['num_rows']:,}")
    if "tokens_per_second" in result:  # absent if the process was killed just after the dataset was sealed
        _add_machine_rows(table, result)
    return table


def _add_machine_rows(table: Table, result: dict) -> None:
    """Models, speed, and where the time went."""
    table.add_row("method", result["method"])
    for role, model in result["models"].items():
        table.add_row(f"  {role}", Text(model))
    table.add_row("output tokens per second", f"{result['tokens_per_second']:,.0f}")
    took = result["time"]
    for place, share in took["of_waiting"].items():
        table.add_row(f"  of a request's time: {place.replace('_', ' ')}", f"{share:.1%}")
    for activity, share in took["of_driver"].items():
        table.add_row(f"  of the driver's time: {activity}", f"{share:.1%}")
    if took["prefix_hit_rate"] is not None:
        table.add_row("prompt tokens found in the prefix cache", f"{took['prefix_hit_rate']:.1%}")
    if took["num_preemptions"]:
        table.add_row("preemptions in the engines", f"{took['num_preemptions']:,}")
    table.add_row("engine restarts", f"{result['num_engine_restarts']:,}")


def training_table(result: dict) -> Table:
    table = _table("Training", "", result["tuning"])
    table.add_row("steps", f"{result['step']:,}")
    table.add_row("tokens", f"{result['num_tokens']:,}")
    table.add_row("  of them with a loss", f"{result['num_trained_tokens']:,}")
    table.add_row("tokens per second", f"{result['tokens_per_second']:,.0f}")
    table.add_row("final loss", "-" if result["final_loss"] is None else f"{result['final_loss']:.3f}")
    if result.get("validation_loss") is not None:
        table.add_row("validation loss", f"{result['validation_loss']:.3f}")
    return table


def accuracy_table(result: dict) -> Table:
    """Exact match (and ROUGE-L) by group, with one column for each model."""
    models = result["models"]
    table = _table("Held-out tasks: exact match (ROUGE-L)", "", *models)
    groups = list(dict.fromkeys(group for figures in models.values() for group in figures))
    for group in groups:
        num_rows = next(figures[group]["num_rows"] for figures in models.values() if group in figures)
        cells = [
            f"{figures[group]['exact_match']:.1%} ({figures[group]['rouge_l']:.2f})" for figures in models.values()
        ]
        table.add_row(f"{group} ({num_rows} rows)", *cells)
    return table


def examples_table(run: RunDir) -> Table:
    """Some held-out questions, evenly spread over the set, with the answer of each model in chat form."""
    table = _table("Some of the questions", "question")
    columns = []
    for name, title in (("base", "base, chat"), ("tuned", "tuned")):
        file = run.answers(name)
        if file.is_file():
            columns.append(json.loads(file.read_text())["rows"])
            table.add_column(title, overflow="fold", max_width=30)
    table.add_column("right answer", overflow="fold", max_width=30)
    rows = columns[-1]
    for number in range(NUM_EXAMPLES):
        place = (2 * number + 1) * len(rows) // (2 * NUM_EXAMPLES)
        answers = [Text(" ".join(column[place]["answer"].split())[:MAX_ANSWER_CHARS]) for column in columns]
        table.add_row(Text(rows[place]["question"]), *answers, Text(rows[place]["references"][0]))
    return table


def next_steps(recipe: Recipe) -> list[str]:
    """The next commands, with the path of this environment's programs."""
    run, programs = recipe.run, Path(sys.executable).parent
    if programs.is_relative_to(Path.cwd()):
        programs = programs.relative_to(Path.cwd())
    steps = []
    if recipe.export.form == "merged":
        steps.append(f"{programs}/vllm serve {run.export}    # or load it with transformers")
    if not recipe.train.data:
        rows = f"datasets.load_from_disk('{run.synthesized}')"
        steps.append(f'{programs}/python -c "import datasets; print({rows}[-1])"')
    steps.append(f"{programs}/tunesmith plan recipes/self_instruct.yaml    # the same with a real model")
    return steps


def _table(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    return table
