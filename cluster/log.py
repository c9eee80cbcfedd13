"""What a stage reports: lines `[stage] message` on stdout, and one line of progress that renews itself on a terminal.

log = stage_logger("synthesize")
log.info("resuming: 312 finished requests found")
with Progress(log) as progress:
    progress.update("214/400 instructions accepted")
"""

import logging
import sys
import time
from typing import TextIO

from rich.console import Console

MIN_SECONDS_BETWEEN_UPDATES = 10.0  # where stdout is no terminal


def stage_logger(stage: str) -> logging.Logger:
    """The logger of a stage. Every line is flushed, so that the log of a job that is killed has it."""
    logger = logging.getLogger(f"tunesmith.{stage}")
    if not logger.handlers:
        logger.addHandler(_StdoutHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # vLLM and Ray add handlers of their own to the root logger
    return logger


class _StdoutHandler(logging.StreamHandler):
    """Writes to what `sys.stdout` is at that moment: pytest, Ray's workers and rich's live display replace it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # StreamHandler's own would set `stream`

    @property
    def stream(self) -> TextIO:
        return sys.stdout

    def format(self, record: logging.LogRecord) -> str:
        stage = record.name.rpartition(".")[2]
        warning = "warning: " if record.levelno == logging.WARNING else ""
        return f"[{stage}] {warning}{super().format(record)}"


class Progress:
    """How far a stage is: one line that renews itself on a terminal, a logged line from time to time elsewhere."""

    def __init__(self, log: logging.Logger, console: Console | None = None) -> None:
        self._log = log
        console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._status = console.status("", spinner="dots") if console.is_terminal else None
        self._last_update = float("-inf")  # monotonic seconds
        self._last_text = ""

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def update(self, text: str) -> None:
        """Show how far the stage is. Off a terminal, at most one line in ten seconds and never the same twice."""
        if self._status:
            self._status.update(f"[{self._log.name.rpartition('.')[2]}] {text}")
            return
        now = time.monotonic()
        if text != self._last_text and now - self._last_update >= MIN_SECONDS_BETWEEN_UPDATES:
            self._last_update, self._last_text = now, text
            self._log.info(text)
