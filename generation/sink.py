"""The data of one synthesis: rows, rejects and instructions, and the checkpoint from which an interrupted run resumes.

run/data/synthesized/    the dataset; its manifest is written last, so it proves that all three are complete
run/data/rejected/       what did not pass, each with its reason
run/data/instructions/   the accepted instructions, with their nearest neighbors
run/data/inputs.json     what all of it was made from
run/data/progress.json   the last checkpoint, until the datasets are complete

A checkpoint is a single rename, that of progress.json. It names the full shards of each dataset and a file with the
rows after them. Any other file in the folders is newer than the checkpoint: opening the sink again removes it.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

import pyarrow as pa

from cluster.errors import InputError
from cluster.files import write_atomic
from cluster.run.fence import verify
from cluster.run.manifest import is_sealed
from cluster.run.rundir import RunDir
from generation.dataset_writer import DatasetWriter, read_batches, state_files
from generation.records import INSTRUCTION_SCHEMA, REJECTED_SCHEMA, SCHEMA, Record, RejectedRecord

SCHEMAS = {"synthesized": SCHEMA, "rejected": REJECTED_SCHEMA, "instructions": INSTRUCTION_SCHEMA}


class DataSink:
    """Writes the results of a synthesis in their final order, and counts them.

    After an InputError about a full disk the sink cannot be used any more: `open` resumes from the last checkpoint.
    """

    def __init__(self, run: RunDir, rows_per_shard: int, inputs_sha: str, progress: dict | None = None) -> None:
        """Start empty, or resume from the content of a progress.json. inputs_sha: hash of what decides the data."""
        progress = progress or {"checkpoint": 0, "datasets": {}, "num_rows_by_method": {}, "rejected": {}}
        self.num_rows_by_method = Counter(progress["num_rows_by_method"])
        self.rejected = Counter(progress["rejected"])  # by reason
        self._run = run
        self._inputs_sha = inputs_sha
        self._number = progress["checkpoint"]  # of the last checkpoint
        self._committed: dict[str, dict] = progress["datasets"]  # dataset -> its writer's state at the last checkpoint
        for leftover in run.data.glob(".progress.json.*.tmp"):
            leftover.unlink()
        if not self._committed:
            remove_checkpoint(run)
        self._writers = {
            name: DatasetWriter(run.data / name, schema, rows_per_shard, self._committed.get(name))
            for name, schema in SCHEMAS.items()
        }
        self._rows, self._rejected, self._instructions = self._writers.values()

    @classmethod
    def open(cls, run: RunDir, rows_per_shard: int, inputs_sha: str) -> "tuple[DataSink, dict | None]":
        """The sink, and the caller's state in the last checkpoint. None means that there is no checkpoint.

        Raises InputError if the data is complete, if it was made from other inputs, or if its files are damaged.
        """
        path = run.progress
        if is_sealed(run.synthesized):
            raise InputError(f"{run.data} is complete already. Remove {run.data} to start again.")
        if not path.is_file():
            return cls(run, rows_per_shard, inputs_sha), None
        try:
            progress = json.loads(path.read_text())
            found, state = progress["inputs_sha"], progress["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: damaged ({error}). Restore it, or remove {run.data} and start again: finished requests stay "
                "in the log and are not generated again."
            ) from error
        if found != inputs_sha:
            raise InputError(
                f"{path} was saved with other inputs (settings, seeds, prompts or models) than those in {run.inputs}. "
                f"Remove {run.data} to start again: requests that are the same stay in the log and are not generated "
                "again."
            )
        return cls(run, rows_per_shard, inputs_sha, progress), state

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    @property
    def num_instructions(self) -> int:
        return self._instructions.num_rows

    def add_row(self, record: Record) -> None:
        self.num_rows_by_method[record.method] += 1
        self._rows.add(record.to_row())

    def add_rejected(self, record: RejectedRecord) -> None:
        self.rejected[record.rejection.reason] += 1
        self._rejected.add(record.to_row())

    def add_instruction(self, row: dict) -> None:
        """Add an accepted instruction. `row` has the columns of INSTRUCTION_SCHEMA."""
        self._instructions.add(row)

    def checkpoint(self, state: dict) -> None:
        """Make everything added so far durable, together with the caller's state (JSON), in one step.

        If the process is killed at any moment, the next `open` finds this checkpoint or the one before.
        """
        verify(self._run.root)
        self._number += 1
        for writer in self._writers.values():
            writer.save_tail(self._number)
        datasets = {name: writer.state() for name, writer in self._writers.items()}
        progress = {
            "inputs_sha": self._inputs_sha,
            "checkpoint": self._number,
            "datasets": datasets,
            "num_rows_by_method": self.num_rows_by_method,
            "rejected": self.rejected,
            "state": state,
        }
        verify(self._run.root)
        write_atomic(self._run.progress, json.dumps(progress, ensure_ascii=False))
        self._committed = datasets
        for writer in self._writers.values():
            writer.remove_old_tails()

    def iter_columns(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """These columns of the rows in the last checkpoint, in order, mapped from the files. name: the dataset."""
        if name not in self._committed:
            return
        for entry in state_files(self._committed[name]):
            for batch in read_batches(self._run.data / name / entry["name"]):
                yield batch.select(columns)

    def seal_rejected(self, **fields: object) -> None:
        """Seal what there is if no row was made. The next start makes all of it again, from the log."""
        verify(self._run.root)
        self._rejected.seal(**fields)
        self._instructions.seal(**fields)
        remove_checkpoint(self._run)

    def rejected_examples(self, reason: str, num_examples: int) -> list[dict]:
        """The first rejected rows of this reason, after sealing."""
        files = state_files(self._rejected.state())
        batches = (batch for entry in files for batch in read_batches(self._run.rejected / entry["name"]))
        rows = (row for batch in batches for row in batch.to_pylist() if row["reason"] == reason)
        return list(islice(rows, num_examples))

    def seal(self, **fields: object) -> None:
        """Seal all three datasets, `synthesized` last. `fields` go into the manifest of each."""
        verify(self._run.root)
        self._rejected.seal(**fields)
        self._instructions.seal(**fields)
        verify(self._run.root)
        self._rows.seal(**fields)
        remove_checkpoint(self._run)


def remove_checkpoint(run: RunDir) -> None:
    """Remove the last checkpoint. It may remain beside sealed data, if the process was killed after sealing."""
    run.progress.unlink(missing_ok=True)
    for name in SCHEMAS:
        for path in (run.data / name).glob("tail-*.arrow"):
            path.unlink()
