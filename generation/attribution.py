"""Where the driver's own time goes: seconds by what they were spent on."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator


class Attribution:
    """Seconds of this process by activity: parse, filter, write, log. Activities may not nest."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    @contextlib.contextmanager
    def spent_on(self, activity: str) -> Iterator[None]:
        """Count the block's time. It must not wait for anything."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start

    def shares(self, seconds: float) -> dict[str, float]:
        """Each activity as a part of so many seconds."""
        return {name: round(value / max(seconds, 1e-9), 4) for name, value in sorted(self.seconds.items())}
