"""A sealed dataset opens with `datasets` as it is, and holds the same bytes however it was interrupted."""

import pytest
from datasets import load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.errors import InputError
from cluster.manifest import is_sealed, verify_manifest
from generation.filters import Instance, Rejection
from generation.novelty import Neighbor
from generation.records import REJECTED_SCHEMA, SCHEMA, Origin, RejectedRecord, human_record
from generation.store import DatasetWriter, read_rows


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
    assert list(read_rows(tmp_path)) == expected
    assert len(list(tmp_path.glob("data-*.arrow"))) == max(1, -(-num_rows // rows_per_shard))


def test_rejects_open_in_the_same_way(tmp_path):
    rejected = RejectedRecord(
        "instruction", Rejection("not_novel", "0.8"), "r", 3, "Do it again.", nearest=(Neighbor("a", 0.8),)
    )
    writer = DatasetWriter(tmp_path, REJECTED_SCHEMA, 10)
    writer.add(rejected.to_row())
    writer.seal()
    (row,) = load_from_disk(str(tmp_path)).to_list()
    assert (row["reason"], row["nearest"]) == ("not_novel", [{"id": "a", "score": 0.8}])


def test_beginning_again_leaves_nothing_of_an_interrupted_attempt(tmp_path):
    rows = [record(number) for number in range(10)]
    undisturbed = write(tmp_path / "undisturbed", rows, 3)
    interrupted = DatasetWriter(tmp_path / "again", SCHEMA, 2)
    for row in reversed(rows):
        interrupted.add(row)
    assert not is_sealed(tmp_path / "again")
    assert write(tmp_path / "again", rows, 3)["files"] == undisturbed["files"]
    names = sorted(path.name for path in (tmp_path / "again").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "undisturbed").iterdir())


def test_beginning_again_breaks_the_old_seal_first(tmp_path):
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
        next(read_rows(tmp_path))
