"""How much memory something takes at most, as the kernel counts it."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.002


def anonymous_bytes() -> int:
    """Memory of this process that the kernel cannot take back at any time, as it can that of mapped files."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@contextmanager
def highest_bytes() -> Iterator[Callable[[], int]]:
    """Yields a function that tells, after the block, by how much memory was above its start at most."""
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(POLL_SECONDS):
            highest = max(highest, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(0, highest - before)
    finally:
        done.set()
        watcher.join()
