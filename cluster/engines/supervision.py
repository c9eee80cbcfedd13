"""Telling apart an engine that is dead, hung, slow or well, by the tokens it makes.

dead   its process or its node is gone
hung   alive, with requests, and no token for stall_timeout_seconds: killed like a dead one
slow   it makes tokens, but per running request far fewer than its peers: left to work, with fewer requests

Finished requests say little: one of a hundred thousand tokens is no stall. Speed is per running request because
an engine with few requests makes fewer tokens and is no slower for it.
"""

import statistics
import time
from collections.abc import Iterable

from cluster.engines.config import EngineConfig, EngineReport


class EngineDeath(Exception):
    """An engine is gone or does not answer; the message says how."""

    is_hung = False


class EngineHung(EngineDeath):
    """It is there and makes nothing of its requests."""

    is_hung = True


class Pulse:
    """What the reports of one engine say of its health."""

    def __init__(self, config: EngineConfig) -> None:
        self.last_report = EngineReport()
        self.tokens_per_second = 0.0
        self.speed: float | None = None  # tokens per second and running request in the last window; none: not known
        self._config = config
        self._last_progress = time.monotonic()
        self._start_window(self._last_progress, 0)

    def note_work(self) -> None:
        """Requests went to an engine that had none: its time to make a token runs from here.

        A window goes on: an engine that is refilled the moment it ran empty was not idle.
        """
        self._last_progress = time.monotonic()

    def observe(self, report: EngineReport, has_answers: bool, num_held: int) -> bool:
        """Take in a report; returns whether it closes a window. Raises EngineHung for one report too many.

        num_held: requests that the engine had until it reported. The report itself comes when some have just ended,
        and says less of the size of the batch before.
        """
        now = time.monotonic()
        is_idle = num_held == 0
        if has_answers or is_idle or report.num_tokens > self.last_report.num_tokens:
            self._last_progress = now
        self.last_report = report
        timeout = self._config.stall_timeout_seconds
        if now - self._last_progress > timeout:
            raise EngineHung(
                f"alive, and made no token for engine.stall_timeout_seconds={timeout:g} with {report.num_running} "
                f"sequences running and {report.num_waiting} waiting"
            )
        if is_idle:
            self._start_window(now, report.num_tokens)
            return False
        self._sum_running += min(num_held, self._config.max_num_seqs)
        self._num_reports += 1
        return self._close_window(now)

    def _start_window(self, now: float, num_tokens: int) -> None:
        self._window_start = now
        self._window_tokens = num_tokens
        self._sum_running = 0
        self._num_reports = 0

    def _close_window(self, now: float) -> bool:
        seconds = now - self._window_start
        if seconds < self._config.slow_window_seconds:
            return False
        self.tokens_per_second = (self.last_report.num_tokens - self._window_tokens) / seconds
        if self._sum_running:
            self.speed = self.tokens_per_second * self._num_reports / self._sum_running
        self._start_window(now, self.last_report.num_tokens)
        return True


def relative_speed(speed: float | None, peers: Iterable[float | None]) -> float:
    """An engine's speed as a part of its peers' median, and 1 where either is not known."""
    known = [peer for peer in peers if peer]
    if speed is None or not known:
        return 1.0
    return speed / statistics.median(known)
