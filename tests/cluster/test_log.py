"""The lines of a stage, and its progress on a terminal and in a log file."""

import contextlib
import io

from rich.console import Console

from cluster import log as module
from cluster.log import Progress, stage_logger


def test_a_line_names_its_stage_and_goes_to_the_current_stdout(capsys):
    stage_logger("train").info("100%")
    assert capsys.readouterr().out == "[train] 100%\n"
    with contextlib.redirect_stdout(io.StringIO()) as other:
        stage_logger("train").warning("step 3: loss 9.0")
    assert other.getvalue() == "[train] warning: step 3: loss 9.0\n" and not capsys.readouterr().out


def test_without_a_terminal_updates_are_throttled_and_lines_are_not(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    log = stage_logger("synthesize")
    with Progress(log) as progress:
        progress.update("1/9")
        now += module.MIN_SECONDS_BETWEEN_UPDATES / 2
        progress.update("2/9")
        log.info("an engine died [restart 1]")
        now += module.MIN_SECONDS_BETWEEN_UPDATES / 2
        progress.update("3/9")
        now += module.MIN_SECONDS_BETWEEN_UPDATES
        progress.update("3/9")
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["[synthesize] 1/9", "[synthesize] an engine died [restart 1]", "[synthesize] 3/9"]


def test_on_a_terminal_updates_are_transient_and_lines_stay():
    console = Console(file=io.StringIO(), force_terminal=True, width=60, markup=False, highlight=False, soft_wrap=True)
    log = stage_logger("synthesize")
    with Progress(log, console) as progress:
        progress.update("1/9")
        log.info("resuming [it is no markup]")
    shown = console.file.getvalue()
    assert "[synthesize] resuming [it is no markup]\n" in shown
    assert "1/9" in shown
    assert shown.endswith("\x1b[2K")  # the status is erased at the end
