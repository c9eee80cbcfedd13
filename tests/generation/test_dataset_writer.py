"""A sealed dataset opens with `datasets`, and has the same bytes wherever writing it was interrupted."""

import json

import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.run.manifest import is_sealed, verify_manifest
from generation.dataset_writer import DatasetWriter
from generation.filters.drafts import Draft, Instance, Neighbor, Rejection
from generation.records import INSTRUCTION_SCHEMA, REJECTED_SCHEMA, SCHEMA, Origin, RejectedRecord, human_record
from tests.generation.harness import read_rows


def record(number: int) -> dict:
    origin = Origin("seed", f"task-{number}", seed_ids=(f"task-{number}",), license="CC0-1.0")
    return human_record(origin, f"Do number {number}.", Instance("ü" * (number % 3), f"Done {number}."), 0).to_row()


def write(folder, rows: list[dict], rows_per_shard: int) -> dict:
    writer = DatasetWriter(folder, SCHEMA, rows_per_shard)
    for row in rows:
        writer.add(row)
    return writer.seal(note="x")


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_rows=st.integers(0, 9), rows_per_shard=st.integers(1, 10))
def test_datasets_opens_what_was_written_in_order(tmp_path, num_rows, rows_per_shard):
    rows = [record(number) for number in range(num_rows)]
    manifest = write(tmp_path, rows, rows_per_shard)
    assert manifest["rows"] == num_rows
    assert manifest["columns"] == SCHEMA.names
    dataset = load_from_disk(str(tmp_path))
    assert dataset.column_names == SCHEMA.names
    expected = [{**row, "seed_ids": list(row["seed_ids"]), "parent_ids": list(row["parent_ids"])} for row in rows]
    assert dataset.to_list() == expected
    assert read_rows(tmp_path) == expected
    assert len(list(tmp_path.glob("data-*.arrow"))) == max(1, -(-num_rows // rows_per_shard))


def test_rejects_open_in_the_same_way(tmp_path):
    rejected = RejectedRecord(
        "instruction", Rejection("not_novel", "0.8"), "r", 3, Draft("Do it again."), nearest=(Neighbor("a", 0.8),)
    )
    writer = DatasetWriter(tmp_path, REJECTED_SCHEMA, 10)
    writer.add(rejected.to_row())
    writer.seal()
    (row,) = load_from_disk(str(tmp_path)).to_list()
    assert (row["reason"], row["nearest"]) == ("not_novel", [{"id": "a", "score": 0.8}])


def test_a_new_writer_removes_the_files_of_an_interrupted_one(tmp_path):
    rows = [record(number) for number in range(10)]
    undisturbed = write(tmp_path / "undisturbed", rows, 3)
    interrupted = DatasetWriter(tmp_path / "again", SCHEMA, 2)
    for row in reversed(rows):
        interrupted.add(row)
    assert not is_sealed(tmp_path / "again")
    assert write(tmp_path / "again", rows, 3)["files"] == undisturbed["files"]
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "undisturbed").iterdir())


def test_a_new_writer_removes_the_old_manifest_first(tmp_path):
    write(tmp_path, [record(0)], 1)
    DatasetWriter(tmp_path, SCHEMA, 1)
    with pytest.raises(InputError, match="unfinished"):
        verify_manifest(tmp_path)


def test_a_damaged_shard_is_named(tmp_path):
    write(tmp_path, [record(0)], 1)
    shard = tmp_path / "data-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"data-00000\.arrow: corrupt"):
        read_rows(tmp_path)


# -- going on after an interruption

instruction_rows = st.fixed_dictionaries(
    {
        "id": st.text(max_size=4),
        "instruction": st.text(max_size=40),
        "input": st.none() | st.text(max_size=9),
        "is_classification": st.none() | st.booleans(),
        "request_id": st.just("r"),
        "round": st.integers(0, 4),
        "parent_ids": st.none() | st.lists(st.text(max_size=3), max_size=3),
        "seed_ids": st.lists(st.none() | st.text(max_size=3), max_size=2),
        "nearest": st.lists(st.fixed_dictionaries({"id": st.text(max_size=3), "score": st.floats(0, 1)}), max_size=2),
    }
)


def seal_instructions(folder, rows: list[dict], rows_per_shard: int, checkpoints: list[tuple[int, int]]) -> list[dict]:
    """Write rows in several attempts. Each resumes from the last checkpoint, makes one after some rows, and is lost
    after some more. Returns the files of the manifest."""
    writer, state, num_saved = DatasetWriter(folder, INSTRUCTION_SCHEMA, rows_per_shard), None, 0
    for number, (num_until_saved, num_lost) in enumerate(checkpoints):
        if state:
            writer = DatasetWriter(folder, INSTRUCTION_SCHEMA, rows_per_shard, json.loads(state))
        for row in rows[num_saved : num_saved + num_until_saved]:
            writer.add(row)
        num_saved = min(num_saved + num_until_saved, len(rows))
        writer.save_tail(number)
        state = json.dumps(writer.state())
        writer.remove_old_tails()
        for row in rows[num_saved : num_saved + num_lost]:
            writer.add(row)
    if state:
        writer = DatasetWriter(folder, INSTRUCTION_SCHEMA, rows_per_shard, json.loads(state))
    assert writer.num_rows == num_saved
    for row in rows[num_saved:]:
        writer.add(row)
    manifest = writer.seal()
    assert not list(folder.glob(".*.tmp"))
    assert sorted(path.name for path in folder.glob("data-*")) == [
        entry["name"] for entry in manifest["files"] if entry["name"].startswith("data-")
    ]
    return manifest["files"]


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(instruction_rows, max_size=12),
    rows_per_shard=st.integers(1, 6),
    checkpoints=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=4),
)
def test_the_bytes_are_the_same_wherever_it_was_interrupted(tmp_path_factory, rows, rows_per_shard, checkpoints):
    folder = tmp_path_factory.mktemp("interrupted")
    interrupted = seal_instructions(folder, rows, rows_per_shard, checkpoints)
    undisturbed = seal_instructions(tmp_path_factory.mktemp("undisturbed"), rows, rows_per_shard, [])
    assert interrupted == undisturbed
    assert read_rows(folder) == rows


def interrupted_state(folder, num_rows: int = 8) -> dict:
    """Two shards of three rows and a tail of two."""
    writer = DatasetWriter(folder, SCHEMA, 3)
    for number in range(num_rows):
        writer.add(record(number))
    writer.save_tail(1)
    return writer.state()


def test_the_state_names_shards_and_tail(tmp_path):
    state = interrupted_state(tmp_path)
    assert [(entry["name"], entry["rows"]) for entry in (*state["shards"], state["tail"])] == [
        ("data-00000.arrow", 3),
        ("data-00001.arrow", 3),
        ("tail-00001.arrow", 2),
    ]
    assert all((tmp_path / entry["name"]).stat().st_size == entry["bytes"] for entry in state["shards"])


def test_a_tail_that_did_not_grow_is_not_written_again(tmp_path):
    writer = DatasetWriter(tmp_path, SCHEMA, 3)
    writer.add(record(0))
    writer.save_tail(1)
    before = writer.state()
    writer.save_tail(2)
    assert writer.state() == before
    writer.add(record(1))
    writer.save_tail(3)
    assert writer.state()["tail"]["name"] == "tail-00003.arrow"
    assert (tmp_path / "tail-00001.arrow").exists()  # until the caller has the new state in a safe place
    writer.remove_old_tails()
    assert [path.name for path in tmp_path.glob("tail-*")] == ["tail-00003.arrow"]


@pytest.mark.parametrize("name", ["data-00000.arrow", "data-00001.arrow", "tail-00001.arrow"])
@pytest.mark.parametrize("cut", [True, False])
def test_resuming_without_a_file_of_the_state_is_an_error(tmp_path, name, cut):
    state = interrupted_state(tmp_path)
    if cut:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-8])
    else:
        (tmp_path / name).unlink()
    with pytest.raises(InputError, match=rf"{tmp_path / name}: .*(missing|bytes long).*Restore it, or remove"):
        DatasetWriter(tmp_path, SCHEMA, 3, state)


def test_resuming_with_another_shard_size_is_an_error(tmp_path):
    with pytest.raises(InputError, match="do not have 4 rows"):
        DatasetWriter(tmp_path, SCHEMA, 4, interrupted_state(tmp_path))


def test_a_row_without_all_columns_is_an_error(tmp_path):
    writer = DatasetWriter(tmp_path, SCHEMA, 1)
    with pytest.raises(KeyError, match="license"):
        writer.add({key: value for key, value in record(0).items() if key != "license"})
