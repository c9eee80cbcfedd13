"""The forecast's ranges hold about as often as they say, follow falling yields, and respect budgets."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from generation.forecast import Forecast, Goal, Pace, Pilot, forecast


def simulate(seed: int, goal: Goal, pilot_rows: int, falls_to: float = 1.0) -> tuple[Forecast, int, int]:
    """A made-up run: a forecast after its pilot, and the rows and tokens that it came to.

    Proposals hold some 7 drafts; a share is kept that falls from 0.6 to `falls_to` of it over the run; an instruction
    makes 0 to 3 rows and writes tokens of a long-tailed number.
    """
    draw = np.random.default_rng(seed)
    pilot = Pilot(pilot_rows)
    kept = rows = tokens = proposals = 0
    pilot.add(0, 0, 0, 0)
    made = None
    while True:
        share = 0.6 * max(falls_to, 1 - (1 - falls_to) * kept / (goal.num_accepted or 1500))
        num_accepted = int(draw.binomial(draw.integers(4, 11), share))
        kept, proposals = kept + num_accepted, proposals + 1
        rows += int(draw.integers(0, 4, num_accepted).sum())
        tokens += int(150 + draw.lognormal(4, 0.8, num_accepted).sum())
        pilot.add(proposals, kept, rows, tokens)
        if pilot.is_full and made is None:
            made = forecast(pilot, goal, Pace(0, 60.0, (900.0, 1100.0)))
        if kept >= (goal.num_accepted or 1e9) or proposals >= (goal.num_proposals or 1e9):
            return made, rows, tokens


@pytest.mark.parametrize("goal", [Goal(num_accepted=1500), Goal(num_proposals=300)])
def test_the_range_holds_as_often_as_it_says(goal):
    runs = [simulate(seed, goal, pilot_rows=150) for seed in range(150)]
    rows = np.mean([num_rows in made.num_rows for made, num_rows, _ in runs])
    tokens = np.mean([num_tokens in made.num_completion_tokens for made, _, num_tokens in runs])
    assert 0.72 <= rows <= 0.92
    assert 0.72 <= tokens <= 0.92
    width = np.median([made.num_rows.high / made.num_rows.low for made, _, _ in runs])
    assert width < 1.5


def test_a_yield_that_falls_within_the_pilot_raises_the_expected_tokens():
    steady, falling = Pilot(1000), Pilot(1000)
    steps = [(4, 8, 1000)] * 20 + [(2, 4, 1000)] * 20
    for pilot, order in ((steady, steps[::2] + steps[1::2]), (falling, steps)):
        totals = np.zeros(4, dtype=int)
        pilot.add(0, 0, 0, 0)
        for step in order:
            totals += (1, *step)
            pilot.add(*map(int, totals))
    goal, pace = Goal(num_accepted=5000), Pace()
    at_steady_yield = forecast(steady, goal, pace).num_completion_tokens
    with_later_half = forecast(falling, goal, pace).num_completion_tokens
    assert at_steady_yield.high < 1.3 * 5000 / 3 * 1000
    assert with_later_half.high > 0.95 * 5000 / 2 * 1000
    assert with_later_half.expected > at_steady_yield.expected


def a_pilot(num_steps: int = 30) -> Pilot:
    pilot = Pilot(10**9)
    for number in range(num_steps + 1):
        pilot.add(number, 3 * number + number % 2, 5 * number, 700 * number + 50 * (number % 3))
    return pilot


@example(
    max_rows=161, max_completion_tokens=None, num_accepted=96, max_seconds=None
)  # two limits at about the same time
@given(
    st.integers(150, 10**6) | st.none(), st.integers(21_100, 10**8) | st.none(), st.integers(90, 10**5),
    st.floats(100, 10**6) | st.none(),
)  # fmt: skip
def test_budgets_cut_the_forecast_off(max_rows, max_completion_tokens, num_accepted, max_seconds):
    goal = Goal(num_accepted, None, max_rows, max_completion_tokens, max_seconds)
    made = forecast(a_pilot(), goal, Pace(0, 60.0, (90.0, 110.0)))
    assert made == forecast(a_pilot(), goal, Pace(0, 60.0, (90.0, 110.0)))
    for found in (made.num_rows, made.num_completion_tokens, made.seconds):
        assert found.low <= found.expected <= found.high
    if max_rows is not None:
        assert made.num_rows.high <= max_rows + 1
    if max_completion_tokens is not None:
        assert made.num_completion_tokens.high <= max_completion_tokens + 1
    if max_seconds is not None:
        assert made.seconds.high <= max_seconds + 0.1
    assert made.num_rows.low >= 150  # what is there already stays


def test_time_follows_speed_and_what_is_made_ahead():
    goal = Goal(num_proposals=130)
    made = forecast(a_pilot(), goal, Pace(0, 60.0, (100.0, 100.0)))
    assert made.seconds.expected == pytest.approx(60 + 100 * 700 / 100, rel=0.01)
    ahead = forecast(a_pilot(), goal, Pace(35_000, 60.0, (100.0, 100.0)))
    assert ahead.seconds.expected == pytest.approx(60 + 50 * 700 / 100, rel=0.01)
    assert forecast(a_pilot(), goal, Pace()).seconds is None  # all from the log so far: no speed is known


def test_no_forecast_where_nothing_ends_the_run():
    pilot = Pilot(10)
    pilot.add(0, 0, 0, 0)
    pilot.add(1, 0, 50, 100)
    assert forecast(pilot, Goal(num_accepted=10), Pace()) is None
    assert forecast(a_pilot(), Goal(), Pace()) is None


def test_a_pilot_measures_from_where_it_begins():
    pilot = Pilot(10)
    for totals in ((50, 100, 500, 9000), (51, 103, 506, 9400), (52, 104, 511, 9900), (53, 999, 999, 99_999)):
        pilot.add(*totals)
    assert pilot.steps == [(3, 6, 400), (1, 5, 500)]
    assert (pilot.is_full, pilot.num_proposals, pilot.num_rows, pilot.num_tokens) == (True, 52, 511, 9900)
