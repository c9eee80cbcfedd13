"""Progress renews one line on a terminal and spares a log file."""

import io

from rich.console import Console

from cluster import progress as module
from cluster.progress import Progress


def test_off_a_terminal_updates_are_rare_and_lines_are_not(monkeypatch):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Progress("synthesize", Console(file=out, soft_wrap=True, highlight=False, markup=False)) as progress:
        progress.update("1/9")
        now += module.MIN_SECONDS_BETWEEN_LINES / 2
        progress.update("2/9")
        progress.line("an engine died [restart 1]")
        now += module.MIN_SECONDS_BETWEEN_LINES / 2
        progress.update("3/9")
        now += module.MIN_SECONDS_BETWEEN_LINES
        progress.update("3/9")
    lines = out.getvalue().splitlines()
    assert lines == ["[synthesize] 1/9", "[synthesize] an engine died [restart 1]", "[synthesize] 3/9"]


def test_on_a_terminal_updates_pass_and_lines_stay():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, markup=False, highlight=False)
    with Progress("synthesize", console) as progress:
        progress.update("1/9")
        progress.line("resuming")
    said = console.file.getvalue()
    assert "[synthesize] resuming\n" in said
    assert "1/9" in said
    assert said.endswith("\x1b[2K")  # the status is erased at the end
