"""With a made-up method, the driver makes the same data whatever the timing, and wherever it is killed."""

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import generation.driver
from cluster.run.rundir import RunDir
from generation.accepted import Demonstration
from generation.config.common import BudgetConfig, SynthesisConfig
from generation.config.filters import ExactDuplicateConfig, NoveltyConfig
from generation.driver import Driver
from generation.filters.drafts import Draft, Instance, Rejection
from generation.method import AcceptedInstruction, InstructionResult, Proposal
from generation.records import Origin, Record, RejectedRecord, human_record
from generation.requester import BudgetReached
from generation.state import Timers
from generation.synthesize import open_sink
from tests.generation.harness import read_rows

WORDS = "amber basil candle dune ember fjord glacier".split()  # noqa: SIM905


class Killed(Exception):
    """Simulates the death of the process: nothing after it is saved."""


@dataclass
class MadeUp:
    """Proposals of 0 to 4 drafts, some broken, some alike; 0 to 3 rows of each accepted instruction.

    All of it follows from the proposal's number and what it may see, and comes after a random number of turns.
    """

    data_seed: int
    timing: int
    num_wanted: int | None = 30
    max_proposals: int | None = None
    exhausted: str = ""
    num_steps_to_kill: int | None = None  # proposals and finishes that are let through
    num_steps_to_spend: int | None = None

    def __post_init__(self) -> None:
        self._clock = Random(self.timing)
        self.seen: dict[int, tuple[str, ...]] = {}  # what each proposal saw
        self.num_open = self.max_open = 0
        self.num_steps = 0

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return [("seed", Draft("amber basil candle dune"))]

    def seed_rows(self) -> Sequence[Record]:
        return [row("seed", number, f"seed {number}") for number in range(3)]

    async def _step(self) -> None:
        for _ in range(self._clock.randrange(12)):
            await asyncio.sleep(0)
        self.num_steps += 1
        if self.num_steps_to_kill is not None and self.num_steps > self.num_steps_to_kill:
            raise Killed
        if self.num_steps_to_spend is not None and self.num_steps > self.num_steps_to_spend:
            raise BudgetReached("max_completion_tokens", 1)

    def propose(self, number: int, visible: Sequence[Demonstration]):
        self.seen[number] = tuple(demonstration.id for demonstration in visible)
        draw = Random(f"{self.data_seed} {number} {len(visible)} {self.seen[number][-1:]}")
        return self._propose(number, draw)

    async def _propose(self, number: int, draw: Random) -> Proposal:
        await self._step()
        items: list[Draft | RejectedRecord] = []
        for position in range(draw.randrange(5)):
            draft = Draft(" ".join(draw.choices(WORDS, k=4)))
            if draw.random() < 0.2:
                items.append(RejectedRecord("response", Rejection("broken"), f"proposal {number}", position, draft))
            else:
                items.append(draft)
        return Proposal(f"made-up-{number}", tuple(items))

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        await self._step()
        self.num_open -= 1
        draw = Random(f"{self.data_seed} {accepted.id}")
        rows = tuple(row(accepted.id, position, draw.choice(WORDS)) for position in range(draw.randrange(4)))
        rejected = (RejectedRecord("answer", Rejection("empty"), accepted.id, 9, accepted.draft),) * draw.randrange(2)
        return InstructionResult(rows, rejected)


def row(task: str, position: int, text: str) -> Record:
    return human_record(Origin("made-up" if task != "seed" else "seed", task), text, Instance("", text), position)


class EagerDriver(Driver):
    """Saves checkpoints after randomly drawn proposals instead of by the clock."""

    checkpoints = Random(0)

    def _maybe_checkpoint(self, state) -> None:
        if self.checkpoints.random() < 0.3:
            self._last_checkpoint = float("-inf")
            super()._maybe_checkpoint(state)
        else:
            self._last_checkpoint = float("inf")


def drive(folder: Path, method: MadeUp, config: SynthesisConfig, checkpoints: int = 0) -> Driver:
    sink, checkpoint = open_sink(RunDir(folder).create(), config, "sha")
    EagerDriver.checkpoints = Random(checkpoints)
    driver = EagerDriver(method, config, sink, None, Timers())
    asyncio.run(driver.run(checkpoint))
    sink.seal()
    return driver


def data(folder: Path) -> list[list[dict]]:
    return [read_rows(folder / "data" / name) for name in ("synthesized", "rejected", "instructions")]


@pytest.fixture
def folders(tmp_path_factory) -> Callable[[], Path]:
    """Every call makes an empty folder."""
    return lambda: Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))


def config_of(max_concurrent_proposals: int = 4, **fields: object) -> SynthesisConfig:
    """Both kinds of filters reject what resembles earlier data."""
    filters = {
        "instruction_filters": (NoveltyConfig(),),
        "row_filters": (ExactDuplicateConfig(fields=("instruction",)),),
    }
    return SynthesisConfig(
        max_concurrent_proposals=max_concurrent_proposals,
        rows_per_shard=7,
        max_empty_requests=50,
        **{**filters, **fields},
    )


laws = settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 10**6)


def test_drafts_are_accepted_and_rejected_at_every_stage(folders):
    folder = folders()
    drive(folder, MadeUp(1, 0), config_of())
    rows, rejected, instructions = data(folder)
    assert len(instructions) == 30
    assert len(rows) > 5
    assert {row["kind"] for row in rejected} == {"response", "instruction", "answer", "row"}


@laws
@given(seeds, seeds, seeds, st.integers(1, 9))
def test_the_same_data_whatever_the_timing(folders, data_seed, first, second, max_concurrent_proposals):
    config = config_of(max_concurrent_proposals)
    one, other = folders(), folders()
    methods = MadeUp(data_seed, first), MadeUp(data_seed, second)
    drivers = drive(one, methods[0], config), drive(other, methods[1], config, checkpoints=second)
    assert data(one) == data(other)
    assert drivers[0].committed == drivers[1].committed
    common = methods[0].seen.keys() & methods[1].seen.keys()
    assert {n: methods[0].seen[n] for n in common} == {n: methods[1].seen[n] for n in common}


@laws
@given(seeds, st.lists(st.integers(0, 40), min_size=1, max_size=4), seeds, st.integers(1, 9))
def test_killed_at_any_points_and_resumed_from_any_checkpoints_the_data_is_the_same(
    folders, data_seed, kills, timing, max_concurrent_proposals
):
    config = config_of(max_concurrent_proposals)
    whole, killed = folders(), folders()
    expected = drive(whole, MadeUp(data_seed, 0), config)
    for number, num_steps in enumerate(kills):
        method = MadeUp(data_seed, timing + number, num_steps_to_kill=num_steps)
        try:
            drive(killed, method, config, checkpoints=timing + number)
        except ExceptionGroup as errors:
            assert errors.split(Killed)[1] is None
            continue
        break
    else:
        driver = drive(killed, MadeUp(data_seed, timing + 99), config)
        assert driver.committed == expected.committed
    assert data(killed) == data(whole)


def test_after_a_resume_both_kinds_of_filters_remember_committed_data(folders):
    """One case of the test above, known to repeat rows and instructions of before the kill."""
    whole, killed = folders(), folders()
    drive(whole, MadeUp(3, 0, num_wanted=80), config_of())
    with pytest.raises(ExceptionGroup):
        drive(killed, MadeUp(3, 1, num_wanted=80, num_steps_to_kill=90), config_of(), checkpoints=1)
    assert (killed / "data" / "progress.json").is_file()
    drive(killed, MadeUp(3, 2, num_wanted=80), config_of())
    assert data(killed) == data(whole)
    reasons = [row["reason"] for row in data(killed)[1]]
    assert reasons.count("exact_duplicate") > 5
    assert reasons.count("not_novel") > 5


@laws
@given(seeds, seeds, st.integers(1, 9))
def test_a_proposal_sees_what_was_accepted_up_to_max_concurrent_proposals_before_it(
    folders, data_seed, timing, max_concurrent_proposals
):
    method = MadeUp(data_seed, timing)
    folder = folders()
    drive(folder, method, config_of(max_concurrent_proposals))
    instructions = [row["id"] for row in data(folder)[2]]
    number_of = {name: int(name.split("-")[2]) for name in instructions}
    for number, seen in method.seen.items():
        assert list(seen) == [name for name in instructions if number_of[name] <= number - max_concurrent_proposals]


@pytest.mark.parametrize("max_open", [1, 3])
def test_never_more_pending_instructions_than_allowed(folders, monkeypatch, max_open):
    whole, bounded = folders(), folders()
    free = MadeUp(5, 0)
    drive(whole, free, config_of(max_concurrent_proposals=9))
    assert free.max_open > 3
    monkeypatch.setattr(generation.driver, "MAX_PENDING", max_open)
    method = MadeUp(5, 0)
    drive(bounded, method, config_of(max_concurrent_proposals=9))
    assert method.max_open == max_open
    assert data(bounded) == data(whole)


@laws
@given(seeds, seeds, st.integers(1, 40))
def test_max_rows_cuts_at_the_same_place_whatever_the_timing(folders, data_seed, timing, max_rows):
    config = config_of(budget=BudgetConfig(max_rows=max_rows))
    whole, one, other = folders(), folders(), folders()
    drive(whole, MadeUp(data_seed, 0), config_of())
    drivers = [
        drive(one, MadeUp(data_seed, 0, num_wanted=30), config),
        drive(other, MadeUp(data_seed, timing, num_wanted=30), config, checkpoints=timing),
    ]
    assert data(one) == data(other)
    assert drivers[0].committed == drivers[1].committed
    assert drivers[0].stopped_because == drivers[1].stopped_because
    rows, all_rows = data(one)[0], data(whole)[0]
    assert rows == all_rows[:max_rows]
    assert (drivers[0].spent_budget == "max_rows") == (max_rows <= len(all_rows))


@laws
@given(seeds, seeds, st.integers(0, 60))
def test_instructions_that_a_budget_cuts_off_are_left_out_whole(folders, data_seed, timing, num_steps):
    whole, cut = folders(), folders()
    drive(whole, MadeUp(data_seed, 0), config_of())
    driver = drive(cut, MadeUp(data_seed, timing, num_steps_to_spend=num_steps), config_of(), checkpoints=timing)
    rows, all_rows = data(cut), data(whole)
    if driver.spent_budget is None:
        assert rows == all_rows
        return
    assert driver.stopped_because == "budget.max_completion_tokens=1 reached"
    assert len(rows[2]) == driver.state.num_accepted - driver.num_unfinished
    position = {row["id"]: place for place, row in enumerate(all_rows[2])}
    places = [position[row["id"]] for row in rows[2]]
    assert places == sorted(places)  # gaps, and what is there is in order


def test_seed_rows_count_for_the_budget(folders):
    folder = folders()
    method = MadeUp(1, 0)
    driver = drive(folder, method, config_of(budget=BudgetConfig(max_rows=2)))
    assert [row["task"] for row in data(folder)[0]] == ["seed", "seed"]
    assert (driver.spent_budget, method.num_steps) == ("max_rows", 0)
