"""What `make demo` promises: real engines, a real dataset, real tuning, and a model that got better by it."""

import json
from collections import Counter

import pytest
from datasets import load_from_disk

from cluster.run.manifest import verify_manifest
from generation.request_log import scan_segment
from tests.end_to_end.conftest import CANARY, Demo

pytestmark = pytest.mark.timeout(1200)


def accuracy(demo: Demo) -> dict[str, dict[str, float]]:
    """Exact match by model and group."""
    result = json.loads((demo.run_dir / "result-evaluate.json").read_text())
    return {
        title: {group: figures["exact_match"] for group, figures in groups.items()}
        for title, groups in result["models"].items()
    }


def test_the_demo_ends_well_after_a_kill_and_says_that_it_goes_on(demo):
    first, second, *_ = demo.attempts
    assert first.exit_code == -9
    assert demo.attempts[-1].exit_code == 0
    assert "none will be generated again" in second.output


@pytest.mark.long
def test_the_demo_ends_well_after_two_kills_and_one_ctrl_c(demo):
    assert [attempt.exit_code for attempt in demo.attempts] == [-9, -9, 75, 0]
    assert "resuming from" in demo.attempts[2].output
    assert "answers are there already" in demo.attempts[3].output


def test_no_finished_request_is_generated_again(demo):
    segments = sorted((demo.run_dir / "requests").glob("*.log"))
    ids = [id_bytes for segment in segments for id_bytes, *_ in scan_segment(segment, may_be_torn=False)]
    assert ids and demo.attempts[1].num_logged_before > 0
    assert len(ids) == len(set(ids))


@pytest.mark.long
def test_training_loses_no_step_beyond_the_last_checkpoint(demo):
    rows = [json.loads(line) for line in (demo.run_dir / "metrics.jsonl").open()]
    steps = [row["step"] for row in rows if row["stage"] == "train"]
    done_again = [step for step, count in Counter(steps).items() if count > 1]
    assert set(steps) == set(range(1, max(steps) + 1))
    assert 1 <= len(done_again) <= 20 and min(done_again) > 20  # the recipe saves every 20 steps


def test_the_dataset_opens_with_plain_datasets_and_says_where_rows_come_from(demo):
    folder = demo.run_dir / "data" / "synthesized"
    manifest = verify_manifest(folder)
    dataset = load_from_disk(str(folder))
    assert dataset.num_rows == manifest["rows"] > (300 if demo.overrides else 1000)
    assert len(set(dataset["id"])) == dataset.num_rows
    assert set(dataset["method"]) == {"seed", "self_instruct"}
    written = next(row for row in dataset if row["method"] == "self_instruct")
    assert [turn["role"] for turn in written["messages"]] == ["user", "assistant"]
    assert written["model"] == "models/world-base" and written["seed_ids"] and written["prompt_sha"]


def test_rejected_rows_are_kept_with_their_reason(demo):
    rejected = load_from_disk(str(demo.run_dir / "data" / "rejected"))
    counts = json.loads((demo.run_dir / "result-synthesize.json").read_text())["rejected"]
    assert Counter(rejected["reason"]) == counts and counts["not_novel"] > 0


UNSEEN_PHRASINGS = "seen families, unseen phrasings"


def test_the_tuned_model_beats_the_base_on_unseen_phrasings(demo):
    figures = accuracy(demo)
    assert figures["tuned"][UNSEEN_PHRASINGS] > figures["base, chat"][UNSEEN_PHRASINGS] + 0.1


@pytest.mark.long
def test_the_tuned_model_is_mostly_right_on_unseen_phrasings(demo):
    assert accuracy(demo)["tuned"][UNSEEN_PHRASINGS] > 0.5


def test_the_tables_show_the_figures_of_the_results(demo):
    synthesis = json.loads((demo.run_dir / "result-synthesize.json").read_text())
    assert f"{synthesis['num_generated']:,}" in demo.output
    for figures in accuracy(demo).values():
        for share in figures.values():
            assert f"{share:.1%}" in demo.output
    assert str(demo.run_dir / "export") in demo.output.replace("\n", "")


def test_a_finished_demo_does_nothing_again(demo):
    from tests.end_to_end.conftest import attempt

    before = {path: path.stat().st_mtime_ns for path in demo.run_dir.glob("export/*")}
    again = attempt(demo.run_dir, demo.overrides)
    assert again.exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in demo.run_dir.glob("export/*")} == before


def test_no_secret_reaches_any_file_or_the_terminal(demo):
    assert all(CANARY not in attempt.output for attempt in demo.attempts)
    holding = [path for path in demo.run_dir.rglob("*") if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert holding == []


def test_the_export_holds_no_pickles(demo):
    suffixes = {path.suffix for path in (demo.run_dir / "export").iterdir()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md"}
