"""The data of a synthesis is the same bytes after a kill at any write to the disk."""

import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pytest

from cluster.errors import InputError
from cluster.files import sha256_file
from cluster.run.manifest import is_sealed, verify_manifest
from cluster.run.rundir import RunDir
from generation.filters.drafts import Draft, Instance, Rejection
from generation.records import INSTRUCTION_SCHEMA, Origin, RejectedRecord, human_record
from generation.sink import SCHEMAS, DataSink, remove_checkpoint
from tests.conftest import SmallDisk
from tests.generation.harness import read_rows

NUM_STEPS = 8
CHECKPOINTS = (2, 3, 5)  # steps done
ROWS_PER_SHARD = 3
DURABLE_CALLS = ("write", "fsync", "replace", "rename", "unlink")


def add_step(sink: DataSink, step: int) -> None:
    """A row, and at some steps an instruction or a reject."""
    origin = Origin("seed" if step < 3 else "self_instruct", f"task-{step}", license="CC0-1.0")
    sink.add_row(human_record(origin, f"Do number {step}.", Instance("", f"Done {step}."), 0))
    if step % 2:
        reason = "not_novel" if step % 4 == 1 else "too_short"
        sink.add_rejected(RejectedRecord("instruction", Rejection(reason), f"request-{step}", 0, Draft(f"Do {step}.")))
    else:
        row = {"id": f"i-{step}", "instruction": f"Do {step}.", "input": "", "is_classification": None, "round": 0}
        lists = {"parent_ids": [], "seed_ids": ["seed"], "nearest": [{"id": "seed", "score": 0.5}]}
        sink.add_instruction({**row, **lists, "request_id": f"request-{step}"})


def open_sink(run: RunDir) -> tuple[DataSink, int]:
    """The sink, and the number of steps whose results it has."""
    sink, state = DataSink.open(run, ROWS_PER_SHARD, "sha")
    return sink, state["done"] if state else 0


def work(run: RunDir, until: int = NUM_STEPS) -> None:
    """Do the remaining steps, as the stage would."""
    if is_sealed(run.synthesized):
        remove_checkpoint(run)
        return
    sink, num_done = open_sink(run)
    for step in range(num_done, until):
        add_step(sink, step)
        if step + 1 in CHECKPOINTS:
            sink.checkpoint({"done": step + 1})
    if until == NUM_STEPS:
        sink.seal(inputs_sha="sha")


def die_at_call(run: RunDir, number: int) -> bool:
    """Work in a child process that dies before durable call `number`. Returns whether it finished before that."""
    child = os.fork()
    if child == 0:
        num_left, real_unlink = number, os.unlink

        def counted(call):
            def wrapper(*arguments, **options):
                nonlocal num_left
                num_left -= call is not real_unlink or os.path.exists(arguments[0])
                if num_left == 0:
                    os._exit(9)
                return call(*arguments, **options)

            return wrapper

        for name in DURABLE_CALLS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work(run)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 0


def contents(run: RunDir) -> dict[str, str]:
    """SHA-256 of every file of the data."""
    files = [path for path in run.data.rglob("*") if path.is_file()]
    return {str(path.relative_to(run.root)): sha256_file(path) for path in files}


def committed_ids(sink: DataSink, name: str) -> list[str]:
    return [id_ for batch in sink.iter_columns(name, ["id"]) for id_ in batch["id"].to_pylist()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("undisturbed"))
    work(run)
    return run


def test_all_three_datasets_are_sealed_and_nothing_else_is_left(undisturbed):
    num_rows = {"synthesized": 8, "rejected": 4, "instructions": 4}
    for name, expected in num_rows.items():
        manifest = verify_manifest(undisturbed.data / name)
        assert (manifest["rows"], manifest["columns"]) == (expected, SCHEMAS[name].names)
        listed = {*(entry["name"] for entry in manifest["files"]), "manifest.json"}
        assert {path.name for path in (undisturbed.data / name).iterdir()} == listed
    assert {path.name for path in undisturbed.data.iterdir()} == set(num_rows)
    rows = read_rows(undisturbed.data / "instructions")
    assert [row["id"] for row in rows] == ["i-0", "i-2", "i-4", "i-6"]
    assert rows[0]["is_classification"] is None and rows[0]["nearest"] == [{"id": "seed", "score": 0.5}]
    assert datasets.load_from_disk(str(undisturbed.data / "instructions")).features.arrow_schema == INSTRUCTION_SCHEMA


@pytest.fixture
def quick_sync(monkeypatch) -> None:
    """Syncs only take time here: what a process wrote survives its death without them."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("quick_sync")
def test_killed_before_any_write_it_resumes_from_the_last_checkpoint(undisturbed, tmp_path):
    all_ids = {name: [row["id"] for row in read_rows(undisturbed.data / name)] for name in SCHEMAS}
    found = set()
    for number in range(1, 1000):
        run = RunDir(tmp_path / str(number))
        if die_at_call(run, number):
            break
        if not is_sealed(run.synthesized):
            sink, num_done = open_sink(run)
            found.add(num_done)
            assert sink.num_rows == sink.num_rows_by_method.total() == num_done
            assert sink.rejected.total() == num_done // 2 and sink.num_instructions == (num_done + 1) // 2
            for name, num in (("synthesized", num_done), ("rejected", num_done // 2)):
                assert committed_ids(sink, name) == all_ids[name][:num]
        work(run)
        assert contents(run) == contents(undisturbed), number
    assert found == {0, *CHECKPOINTS}
    assert number > 80
    assert contents(run) == contents(undisturbed)


@pytest.mark.usefixtures("quick_sync")
def test_killed_repeatedly_it_makes_the_same_data(undisturbed, tmp_path):
    run = RunDir(tmp_path)
    numbers = iter(range(1, 1000))
    while not die_at_call(run, next(numbers)):
        pass
    assert next(numbers) > 10
    assert contents(run) == contents(undisturbed)


def test_files_are_on_the_disk_before_the_checkpoint_names_them(monkeypatch, tmp_path):
    synced: set[tuple[int, int]] = set()  # inode and size
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        found = os.fstat(descriptor)
        synced.add((found.st_ino, found.st_size))

    def replace(source: Path, target: Path) -> None:
        found = os.stat(source)
        assert (found.st_ino, found.st_size) in synced, target
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    work(RunDir(tmp_path))
    assert is_sealed(tmp_path / "data" / "synthesized") and synced


def test_only_committed_rows_are_read_as_columns(tmp_path):
    sink, _ = DataSink.open(RunDir(tmp_path), ROWS_PER_SHARD, "sha")
    assert list(sink.iter_columns("instructions", ["id"])) == []
    for step in range(8):
        add_step(sink, step)
    sink.checkpoint({})
    before = sink.iter_columns("instructions", ["id", "seed_ids"])
    first = next(before)  # holds on to a file that the next checkpoint removes
    for step in range(8, 12):
        add_step(sink, step)
    assert committed_ids(sink, "instructions") == ["i-0", "i-2", "i-4", "i-6"]
    sink.checkpoint({})
    assert committed_ids(sink, "instructions") == [f"i-{step}" for step in range(0, 12, 2)]
    assert first.schema == pa.schema([INSTRUCTION_SCHEMA.field("id"), INSTRUCTION_SCHEMA.field("seed_ids")])
    assert first.to_pylist() == [{"id": f"i-{step}", "seed_ids": ["seed"]} for step in (0, 2, 4)]


def test_a_resumed_sink_has_all_counts_and_the_callers_state(tmp_path):
    work(RunDir(tmp_path), until=7)
    sink, state = DataSink.open(RunDir(tmp_path), ROWS_PER_SHARD, "sha")
    assert state == {"done": 5}
    assert (sink.num_rows, sink.num_instructions) == (5, 3)
    assert sink.num_rows_by_method == {"seed": 3, "self_instruct": 2}
    assert sink.rejected == {"too_short": 1, "not_novel": 1}


def test_a_checkpoint_leaves_at_most_one_tail_of_each_dataset(tmp_path):
    work(RunDir(tmp_path), until=7)
    progress = json.loads((tmp_path / "data" / "progress.json").read_text())
    tails = {name: state["tail"]["name"] for name, state in progress["datasets"].items() if state["tail"]}
    found = {path.parent.name: path.name for path in (tmp_path / "data").glob("*/tail-*")}
    assert found == tails != {}


def test_data_made_from_other_inputs_is_refused(tmp_path):
    work(RunDir(tmp_path), until=7)
    before = contents(RunDir(tmp_path))
    with pytest.raises(InputError, match=r"saved with other inputs.*Remove .* to start again"):
        DataSink.open(RunDir(tmp_path), ROWS_PER_SHARD, "other")
    assert contents(RunDir(tmp_path)) == before


def test_sealed_data_is_not_made_again(undisturbed):
    before = contents(undisturbed)
    with pytest.raises(InputError, match="complete already"):
        DataSink.open(undisturbed, ROWS_PER_SHARD, "sha")
    assert contents(undisturbed) == before


@pytest.mark.parametrize("text", ["", "[]", '{"inputs_sha": "sha"}', '{"inputs'])
def test_a_damaged_checkpoint_is_named(tmp_path, text):
    work(RunDir(tmp_path), until=7)
    (tmp_path / "data" / "progress.json").write_text(text)
    with pytest.raises(InputError, match=r"progress\.json: damaged"):
        DataSink.open(RunDir(tmp_path), ROWS_PER_SHARD, "sha")


def test_a_missing_shard_of_the_checkpoint_is_named(tmp_path):
    work(RunDir(tmp_path), until=7)
    (tmp_path / "data" / "synthesized" / "data-00000.arrow").unlink()
    with pytest.raises(InputError, match=r"synthesized/data-00000\.arrow: missing"):
        DataSink.open(RunDir(tmp_path), ROWS_PER_SHARD, "sha")


def test_a_new_sink_removes_the_old_checkpoint(undisturbed, tmp_path):
    run = RunDir(tmp_path)
    work(run, until=7)
    DataSink(run, ROWS_PER_SHARD, "other")
    assert DataSink.open(run, ROWS_PER_SHARD, "sha")[1] is None
    work(run)
    assert contents(run) == contents(undisturbed)


def test_a_full_disk_damages_no_checkpoint(undisturbed, small_disk: SmallDisk):
    """The error names the folder, and with more space the work resumes from the last checkpoint."""
    page = os.sysconf("SC_PAGESIZE")
    small_disk.resize(2**20)
    run = RunDir(small_disk.path / "run")
    work(run, until=3)
    num_refused = 0
    for num_pages in range(1000):
        small_disk.fill(leave_bytes=num_pages * page)
        try:
            work(run, until=6)
        except InputError as error:
            num_refused += 1
            assert str(error).startswith(f"{run.data}") and "the disk is full" in str(error)
        else:
            break
        finally:
            (small_disk.path / "ballast").unlink()
        assert open_sink(run)[1] == 3
    assert num_refused > 3
    assert open_sink(run)[1] == 5
    work(run)
    assert contents(run) == contents(undisturbed)
