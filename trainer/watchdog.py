"""A thread on every rank that prints the rank's stacks if the rank makes no progress."""

import faulthandler
import sys
import threading
import time
from typing import IO


class Watchdog:
    """Prints where this rank is, and the stacks of its threads, once it has been there for `timeout_seconds`.

    Every rank has one. If one rank hangs, the others wait for it: their stacks show where they wait, and its own shows
    why.
    """

    def __init__(self, timeout_seconds: float, rank: int, output: IO[str] | None = None):
        self.timeout_seconds, self.rank, self.output = timeout_seconds, rank, output or sys.stderr
        self._location, self._since = "the start", time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def set_location(self, location: str) -> None:
        """Note what this rank does next, such as "step 7, saving"."""
        self._location, self._since = location, time.monotonic()

    def __enter__(self) -> "Watchdog":
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        reported_since = None
        while not self._stopped.wait(self.timeout_seconds / 10):
            since = self._since
            seconds = time.monotonic() - since
            if seconds > self.timeout_seconds and since != reported_since:
                reported_since = since
                self.output.write(
                    f"[train] rank {self.rank} has been at {self._location} for {seconds:.0f} s. Its stacks:\n"
                )
                self.output.flush()
                faulthandler.dump_traceback(self.output, all_threads=True)
