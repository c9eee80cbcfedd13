"""The forecast extrapolates the last minutes to the first limit that ends a run."""

from types import SimpleNamespace

import pytest

from generation.config.common import BudgetConfig, SynthesisConfig
from generation.metrics import WINDOW_SECONDS, Forecast, Forecaster
from generation.state import Snapshot


def forecaster(num_wanted: int | None = None, max_proposals: int | None = None, **budget: float) -> Forecaster:
    method = SimpleNamespace(num_wanted=num_wanted, max_proposals=max_proposals)
    return Forecaster(method, SynthesisConfig(budget=BudgetConfig(**budget)))


def at(seconds: float, num_proposals: int, num_seeds: int = 5) -> Snapshot:
    """A run of which every proposal makes 2 instructions, 3 rows and 100 tokens."""
    num_rows = num_seeds + 3 * num_proposals
    return Snapshot(seconds, 2 * num_proposals, num_proposals, 2 * num_proposals, num_rows, 100 * num_proposals, {})


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        ({"num_wanted": 100}, Forecast(155, 5000, 40)),
        ({"max_proposals": 100}, Forecast(305, 10_000, 90)),
        ({"num_wanted": 100, "max_proposals": 20}, Forecast(65, 2000, 10)),
        ({"num_wanted": 100, "max_rows": 65}, Forecast(65, 2000, 10)),
        ({"num_wanted": 100, "max_completion_tokens": 3000}, Forecast(95, 3000, 20)),
        ({"num_wanted": 100, "max_minutes": 0.5}, Forecast(95, 3000, 20)),
        ({}, None),
    ],
)
def test_the_first_limit_ends_the_run(goal, expected):
    run = forecaster(**goal)
    assert run.update(at(0, 0)) is None
    assert run.update(at(10, 10)) == expected


def test_only_the_last_minutes_count():
    run = forecaster(max_proposals=10_000)
    for second in range(100):
        run.update(at(second, 50 * second))
    for second in range(100, 100 + 2 * int(WINDOW_SECONDS)):
        forecast = run.update(at(second, 5000 + second))
    assert forecast.seconds_left == 10_000 - 5000 - second


def test_no_forecast_without_progress():
    run = forecaster(num_wanted=10)
    run.update(at(0, 0))
    assert run.update(Snapshot(60.0, 0, 3, 0, 5, 300, {})) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(11, "about 11 s left"), (125, "about 2 min 5 s left"), (7300, "about 2 h 1 min left")]
)
def test_a_forecast_reads_as_a_sentence(seconds, text):
    assert str(Forecast(1271, 26_724, seconds)) == f"{text}, 1,271 rows and 26,724 tokens then"
