"""After every injected fault the data has the same bytes as without, and every id once."""

import contextlib
import os
from collections import Counter
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from cluster.files import sha256_file
from cluster.run.manifest import is_sealed, verify_manifest
from cluster.run.rundir import RunDir
from generation.config.common import BudgetConfig
from generation.config.filters import ExactDuplicateConfig
from generation.config.methods import SelfInstructConfig
from generation.inputs import check_inputs, load_inputs
from generation.request_log import RequestLog
from tests.conftest import SmallDisk
from tests.fakes import scripted, write_script
from tests.generation.harness import CoroutinePool, Made, drive, prompt_text, read_rows

CONFIG = SelfInstructConfig(
    num_instructions=15,
    max_concurrent_proposals=4,
    rows_per_shard=10,
    checkpoint_seconds=0,
    row_filters=(ExactDuplicateConfig(fields=("output",)),),
)
DURABLE_CALLS = ("fsync", "replace", "rename", "write", "ftruncate", "unlink")
KIB = 2**10


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of the sealed data. Also checks that no id occurs twice."""
    for name in ("synthesized", "rejected", "instructions"):
        verify_manifest(folder / "data" / name)
        counts = Counter(row["id"] for row in read_rows(folder / "data" / name))
        assert set(counts.values()) <= {1}
    files = [path for path in (folder / "data").rglob("*.arrow")]
    return {str(path.relative_to(folder)): sha256_file(path) for path in files if not path.name.startswith("tail-")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[dict[str, str], Made]:
    folder = tmp_path_factory.mktemp("undisturbed")
    made = drive(folder, CoroutinePool(0), CONFIG)
    return contents(folder), made


class Dead(BaseException):
    """Simulates the death of the process."""


class Mortal:
    """Counts the calls that change the disk, and dies at one of them: no later call reaches the disk.

    A write dies when half of it is done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, dies_at: int | None) -> None:
        self.num_calls = 0
        for name in DURABLE_CALLS:
            monkeypatch.setattr(os, name, self._counted(name, getattr(os, name), dies_at))

    def _counted(self, name: str, call, dies_at: int | None):
        def counted(*arguments, **options):
            self.num_calls += 1
            if dies_at is not None and self.num_calls >= dies_at:
                if name == "write" and self.num_calls == dies_at:
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise Dead
            return call(*arguments, **options)

        return counted


def logged(folder: Path) -> set[str]:
    with RequestLog(folder / "requests") as log:
        return log.ids()


def dies(folder: Path, dies_at: int | None, timing: int) -> int:
    """Drive until death. Returns the number of counted calls."""
    with pytest.MonkeyPatch.context() as patch:
        mortal = Mortal(patch, dies_at)
        with contextlib.suppress(Dead, BaseExceptionGroup):
            drive(folder, CoroutinePool(timing), CONFIG)
        return mortal.num_calls


NUM_POINTS = 24


@pytest.mark.parametrize("part", range(NUM_POINTS))
def test_killed_at_any_durable_call_it_makes_the_same_bytes(undisturbed, tmp_path, num_durable_calls, part):
    """Calls spread over the run, and its last ten, which seal the data."""
    last = part - (NUM_POINTS - 10)
    dies_at = num_durable_calls - 9 + last if last >= 0 else 1 + num_durable_calls * part // (NUM_POINTS - 10)
    dies(tmp_path, dies_at, timing=0)
    before = logged(tmp_path)
    pool = CoroutinePool(1)
    if not is_sealed(tmp_path / "data" / "synthesized"):
        drive(tmp_path, pool, CONFIG)
    assert contents(tmp_path) == undisturbed[0]
    assert before.isdisjoint(request.request_id for request in pool.requests)


@pytest.fixture(scope="module")
def num_durable_calls(tmp_path_factory) -> int:
    return dies(tmp_path_factory.mktemp("counted"), None, timing=0)


def test_killed_repeatedly_it_makes_the_same_data(undisturbed, tmp_path, num_durable_calls):
    for number, dies_at in enumerate((num_durable_calls // 4, 3, num_durable_calls // 6, 17, num_durable_calls // 4)):
        dies(tmp_path, dies_at, timing=number)
    assert not is_sealed(tmp_path / "data" / "synthesized")
    drive(tmp_path, CoroutinePool(9), CONFIG)
    assert contents(tmp_path) == undisturbed[0]


def test_a_torn_last_record_is_generated_again(undisturbed, tmp_path):
    with pytest.raises(ExceptionGroup):
        drive(tmp_path, CoroutinePool(0, max_requests=25), CONFIG)
    log = tmp_path / "requests" / "00000.log"
    os.truncate(log, log.stat().st_size - 7)
    before = logged(tmp_path)
    assert len(before) == 24
    pool = CoroutinePool(1)
    drive(tmp_path, pool, CONFIG)
    assert contents(tmp_path) == undisturbed[0]
    assert before.isdisjoint(request.request_id for request in pool.requests)


@pytest.mark.parametrize("num_kib", [16, 64, 120])
def test_a_full_disk_is_named_and_the_same_command_continues(undisturbed, small_disk: SmallDisk, num_kib):
    """The disk fills up in the log, in a shard or in a checkpoint; afterwards there is space again."""
    small_disk.resize(num_kib * KIB)
    folder = small_disk.path / "run"
    with pytest.raises((InputError, ExceptionGroup)) as caught:
        drive(folder, CoroutinePool(0), CONFIG)
    assert "the disk is full" in str(first(caught.value))
    small_disk.resize(16 * KIB * KIB)
    before = logged(folder) if (folder / "requests").is_dir() else set()
    pool = CoroutinePool(1)
    drive(folder, pool, CONFIG)
    assert contents(folder) == undisturbed[0]
    assert before.isdisjoint(request.request_id for request in pool.requests)


def first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def strange(request: GenerationRequest) -> str | tuple[str, str]:
    """Of eight answers one is garbage, one is empty and one is endless; the others are as usual."""
    kind = int(request.request_id[:8], 16) % 8
    if kind == 0:
        return "\x00\ufffd ]]>{{%s}} \u202e 999999999. \n\n3.\n-1.\nExample 99\nOutput:\nOutput:\n\n"
    if kind == 1:
        return ""
    if kind == 2:
        return "and so on " * 3000, "length"
    return CoroutinePool.scripted(request)


def test_garbage_empty_and_endless_answers_are_rejected_and_the_rest_is_accepted(tmp_path):
    config = CONFIG.model_copy(update={"num_instructions": 40})
    made = drive(tmp_path / "one", CoroutinePool(0, answer=strange), config)
    assert len(made.instructions) == 40
    assert {"truncated_response", "no_instance"} <= made.reasons
    tasks = {row["task"] for row in made.rows} | {row["task"] for row in made.rejected}
    assert {row["id"] for row in made.instructions} <= tasks  # nothing is lost without a word
    with pytest.raises(ExceptionGroup):
        drive(tmp_path / "two", CoroutinePool(1, max_requests=60, answer=strange), config)
    drive(tmp_path / "two", CoroutinePool(2, answer=strange), config)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize("reason", ["engine_died", "prompt_too_long"])
def test_a_request_that_no_engine_answers_costs_its_own_rows_only(undisturbed, tmp_path, reason):
    _, whole = undisturbed
    last = whole.instructions[-1]  # nothing was drawn from it

    def answer(request: GenerationRequest) -> str | tuple[str, str]:
        prompt = prompt_text(request)
        is_hit = last["instruction"] in prompt and prompt.endswith("Is it classification?")
        return ("", reason) if is_hit else CoroutinePool.scripted(request)

    made = drive(tmp_path, CoroutinePool(1, answer=answer), CONFIG)
    assert made.rows == [row for row in whole.rows if row["task"] != last["id"]]
    found = [row for row in made.rejected if row["task"] == last["id"]]
    assert [(row["kind"], row["reason"]) for row in found] == [("classification", reason)]
    assert [row["id"] for row in made.instructions] == [row["id"] for row in whole.instructions]


@pytest.fixture
def recorded(tmp_path) -> tuple[RunDir, ModelConfig]:
    model = write_script(tmp_path / "model")
    run = RunDir(tmp_path / "run")
    check_inputs(run, load_inputs(CONFIG, model, scripted(), seed=1))
    return run, model


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"max_concurrent_proposals": 5}, "synthesize.max_concurrent_proposals: was 4, is 5"),
        ({"num_instructions": 16}, "synthesize.num_instructions: was 15, is 16"),
        ({"row_filters": ()}, "synthesize.row_filters"),
    ],
)
def test_another_recipe_is_refused_and_what_changed_is_named(recorded, fields, change):
    run, model = recorded
    changed = CONFIG.model_copy(update=fields)
    with pytest.raises(InputError, match="made with other settings") as caught:
        check_inputs(run, load_inputs(changed, model, scripted(), seed=1))
    assert change in str(caught.value)
    check_inputs(run, load_inputs(CONFIG, model, scripted(), seed=1))


def test_another_seed_model_or_prompt_is_refused(recorded, tmp_path):
    run, model = recorded
    with pytest.raises(InputError, match="seed: was 1, is 2"):
        check_inputs(run, load_inputs(CONFIG, model, scripted(), seed=2))
    (Path(model.path) / "config.json").write_text('{"model_type": "another"}')
    with pytest.raises(InputError, match=r"models\.writer\.revision"):
        check_inputs(run, load_inputs(CONFIG, model, scripted(), seed=1))


def test_what_does_not_decide_the_data_may_change(recorded):
    run, model = recorded
    changed = CONFIG.model_copy(update={"budget": BudgetConfig(max_rows=7), "checkpoint_seconds": 1.0})
    check_inputs(run, load_inputs(changed, model, scripted(num_replicas=3), seed=1))
    with pytest.raises(InputError, match="max_model_len: was None, is 9"):
        check_inputs(run, load_inputs(changed, model, scripted(max_model_len=9), seed=1))
    with pytest.raises(InputError, match="dtype: was auto, is float16"):
        check_inputs(run, load_inputs(changed, model, scripted(dtype="float16"), seed=1))
