"""When a run will end and what it will have made by then, if it continues at the rate of its last minutes."""

from collections import deque
from dataclasses import dataclass

from generation.config.common import SynthesisConfig
from generation.method import Method
from generation.state import Snapshot

WINDOW_SECONDS = 300.0  # the rate is that of this time: filters for novelty reject more and more


@dataclass(frozen=True, slots=True)
class Forecast:
    """num_rows and num_completion_tokens are totals at the end of the run."""

    num_rows: int
    num_completion_tokens: int
    seconds_left: int

    def __str__(self) -> str:
        hours, minutes, seconds = self.seconds_left // 3600, self.seconds_left // 60 % 60, self.seconds_left % 60
        left = f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
        return f"about {left} left, {self.num_rows:,} rows and {self.num_completion_tokens:,} tokens then"


class Forecaster:
    """Extrapolates the snapshots of a run to the first limit that ends it."""

    def __init__(self, method: Method, config: SynthesisConfig) -> None:
        budget = config.budget
        limits = {
            "num_instructions": method.num_wanted,
            "num_proposals": method.max_proposals,
            "num_rows": budget.max_rows,
            "num_completion_tokens": budget.max_completion_tokens,
            "seconds": None if budget.max_minutes is None else 60 * budget.max_minutes,
        }
        self._limits = {name: limit for name, limit in limits.items() if limit is not None}  # by field of Snapshot
        self._window: deque[Snapshot] = deque()

    def update(self, now: Snapshot) -> Forecast | None:
        """Add a snapshot. None means that no limit is in sight at the rate so far."""
        self._window.append(now)
        while self._window[0].seconds < now.seconds - WINDOW_SECONDS:
            self._window.popleft()
        first = self._window[0]
        seconds = max(now.seconds - first.seconds, 1e-9)
        left = []
        for name, limit in self._limits.items():
            if rate := (getattr(now, name) - getattr(first, name)) / seconds:
                left.append(max(limit - getattr(now, name), 0) / rate)
        if not left or now.num_rows == first.num_rows:
            return None
        factor = min(left) / seconds
        num_new_rows = (now.num_rows - first.num_rows) * factor
        num_new_tokens = (now.num_completion_tokens - first.num_completion_tokens) * factor
        return Forecast(
            round(now.num_rows + num_new_rows), round(now.num_completion_tokens + num_new_tokens), round(min(left))
        )
