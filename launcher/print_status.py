"""Runs and their stages as tables."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.status import DONE, FAILED, LIVE, UNKNOWN, RunState, exact_matches

_COLOURS = {DONE: "green", FAILED: "red", UNKNOWN: "yellow"}


def print_status(state: RunState, console: Console) -> None:
    """One line a stage, then the run in a word, and what to type next."""
    table = Table(title=f"{state.name}: {state.run.root}", title_justify="left")
    for heading in ("stage", "state", "job", "attempt", ""):
        table.add_column(heading, overflow="fold")
    for stage in state.stages:
        word = Text(stage.word, style=_COLOURS.get(stage.word, ""))
        table.add_row(stage.stage, word, stage.job_id or "-", str(stage.attempt or "-"), Text(stage.detail))
    console.print(table)
    console.print(f"{state.word}. {next_step(state)}", markup=False, highlight=False, soft_wrap=True)


def next_step(state: RunState) -> str:
    """What to type next."""
    root = state.run.root
    if state.word == DONE:
        return f"The results are in {root}."
    if state.word in LIVE:
        has_jobs = any(stage.job_id for stage in state.stages)
        return f"Next: tunesmith logs -f {root}" if has_jobs else "It runs on this machine."
    if state.word == UNKNOWN:
        return "Nothing is known of it; that is not success. Look where the table says, then: tunesmith resume " + str(
            root
        )
    if state.word == FAILED:
        return f"Mend that, then: tunesmith resume {root}"
    return f"Next: tunesmith resume {root}"


def print_runs(runs: list[tuple[RunState, dict[str, object]]], console: Console) -> None:
    """One line a run: what a sweep tried in it, how far it is, and what it came to."""
    if not runs:
        console.print("There are no runs here.")
        return
    keys = list(dict.fromkeys(key for _, values in runs for key in values))
    results = [figures_of(state) for state, _ in runs]
    measured = list(dict.fromkeys(name for result in results for name in result))
    table = Table()
    table.add_column("run", overflow="fold")
    for key in keys:
        table.add_column(Text(key), overflow="fold")
    for heading in ("state", "stage", "job", *measured):
        table.add_column(Text(heading), overflow="fold")
    for (state, values), result in zip(runs, results, strict=True):
        about = next((stage for stage in state.stages if stage.stage == state.stage), None)
        row = [state.run.root.name, *(str(values.get(key, "")) for key in keys)]
        row += [state.word, state.stage or "-", about.job_id if about and about.job_id else "-"]
        table.add_row(*map(Text, row), *(Text(result.get(name, "")) for name in measured))
    console.print(table)


def figures_of(state: RunState) -> dict[str, str]:
    """Losses and shares of exact matches, as far as there are any."""
    figures = {}
    training, evaluation = (state.run.read_result(stage) or {} for stage in ("train", "evaluate"))
    for name in ("final_loss", "validation_loss"):
        if training.get(name) is not None:
            figures[name.replace("_", " ")] = f"{training[name]:.4f}"
    if "models" in evaluation:
        figures |= {f"exact, {name}": f"{share:.1%}" for name, share in exact_matches(evaluation).items()}
    return figures
