"""Linear warm-up to the peak, then a fall to the floor by the schedule of the recipe."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.train import TrainConfig
from trainer.engine import learning_rate

SCHEDULES = ["cosine", "linear", "constant", "wsd"]


def rates(num_steps: int, **settings: object) -> list[float]:
    config = TrainConfig(learning_rate=0.5, **settings)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_hand_computed_rates_of_a_cosine() -> None:
    found = rates(8, warmup_ratio=0.25)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert found == [0.25, 0.5, *(0.5 * value for value in cosine)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_schedule": "linear", "warmup_ratio": 0.2}, [0.25, 0.5, 0.5, *(0.5 * (8 - n) / 8 for n in range(1, 8))]),
        ({"lr_schedule": "linear", "warmup_ratio": 0.2, "min_lr_ratio": 1.0}, [0.25, *[0.5] * 9]),
        ({"lr_schedule": "constant", "warmup_ratio": 0.0}, [0.5] * 10),
        ({"lr_schedule": "constant", "warmup_steps": 3, "min_lr_ratio": 0.1}, [0.5 / 3, 1 / 3, *[0.5] * 8]),
        ({"lr_schedule": "wsd", "warmup_steps": 1, "decay_ratio": 0.4}, [0.5] * 7 + [0.375, 0.25, 0.125]),
        ({"lr_schedule": "wsd", "warmup_steps": 8, "decay_ratio": 1.0}, [n / 16 for n in range(1, 9)] + [0.5, 0.25]),
        ({"warmup_steps": 20}, [n / 40 for n in range(1, 11)]),
    ],
)  # fmt: skip
def test_hand_computed_rates_of_the_other_schedules(settings: dict, expected: list[float]) -> None:
    assert rates(10, **settings) == pytest.approx(expected)


def test_the_floor_lifts_the_whole_cosine() -> None:
    found = rates(1000, warmup_ratio=0.0, min_lr_ratio=0.2)
    assert found[0] == 0.5
    assert 0.1 < found[-1] < 0.1001


@given(st.sampled_from(SCHEDULES), st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 1))
def test_it_rises_to_the_peak_falls_after_it_and_is_never_zero(
    schedule: str, num_steps: int, warmup: float, floor: float
) -> None:
    found = rates(num_steps, lr_schedule=schedule, warmup_ratio=warmup, min_lr_ratio=floor)
    peak = found.index(max(found))
    assert found[peak] == 0.5
    assert all(rate > 0 for rate in found)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
