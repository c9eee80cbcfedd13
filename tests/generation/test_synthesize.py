"""The whole stage with real Ray and scripted engines: the same bytes after any disturbance, and no request twice."""

import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import load_from_disk
from rich.console import Console

import cluster.log
import generation.metrics
from cluster.config import ModelConfig
from cluster.errors import EXIT_RETRY, InputError, TunesmithError
from cluster.files import sha256_file
from cluster.run.manifest import verify_manifest
from cluster.run.rundir import RunDir
from generation.config.common import BudgetConfig
from generation.config.filters import LengthConfig
from generation.config.methods import SelfInstructConfig
from generation.request_log import RequestLog
from generation.synthesize import run
from launcher.summary import synthesis_table
from tests.fakes import generated_ids, scripted, write_script
from tests.generation.drive_synthesis import synthesize

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROOT = Path(__file__).parents[2]
NUM_INSTRUCTIONS = 120


def contents(run_root: Path) -> dict[str, str]:
    """SHA-256 of every file of the sealed data."""
    for name in ("synthesized", "rejected", "instructions"):
        verify_manifest(run_root / "data" / name)
    files = [path for path in (run_root / "data").rglob("*") if path.is_file()]
    return {str(path.relative_to(run_root)): sha256_file(path) for path in files}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The folder of the model. Its path is in the rows, so every run of this module uses the same."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture
def model(place) -> Path:
    shutil.rmtree(place / "model", ignore_errors=True)
    write_script(place / "model", latency_ms=10)
    return place / "model"


@pytest.fixture(scope="module")
def undisturbed(place):
    """Data, result and run folder of one engine without disturbance."""
    write_script(place / "model", latency_ms=10)
    result = synthesize(place / "model", place / "undisturbed", NUM_INSTRUCTIONS, scripted(max_num_seqs=8))
    return contents(place / "undisturbed"), result, place / "undisturbed"


def test_the_dataset_opens_and_the_result_counts_it(undisturbed):
    _, result, run_root = undisturbed
    rows = load_from_disk(str(run_root / "data" / "synthesized"))
    rejected = load_from_disk(str(run_root / "data" / "rejected"))
    instructions = load_from_disk(str(run_root / "data" / "instructions"))
    assert result == json.loads((run_root / "result-synthesize.json").read_text())
    assert result["num_accepted"] == len(instructions) == NUM_INSTRUCTIONS
    assert result["num_rows"] == len(rows) > result["num_seed_rows"] == rows["method"].count("seed") == 175
    assert sum(result["rejected"].values()) == len(rejected)
    num_rejected_instructions = sum(kind == "instruction" for kind in rejected["kind"])
    assert result["num_generated"] == result["num_accepted"] + num_rejected_instructions
    assert (result["is_complete"], result["resumed_requests"]) == (True, 0)
    for row in rows:
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert (run_root / "data" / "synthesized" / "data-00001.arrow").is_file()


def test_three_engines_make_the_same_bytes_as_one(undisturbed, model, tmp_path):
    synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted(num_replicas=3, max_num_seqs=4, chunk_size=3))
    assert contents(tmp_path / "run") == undisturbed[0]


def test_engines_that_die_change_nothing(undisturbed, model, tmp_path):
    write_script(model, latency_ms=10, die_at=[30, 100, 170])
    result = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted(num_replicas=2, max_num_seqs=8))
    assert contents(tmp_path / "run") == undisturbed[0]
    assert result["num_engine_restarts"] == 3
    assert set(result["rejected"]) == set(undisturbed[1]["rejected"])


def events(run_root: Path) -> list[dict]:
    return [json.loads(line) for line in (run_root / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("fault", "num_hung"), [("poison", 0), ("stall", 2)])
def test_a_prompt_that_kills_or_hangs_every_engine_costs_only_its_own_rows(
    undisturbed, model, tmp_path, capsys, fault, num_hung
):
    whole = load_from_disk(str(undisturbed[2] / "data" / "synthesized"))
    last = load_from_disk(str(undisturbed[2] / "data" / "instructions"))[-1]  # nothing was drawn from it
    write_script(model, latency_ms=10, **{fault: last["instruction"]})
    engine = scripted(num_replicas=2, max_num_seqs=8, max_request_deaths=2, stall_timeout_seconds=4)
    result = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, engine)
    rows = load_from_disk(str(tmp_path / "run" / "data" / "synthesized"))
    assert list(rows) == [row for row in whole if row["task"] != last["id"]]
    rejected = load_from_disk(str(tmp_path / "run" / "data" / "rejected"))
    found = [(row["kind"], row["reason"]) for row in rejected if row["task"] == last["id"]]
    assert found == [("classification", "engine_died")]
    assert (result["num_engine_restarts_hung"], result["num_quarantined"]) == (num_hung, 1)
    assert result["time"]["of_waiting"]["lost_engine"] > 0
    assert [event["event"] for event in events(tmp_path / "run")].count("request_quarantined") == 1
    assert "is quarantined: every engine that had it died" in capsys.readouterr().out


def test_a_spent_budget_seals_the_data_and_a_higher_one_makes_the_same_bytes(undisturbed, model, tmp_path, capsys):
    limit = undisturbed[1]["num_completion_tokens"] // 2
    budget = BudgetConfig(max_completion_tokens=limit)
    engine = scripted(max_num_seqs=8)
    cut = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, engine, budget=budget)
    output = capsys.readouterr().out
    assert (cut["is_complete"], cut["spent_budget"]) == (False, "max_completion_tokens")
    assert f"INCOMPLETE (budget.max_completion_tokens={limit} reached)" in output
    assert f"synthesize.budget.max_completion_tokens={2 * limit}," in output
    assert verify_manifest(tmp_path / "run" / "data" / "synthesized")["rows"] == cut["num_rows"]
    again = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, engine, budget=budget)
    output = capsys.readouterr().out
    assert (again, "already done" in output, "INCOMPLETE" in output) == (cut, True, True)
    generated = generated_ids(model)
    synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, engine)
    assert contents(tmp_path / "run") == undisturbed[0]
    assert set(generated).isdisjoint(generated_ids(model)[len(generated) :])


def test_progress_metrics_and_summary_report_speed_and_time_left(undisturbed, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation.metrics, "ROW_SECONDS", 0.0)
    monkeypatch.setattr(cluster.log, "MIN_SECONDS_BETWEEN_UPDATES", 0.0)
    write_script(model, latency_ms=200)
    result = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted(max_num_seqs=4))
    assert re.search(r"about \d+ s left, [\d,]+ rows and [\d,]+ tokens then", capsys.readouterr().out)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    forecasts = [row["forecast"] for row in rows if row.get("forecast")]
    assert forecasts[-1]["num_rows"] == pytest.approx(result["num_rows"], rel=0.1)
    assert forecasts[-1]["num_completion_tokens"] == pytest.approx(result["num_completion_tokens"], rel=0.2)
    assert sum(result["time"]["of_waiting"].values()) == pytest.approx(1, abs=0.01)
    assert {"parse", "filter", "write", "log"} <= result["time"]["of_driver"].keys()
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(synthesis_table(result))
    table = console.export_text()
    for text in ("self_instruct", "writer", "of a request's time: engine", "engine restarts"):
        assert text in table


def start_driver(model: Path, run_root: Path, num_replicas: int) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    arguments = [str(model), str(run_root), str(NUM_INSTRUCTIONS), str(num_replicas)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.generation.drive_synthesis", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_requests(model: Path, num: int, driver: subprocess.Popen) -> None:
    """Wait until the engines have finished `num` requests of this model."""
    while len(generated_ids(model)) < num:
        assert driver.poll() is None, driver.stdout.read()
        time.sleep(0.002)


def logged_ids(run_root: Path, scratch: Path) -> set[str]:
    """Ids in a copy of the log, because opening the log would repair it."""
    shutil.copytree(run_root / "requests", scratch, dirs_exist_ok=True)
    with RequestLog(scratch) as log:
        return log.ids()


def test_killed_at_any_point_the_bytes_are_the_same_and_no_logged_request_is_generated_again(
    undisturbed, model, tmp_path
):
    write_script(model, latency_ms=60)
    run_root = tmp_path / "run"
    draw = random.Random(undisturbed[1]["num_requests"])
    logged: set[str] = set()
    for num_replicas in (1, 3, 2):
        before = len(generated_ids(model))
        driver = start_driver(model, run_root, num_replicas)
        wait_for_requests(model, before + draw.randint(1, 70), driver)
        driver.kill()
        driver.communicate()
        assert logged.isdisjoint(generated_ids(model)[before:])
        assert not (run_root / "data" / "synthesized" / "manifest.json").exists()
        logged = logged_ids(run_root, tmp_path / "copy")
    before = len(generated_ids(model))
    result = synthesize(model, run_root, NUM_INSTRUCTIONS, scripted(max_num_seqs=8))
    assert logged.isdisjoint(generated_ids(model)[before:])
    assert 0 < result["resumed_requests"] <= len(logged)
    assert contents(run_root) == undisturbed[0]


@pytest.mark.parametrize(
    "signals",
    [pytest.param([signal.SIGTERM], marks=pytest.mark.long), [signal.SIGINT, signal.SIGINT, signal.SIGTERM]],
)
def test_a_signal_preempts_the_stage_and_more_signals_change_nothing(undisturbed, model, tmp_path, signals):
    write_script(model, latency_ms=60)
    driver = start_driver(model, tmp_path / "run", 1)
    wait_for_requests(model, 25, driver)
    for number in signals:
        driver.send_signal(number)
    output, _ = driver.communicate()
    assert driver.returncode == EXIT_RETRY, output
    logged = logged_ids(tmp_path / "run", tmp_path / "copy")
    assert f"Preempted: stopped by {signals[0].name}; {len(logged)} finished requests are saved" in output
    assert [event["event"] for event in events(tmp_path / "run")] == ["started", "preempted"]
    synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted(max_num_seqs=8))
    assert contents(tmp_path / "run") == undisturbed[0]


def test_a_finished_run_is_skipped_with_a_message(undisturbed, model, capsys):
    _, result, run_root = undisturbed
    times = {path: path.stat().st_mtime_ns for path in (run_root / "data").rglob("*")}
    again = synthesize(model, run_root, NUM_INSTRUCTIONS, scripted())
    assert again == result
    assert "already done" in capsys.readouterr().out
    assert generated_ids(model) == []
    assert {path: path.stat().st_mtime_ns for path in (run_root / "data").rglob("*")} == times


def test_finished_data_of_other_settings_is_refused(undisturbed, model):
    with pytest.raises(InputError, match="made with other settings"):
        synthesize(model, undisturbed[2], NUM_INSTRUCTIONS + 1, scripted())


def test_damaged_data_is_named_and_not_skipped(undisturbed, model, tmp_path):
    shutil.copytree(undisturbed[2], tmp_path / "run")
    with open(tmp_path / "run" / "data" / "synthesized" / "data-00001.arrow", "r+b") as shard:
        shard.truncate(100)
    with pytest.raises(InputError, match=r"data-00001\.arrow: corrupt"):
        synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted())


def test_a_removed_dataset_is_made_again_from_the_log_alone(undisturbed, model, tmp_path):
    shutil.copytree(undisturbed[2], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    logged = logged_ids(tmp_path / "run", tmp_path / "copy")
    result = synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted())
    assert contents(tmp_path / "run") == undisturbed[0]
    assert result["resumed_requests"] >= result["num_requests"]
    assert logged.isdisjoint(generated_ids(model))  # a request beyond the last one needed may be new


def test_a_run_folder_in_use_is_refused(model, tmp_path):
    driver = start_driver(model, tmp_path / "run", 1)
    try:
        wait_for_requests(model, 1, driver)
        with pytest.raises(InputError, match=f"in use by another process .pid {driver.pid}"):
            synthesize(model, tmp_path / "run", NUM_INSTRUCTIONS, scripted())
    finally:
        driver.kill()
        driver.communicate()


def test_an_incomplete_dataset_is_reported(model, tmp_path, capsys):
    config = SelfInstructConfig(num_instructions=1000, max_requests=2)
    result = run(config, ModelConfig(path=str(model)), scripted(), RunDir(tmp_path / "run"), 0)
    assert (result["is_complete"], result["stopped_because"]) == (False, "max_requests=2 reached")
    assert 0 < result["num_accepted"] < 1000
    assert "INCOMPLETE (max_requests=2 reached)" in capsys.readouterr().out


def test_no_row_is_a_failure_with_the_reasons_and_the_rejects_are_written(model, tmp_path):
    config = SelfInstructConfig(instruction_filters=(LengthConfig(min_words=100),), max_empty_requests=3)
    message = r"no row was made from 21 generated instructions: .*Most, 21, were rejected by the filter `length` of "
    with pytest.raises(TunesmithError, match=message + r"synthesize\.instruction_filters: .* \(\d words\)(; .*){2}\. "):
        run(config, ModelConfig(path=str(model)), scripted(), RunDir(tmp_path / "run"), 0)
    rejected = load_from_disk(str(tmp_path / "run" / "data" / "rejected"))
    assert rejected["filter"] == ["length"] * 21 and verify_manifest(tmp_path / "run" / "data" / "rejected")
    assert not (tmp_path / "run" / "data" / "synthesized" / "manifest.json").exists()


def test_a_model_brings_its_own_seeds_and_prompts(model, tmp_path):
    own = model / "tunesmith"
    own.mkdir()
    seed = {"id": "own", "name": "own", "instruction": "Say something of your own.", "is_classification": False}
    (own / "seed_tasks.jsonl").write_text(json.dumps({**seed, "instances": [{"input": "", "output": "mine"}]}))
    shutil.copytree(ROOT / "generation" / "prompts" / "self_instruct", own / "prompts" / "self_instruct")
    config = SelfInstructConfig(num_instructions=5)
    result = run(config, ModelConfig(path=str(model)), scripted(), RunDir(tmp_path / "run"), 0)
    rows = load_from_disk(str(tmp_path / "run" / "data" / "synthesized"))
    assert result["num_seed_rows"] == 1
    assert rows[0]["messages"][1]["content"] == "mine"
    assert rows[1]["prompt_name"] in ("self_instruct/input_first", "self_instruct/output_first")
