"""Budgets: where they stop a method, what they report, and how a run continues with a higher one."""

import json

import pytest

import generation.requester
from generation.config.common import BudgetConfig
from generation.config.methods import SelfInstructConfig
from generation.request_log import RequestLog
from generation.synthesize import budget_hint
from tests.generation.harness import CoroutinePool, Made, drive

CONFIG = SelfInstructConfig(num_instructions=40, max_concurrent_proposals=8, rows_per_shard=25, checkpoint_seconds=0)


def with_budget(**limits: object) -> SelfInstructConfig:
    return CONFIG.model_copy(update={"budget": BudgetConfig(**limits)})


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory) -> Made:
    return drive(tmp_path_factory.mktemp("unlimited"), CoroutinePool(0), CONFIG)


def go_on(folder, pool: CoroutinePool, config: SelfInstructConfig) -> Made:
    """Open a sealed dataset again, as the stage does after a budget was raised."""
    (folder / "data" / "synthesized" / "manifest.json").unlink(missing_ok=True)
    return drive(folder, pool, config)


@pytest.mark.parametrize("timing", [1, 2])
def test_tokens_are_spent_up_to_the_limit_and_a_higher_limit_continues(unlimited, tmp_path, timing):
    total = unlimited.requester.num_completion_tokens
    pool = CoroutinePool(timing)
    made = drive(tmp_path, pool, with_budget(max_completion_tokens=total // 2))
    assert (made.driver.spent_budget, bool(made.rows)) == ("max_completion_tokens", True)
    longest = 200  # words of the longest answer here
    assert total // 2 <= made.requester.num_completion_tokens <= total // 2 + longest
    with RequestLog(tmp_path / "requests") as log:
        assert log.ids() == {request.request_id for request in pool.requests}  # every request is saved
    again = CoroutinePool(timing + 10)
    finished = go_on(tmp_path, again, with_budget(max_completion_tokens=10 * total))
    assert {r.request_id for r in again.requests}.isdisjoint(r.request_id for r in pool.requests)
    assert finished.data == unlimited.data
    assert (finished.driver.stopped_because, finished.driver.spent_budget) == ("", None)


def test_instructions_in_flight_when_the_tokens_are_spent_are_finished(tmp_path, unlimited):
    made = drive(tmp_path, CoroutinePool(3), with_budget(max_completion_tokens=2000))
    assert len(made.instructions) == made.driver.state.num_accepted - made.driver.num_unfinished
    rows = {row["id"]: row for row in unlimited.rows}
    assert made.rows == [rows[row["id"]] for row in made.rows]


def test_tokens_of_earlier_attempts_count_after_a_checkpoint(unlimited, tmp_path):
    limit = unlimited.requester.num_completion_tokens * 3 // 4
    config = with_budget(max_completion_tokens=limit)
    with pytest.raises(ExceptionGroup):
        drive(tmp_path, CoroutinePool(0, max_requests=70), config)
    assert (tmp_path / "data" / "progress.json").is_file()
    with RequestLog(tmp_path / "requests") as log:
        before = len(log)
    pool = CoroutinePool(1)
    made = drive(tmp_path, pool, config)
    assert before == 70
    assert made.driver.spent_budget == "max_completion_tokens"
    with RequestLog(tmp_path / "requests") as log:
        spent = sum(sample["num_tokens"] for request_id in log.ids() for sample in log.get(request_id)["samples"])
    assert limit <= spent <= limit + 200


def test_tokens_of_a_budget_smaller_than_one_answer(tmp_path):
    made = drive(tmp_path, CoroutinePool(0), with_budget(max_completion_tokens=1))
    assert (made.driver.spent_budget, made.instructions) == ("max_completion_tokens", [])
    assert made.requester.num_generated == 1


def test_max_minutes_stops_the_run(unlimited, tmp_path, monkeypatch):
    """The clock advances a second with every request."""
    pool = CoroutinePool(0)
    monkeypatch.setattr(generation.requester.time, "monotonic", lambda: float(len(pool.requests)))
    made = drive(tmp_path, pool, with_budget(max_minutes=1))
    assert made.driver.stopped_because == "budget.max_minutes=1 reached"
    assert 60 <= len(pool.requests) <= 62
    monkeypatch.undo()
    assert go_on(tmp_path, CoroutinePool(1), CONFIG).data == unlimited.data


@pytest.mark.parametrize("max_rows", [1, 12, 23])
def test_rows_are_cut_at_the_same_place_whatever_was_checkpointed_before(unlimited, tmp_path, max_rows):
    """Also if the limit is lowered after a checkpoint with more rows."""
    config = with_budget(max_rows=max_rows)
    with pytest.raises(ExceptionGroup):
        drive(tmp_path / "further", CoroutinePool(3, max_requests=85), CONFIG)
    progress = json.loads((tmp_path / "further" / "data" / "progress.json").read_text())
    assert sum(progress["num_rows_by_method"].values()) >= 23
    runs = [drive(tmp_path / str(timing), CoroutinePool(timing), config) for timing in range(3)]
    runs.append(drive(tmp_path / "further", CoroutinePool(5), config))
    for made in runs:
        assert made.rows == unlimited.rows[:max_rows]
        assert made.data == runs[0].data
        assert made.driver.committed == runs[0].driver.committed
        assert made.driver.stopped_because == f"budget.max_rows={max_rows} reached"
    finished = go_on(tmp_path / "1", CoroutinePool(9), with_budget(max_rows=10**6))
    assert finished.data == unlimited.data


def test_a_budget_that_is_not_reached_changes_nothing(unlimited, tmp_path):
    config = with_budget(max_rows=10**6, max_completion_tokens=10**9, max_minutes=1e6)
    made = drive(tmp_path, CoroutinePool(4), config)
    assert (made.data, made.driver.spent_budget) == (unlimited.data, None)


def test_speculative_requests_that_the_budget_refuses_do_not_make_a_complete_dataset_incomplete(unlimited, tmp_path):
    """The limit equals what the dataset needs, so only proposals beyond the goal are refused."""
    needed = unlimited.driver.committed.num_completion_tokens
    for limit in (needed, needed + 1):
        made = drive(tmp_path / str(limit), CoroutinePool(2), with_budget(max_completion_tokens=limit))
        assert (made.driver.spent_budget is None) == (made.data == unlimited.data)
        assert (made.driver.stopped_because == "") == (made.driver.spent_budget is None)


def test_the_hint_names_a_higher_limit():
    hint = budget_hint({"spent_budget": "max_rows"}, BudgetConfig(max_rows=2_000_000))
    assert "synthesize.budget.max_rows=4000000," in hint
    assert "synthesize.budget.max_rows=null" in hint
    hint = budget_hint({"spent_budget": "max_minutes"}, BudgetConfig(max_minutes=1.5))
    assert "synthesize.budget.max_minutes=3," in hint
    assert budget_hint({"spent_budget": None}, BudgetConfig()) == ""
