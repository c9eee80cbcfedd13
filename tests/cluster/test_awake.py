"""Time limits do not count the time in which a process stood still."""

import asyncio
import itertools

import pytest

from cluster.processes.awake import MAX_STEP_SECONDS, AwakeClock, within


def test_a_clock_counts_the_time_between_readings_up_to_a_limit() -> None:
    times = iter([100.0, 103.0, 5000.0, 5001.0])
    clock = AwakeClock(lambda: next(times))
    assert [clock(), clock(), clock()] == [3.0, 3.0 + MAX_STEP_SECONDS, 4.0 + MAX_STEP_SECONDS]


def test_an_answer_that_comes_after_the_process_stood_still_is_not_too_late() -> None:
    times = itertools.chain([0.0, 0.0, 10_000.0], itertools.repeat(10_001.0))
    answer = within(MAX_STEP_SECONDS + 5, asyncio.sleep(0.01, "result"), AwakeClock(lambda: next(times)))
    assert asyncio.run(answer) == "result"
    times = itertools.count(0.0, 1.0)
    with pytest.raises(TimeoutError):
        asyncio.run(within(5, asyncio.sleep(600), AwakeClock(lambda: next(times))))


def test_a_result_and_an_error_arrive() -> None:
    async def fail() -> None:
        raise ValueError("it broke")

    clock = AwakeClock()
    assert asyncio.run(within(1, asyncio.sleep(0, "result"), clock)) == "result"
    with pytest.raises(ValueError, match="it broke"):
        asyncio.run(within(1, fail(), clock))
