"""Whether an engine is dead, hung or slow, by the tokens that it generates.

dead   its process or its node is gone
hung   it is alive and has requests, but generates no token for stall_timeout_seconds: it is killed
slow   it generates far fewer tokens per running request than the other engines: it goes on with fewer requests

Finished requests say little: an engine with one request of a hundred thousand tokens is not hung. Speed is per running
request, because an engine with few requests generates fewer tokens and is not slower for that.
"""

import statistics
import time
from collections.abc import Callable, Iterable

from cluster.engines.config import EngineConfig, EngineReport


class EngineDeath(Exception):
    """An engine is gone or does not answer. The message is the cause."""

    is_hung = False


class EngineHung(EngineDeath):
    """An engine is alive and generates nothing."""

    is_hung = True


class EngineHealth:
    """What the reports of one engine say about its health."""

    def __init__(self, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.last_report = EngineReport()
        self.tokens_per_second = 0.0
        self.speed: float | None = None  # tokens per second and running request in the last window; None: not known yet
        self._config, self._clock = config, clock
        self._last_progress = clock()
        self._start_window(self._last_progress, 0)

    def end_idleness(self) -> None:
        """Requests were sent to an engine that had none: its time to generate a token begins now.

        The window goes on, because an engine that is refilled as soon as it is empty was not idle.
        """
        self._last_progress = self._clock()

    def observe(self, report: EngineReport, has_answers: bool, num_held: int) -> bool:
        """Take in a report. Returns whether it ends a window. Raises EngineHung if there was no progress for too long.

        `num_held` is the number of requests that the engine had until it reported. The report itself counts those that
        are left when some have just ended, so it says less about the size of the batch.
        """
        now = self._clock()
        is_idle = num_held == 0
        if has_answers or is_idle or report.num_tokens > self.last_report.num_tokens:
            self._last_progress = now
        self.last_report = report
        timeout = self._config.stall_timeout_seconds
        if now - self._last_progress > timeout:
            raise EngineHung(
                f"it is alive but generated no token for engine.stall_timeout_seconds={timeout:g}, with "
                f"{report.num_running} sequences running and {report.num_waiting} waiting"
            )
        if is_idle:
            self._start_window(now, report.num_tokens)
            return False
        self._sum_running += min(num_held, self._config.max_num_seqs)
        self._num_reports += 1
        return self._end_window(now)

    def _start_window(self, now: float, num_tokens: int) -> None:
        self._window_start = now
        self._window_tokens = num_tokens
        self._sum_running = 0
        self._num_reports = 0

    def _end_window(self, now: float) -> bool:
        seconds = now - self._window_start
        if seconds < self._config.slow_window_seconds:
            return False
        self.tokens_per_second = (self.last_report.num_tokens - self._window_tokens) / seconds
        if self._sum_running:
            self.speed = self.tokens_per_second * self._num_reports / self._sum_running
        self._start_window(now, self.last_report.num_tokens)
        return True


def relative_speed(speed: float | None, others: Iterable[float | None]) -> float:
    """An engine's speed as a fraction of the median of the others; 1 if either is not known."""
    known = [other for other in others if other]
    if speed is None or not known:
        return 1.0
    return speed / statistics.median(known)
