"""What a run will come to, said after a pilot: rows, tokens, time, engine-hours, each with a range.

The pilot is measured by steps: one proposal with all that its instructions became. They are resampled with replacement
(bootstrap, Efron 1979), each time giving a mean step; the goal, or the budget that ends the run before it, says how
many such steps are to come, and the spread between single steps is added for those. Half of the resamples take steps
of the pilot's later half alone: novelty filters reject more as there is more to resemble, so later steps say more of
what is to come. The range leaves a tenth of the outcomes on either side. It knows nothing of what only happens after
the pilot: a yield that falls on and on makes the end come later than the range says, engines that die likewise.
"""

from dataclasses import asdict, dataclass, field

import numpy as np

NUM_RESAMPLES = 2000
MAX_STEPS = 200  # more are added up in blocks of neighbors first, which keeps what they have in common
LOW, MIDDLE, HIGH = 10, 50, 90  # percentiles: 80 % of outcomes are expected in the range


@dataclass(frozen=True, slots=True)
class Range:
    """80 % of outcomes are expected from low to high."""

    expected: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def times(self, factor: float) -> "Range":
        return Range(*(round(value * factor, 3) for value in (self.expected, self.low, self.high)))


@dataclass(frozen=True, slots=True)
class Goal:
    """What ends a run, in all; None: that does not."""

    num_accepted: int | None = None  # instructions
    num_proposals: int | None = None
    max_rows: int | None = None
    max_completion_tokens: int | None = None
    max_seconds: float | None = None


@dataclass(slots=True)
class Pilot:
    """Totals of the committed data, and what each step added, until `num_rows_wanted` rows are measured."""

    num_rows_wanted: int
    num_proposals: int = 0
    num_accepted: int = 0
    num_rows: int = 0
    num_tokens: int = 0  # of completions
    steps: list[tuple[int, int, int]] = field(default_factory=list)  # kept, rows, tokens
    is_begun: bool = False
    is_full: bool = False

    def add(self, num_proposals: int, num_accepted: int, num_rows: int, num_tokens: int) -> None:
        """One more step is committed; these are the totals now. The first call is where measuring begins."""
        if self.is_full:
            return
        if self.is_begun:
            self.steps.append(
                (num_accepted - self.num_accepted, num_rows - self.num_rows, num_tokens - self.num_tokens)
            )
            self.is_full = sum(step[1] for step in self.steps) >= self.num_rows_wanted
        self.is_begun = True
        self.num_proposals = num_proposals
        self.num_accepted, self.num_rows, self.num_tokens = num_accepted, num_rows, num_tokens


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast engines are when the pilot is over."""

    num_tokens_ahead: int = 0  # of completions that are there and not among the pilot's
    seconds: float = 0.0  # of this attempt so far
    tokens_per_second: tuple[float, float] = (0.0, 0.0)  # the slowest and the fastest part of the pilot


@dataclass(frozen=True, slots=True)
class Forecast:
    """num_rows and num_completion_tokens: of the whole dataset; seconds: of this attempt, None if nobody can know."""

    num_rows: Range
    num_completion_tokens: Range
    seconds: Range | None

    def to_json(self) -> dict:
        return {name: value and asdict(value) for name, value in asdict(self).items()}


def forecast(pilot: Pilot, goal: Goal, pace: Pace, seed: int = 0) -> Forecast | None:
    """What the run comes to if it goes on as in the pilot. None if that has no end that the pilot could tell.

    The same arguments give the same ranges.
    """
    draw = np.random.default_rng(seed)
    steps = _columns(pilot)  # [S, 4]: 1, kept, rows, tokens
    means, is_later = _resample(steps, draw)  # [N, 4], [N]
    speeds = draw.uniform(*sorted(pace.tokens_per_second), len(means)) if max(pace.tokens_per_second) > 0 else None
    remaining = _remaining(pilot, goal, pace, speeds)  # column -> what is left of it, a number or [N]
    if not remaining:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        counts = {column: left / means[:, column] for column, left in remaining.items()}  # steps to come
    columns = np.array(list(counts))
    num_steps = np.stack([np.where(np.isnan(each), np.inf, each) for each in counts.values()])  # [limits, N]
    first = num_steps.argmin(axis=0)
    num_steps = num_steps.min(axis=0)
    limit = columns[first]  # [N]: the column that ends the run
    is_known = np.isfinite(num_steps)
    if is_known.mean() < 0.5:
        return None
    num_steps = np.where(is_known, num_steps, num_steps[is_known].max())
    spread = _spread(steps, means, limit, is_later) * np.sqrt(num_steps)[:, None]  # [N, 4]
    added = np.maximum(means * num_steps[:, None] + spread * draw.standard_normal((len(means), 1)), 0)
    rows = _within(pilot.num_rows + added[:, 2], goal.max_rows, pilot.num_rows)
    tokens = _within(pilot.num_tokens + added[:, 3], goal.max_completion_tokens, pilot.num_tokens)
    seconds = None
    if speeds is not None:
        seconds = pace.seconds + np.maximum(added[:, 3] - pace.num_tokens_ahead, 0) / speeds
        if goal.max_seconds is not None:
            seconds = np.minimum(seconds, goal.max_seconds)
        seconds = _range(seconds, 1)
    return Forecast(_range(rows, 0), _range(tokens, 0), seconds)


def _within(totals: np.ndarray, budget: int | None, so_far: int) -> np.ndarray:
    """Totals cut off at a budget, also where another limit ends the run at about the same time."""
    return totals if budget is None else np.minimum(totals, max(budget, so_far))


def _columns(pilot: Pilot) -> np.ndarray:
    """The steps as rows of (proposals, kept, rows, tokens), at most MAX_STEPS of them. [S, 4]"""
    steps = np.array([(1, *step) for step in pilot.steps], dtype=float)
    if len(steps) <= MAX_STEPS:
        return steps
    return np.stack([block.sum(axis=0) for block in np.array_split(steps, MAX_STEPS)])


def _resample(steps: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Mean steps of NUM_RESAMPLES resamples, and which of them are of the later half. [N, 4], [N]"""
    means = []
    for part in (steps, steps[len(steps) // 2 :]):
        picks = draw.multinomial(len(part), np.full(len(part), 1 / len(part)), NUM_RESAMPLES // 2)  # [N/2, S]
        mean, widen = part.mean(axis=0), np.sqrt(len(part) / max(len(part) - 1, 1))  # a resample's spread is too small
        means.append(np.maximum(mean + widen * (picks @ part / len(part) - mean), 0))
    return np.concatenate(means), np.repeat([False, True], NUM_RESAMPLES // 2)


def _remaining(pilot: Pilot, goal: Goal, pace: Pace, speeds: np.ndarray | None) -> dict[int, float | np.ndarray]:
    """What the goal and the budgets leave, by column: proposals, kept, rows, tokens."""
    left: dict[int, float | np.ndarray] = {}
    if goal.num_proposals is not None:
        left[0] = max(goal.num_proposals - pilot.num_proposals, 0)
    if goal.num_accepted is not None:
        left[1] = max(goal.num_accepted - pilot.num_accepted, 0)
    if goal.max_rows is not None:
        left[2] = max(goal.max_rows - pilot.num_rows, 0)
    tokens: float | np.ndarray = np.inf
    if goal.max_completion_tokens is not None:
        tokens = max(goal.max_completion_tokens - pilot.num_tokens, 0)
    if goal.max_seconds is not None and speeds is not None:
        tokens = np.minimum(tokens, pace.num_tokens_ahead + max(goal.max_seconds - pace.seconds, 0) * speeds)
    if np.isfinite(tokens).all():
        left[3] = tokens
    return left


def _spread(steps: np.ndarray, means: np.ndarray, limit: np.ndarray, is_later: np.ndarray) -> np.ndarray:
    """Standard deviation, by step, of each column beside what follows from the one that ends the run. [N, 4]

    What ends the run is fixed, so of the others only what does not go with it varies.
    """
    spread = np.zeros_like(means)
    for column in np.unique(limit):
        for later in (False, True):
            chosen = (limit == column) & (is_later == later)
            part = steps[len(steps) // 2 :] if later else steps
            mean = part.mean(axis=0)
            rest = part - np.outer(part[:, column], mean / mean[column] if mean[column] else 0 * mean)
            spread[chosen] = rest.std(axis=0, ddof=1) if len(part) > 1 else 0
    return spread


def _range(values: np.ndarray, digits: int) -> Range:
    low, middle, high = (round(float(value), digits) for value in np.percentile(values, (LOW, MIDDLE, HIGH)))
    return Range(middle, low, high)
