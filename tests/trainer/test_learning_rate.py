"""Linear warm-up to the peak, then a cosine down to the floor."""

import math

from hypothesis import given
from hypothesis import strategies as st

from trainer.config.train import TrainConfig
from trainer.engine import learning_rate


def rates(num_steps: int, **settings: object) -> list[float]:
    config = TrainConfig(learning_rate=0.5, **settings)
    return [learning_rate(config, step, num_steps) for step in range(num_steps)]


def test_hand_computed_rates() -> None:
    found = rates(8, warmup_ratio=0.25)
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert found == [0.25, 0.5, *(0.5 * value for value in cosine)]


def test_the_floor_lifts_the_whole_cosine() -> None:
    found = rates(1000, warmup_ratio=0.0, min_lr_ratio=0.2)
    assert found[0] == 0.5
    assert 0.1 < found[-1] < 0.1001


@given(st.integers(1, 500), st.floats(0, 0.99), st.floats(0, 1))
def test_it_rises_to_the_peak_falls_after_it_and_is_never_zero(num_steps: int, warmup: float, floor: float) -> None:
    found = rates(num_steps, warmup_ratio=warmup, min_lr_ratio=floor)
    peak = found.index(max(found))
    assert found[peak] == 0.5
    assert all(rate > 0 for rate in found)
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)
