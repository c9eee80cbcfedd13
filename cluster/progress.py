"""What a stage says while it runs: one line that renews itself on a terminal, a plain line now and then elsewhere.

with Progress("synthesize") as progress:
    progress.line("resuming: 312 finished requests found")
    progress.update("214/400 instructions accepted")
"""

import time
from types import TracebackType

from rich.console import Console

MIN_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Lines on stdout that begin with the stage's name."""

    def __init__(self, stage: str, console: Console | None = None) -> None:
        self._prefix = f"[{stage}] "
        self._console = console or Console(highlight=False, markup=False, soft_wrap=True)
        self._status = self._console.status("", spinner="dots") if self._console.is_terminal else None
        self._last_line = float("-inf")  # monotonic seconds
        self._last_text = ""

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._status:
            self._status.stop()

    def line(self, text: str) -> None:
        """Say something that stays."""
        self._console.print(self._prefix + text)

    def update(self, text: str) -> None:
        """Say how far the stage is. Off a terminal, at most one line in ten seconds and never the same twice."""
        if self._status:
            self._status.update(self._prefix + text)
            return
        now = time.monotonic()
        if text != self._last_text and now - self._last_line >= MIN_SECONDS_BETWEEN_LINES:
            self._last_line, self._last_text = now, text
            self.line(text)
