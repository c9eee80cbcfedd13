"""An engine is hung, slow or healthy, judged by its reports and a clock that the test sets."""

import pytest

from cluster.engines.config import EngineConfig, EngineReport
from cluster.engines.health import EngineHealth, EngineHung, relative_speed

CONFIG = EngineConfig(stall_timeout_seconds=10, slow_window_seconds=20)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def observe(
    health: EngineHealth, clock: Clock, seconds: float, num_tokens: int, num_held: int = 1, has_answers: bool = False
) -> bool:
    clock.now += seconds
    return health.observe(EngineReport(num_tokens, num_running=num_held), has_answers, num_held)


def test_a_long_request_is_no_stall_while_tokens_come(clock):
    health = EngineHealth(CONFIG, clock)
    for num_tokens in range(1, 100):
        observe(health, clock, 9, num_tokens)


def test_an_engine_with_requests_and_no_tokens_is_hung(clock):
    health = EngineHealth(CONFIG, clock)
    observe(health, clock, 5, 1)
    observe(health, clock, 9, 1)
    with pytest.raises(EngineHung, match=r"generated no token .* 3 sequences running"):
        observe(health, clock, 2, 1, num_held=3)


def test_the_time_of_an_idle_engine_begins_with_its_first_request(clock):
    health = EngineHealth(CONFIG, clock)
    observe(health, clock, 100, 0, num_held=0)
    clock.now += 100
    health.end_idleness()
    observe(health, clock, 9, 0)
    with pytest.raises(EngineHung):
        observe(health, clock, 2, 0)


def test_an_answer_without_tokens_is_progress(clock):
    health = EngineHealth(CONFIG, clock)
    for _ in range(10):
        observe(health, clock, 9, 0, has_answers=True)


def test_speed_is_per_sequence_and_second(clock):
    health = EngineHealth(CONFIG, clock)
    assert [observe(health, clock, 5, 400 * step, num_held=8) for step in range(1, 5)] == [False, False, False, True]
    assert health.tokens_per_second == pytest.approx(80)
    assert health.speed == pytest.approx(10)


def test_a_window_with_idle_time_does_not_count(clock):
    health = EngineHealth(CONFIG, clock)
    observe(health, clock, 15, 100)
    observe(health, clock, 1, 100, num_held=0)
    assert not observe(health, clock, 15, 200)
    assert health.speed is None


@pytest.mark.parametrize(
    ("speed", "peers", "expected"),
    [(2.0, [10.0, 8.0, 100.0], 0.2), (2.0, [None, 8.0], 0.25), (None, [8.0], 1), (2.0, [None], 1), (2.0, [], 1)],
)
def test_relative_speed(speed, peers, expected):
    assert relative_speed(speed, peers) == pytest.approx(expected)
