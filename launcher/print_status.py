"""`tunesmith status` and `tunesmith list`: runs and their stages as tables."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.status import DONE, FAILED, LIVE, UNKNOWN, RunStatus, exact_matches

_COLORS = {DONE: "green", FAILED: "red", UNKNOWN: "yellow"}


def print_status(status: RunStatus, console: Console) -> None:
    """Print one line for each stage, then the state of the run and the next command."""
    table = Table(title=f"{status.name}: {status.run.root}", title_justify="left")
    for heading in ("stage", "state", "job", "attempt", ""):
        table.add_column(heading, overflow="fold")
    for stage in status.stages:
        state = Text(stage.state, style=_COLORS.get(stage.state, ""))
        table.add_row(stage.stage, state, stage.job_id or "-", str(stage.attempt or "-"), Text(stage.detail))
    console.print(table)
    console.print(f"{status.state}. {next_step(status)}", markup=False, highlight=False, soft_wrap=True)


def next_step(status: RunStatus) -> str:
    """What the user can do next."""
    root = status.run.root
    if status.state == DONE:
        return f"The results are in {root}."
    if status.state in LIVE:
        has_jobs = any(stage.job_id for stage in status.stages)
        return f"Next: tunesmith logs -f {root}" if has_jobs else "It runs on this machine."
    if status.state == UNKNOWN:
        return f"This is not success. See the logs in the table, then: tunesmith resume {root}"
    if status.state == FAILED:
        return f"Correct the cause, then: tunesmith resume {root}"
    return f"Next: tunesmith resume {root}"


def print_runs(runs: list[tuple[RunStatus, dict[str, object]]], console: Console) -> None:
    """Print one line for each run: the values of a sweep, the state, and figures of the results."""
    if not runs:
        console.print("There are no runs here.")
        return
    keys = list(dict.fromkeys(key for _, values in runs for key in values))
    results = [figures_of(status) for status, _ in runs]
    measured = list(dict.fromkeys(name for result in results for name in result))
    table = Table()
    table.add_column("run", overflow="fold")
    for key in keys:
        table.add_column(Text(key), overflow="fold")
    for heading in ("state", "stage", "job", *measured):
        table.add_column(Text(heading), overflow="fold")
    for (status, values), result in zip(runs, results, strict=True):
        row = [status.run.root.name, *(str(values.get(key, "")) for key in keys)]
        current = status.current
        row += [status.state, *([current.stage, current.job_id or "-"] if current else ["-", "-"])]
        table.add_row(*map(Text, row), *(Text(result.get(name, "")) for name in measured))
    console.print(table)


def figures_of(status: RunStatus) -> dict[str, str]:
    """Losses and shares of exact matches, if there are any."""
    figures = {}
    training, evaluation = (status.run.read_result(stage) or {} for stage in ("train", "evaluate"))
    for name in ("final_loss", "validation_loss"):
        if training.get(name) is not None:
            figures[name.replace("_", " ")] = f"{training[name]:.4f}"
    if "models" in evaluation:
        figures |= {f"exact, {name}": f"{share:.1%}" for name, share in exact_matches(evaluation).items()}
    return figures
