"""Time limits that do not count the time in which this process stood still.

clock = AwakeClock()
finished = await within(60.0, actor.collect.remote(), clock)

Slurm suspends a job by stopping all its processes, those that watch the others too. When they go on, nothing has hung.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

Result = TypeVar("Result")
MAX_STEP_SECONDS = 10.0  # a process that has not read its clock for longer stood still


class AwakeClock:
    """Seconds in which this process was awake. It has to be read more often than every MAX_STEP_SECONDS."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last, self._seconds = clock(), 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._seconds += min(now - self._last, MAX_STEP_SECONDS)
        self._last = now
        return self._seconds


async def within(seconds: float, awaitable: Awaitable[Result], clock: AwakeClock) -> Result:
    """The result of `awaitable`. Raises TimeoutError if it is not there after `seconds` of this clock."""
    task, deadline = asyncio.ensure_future(awaitable), clock() + seconds
    try:
        while not task.done():
            if (left := deadline - clock()) <= 0:
                raise TimeoutError
            await asyncio.wait([task], timeout=min(left, MAX_STEP_SECONDS / 2))
        return task.result()
    finally:
        task.cancel()
