"""Datasets on disk: Arrow shards in the layout of `datasets.save_to_disk`. A manifest, written last, seals them.

While a dataset is being written, `data-NNNNN.arrow` are full shards, and `tail-NNNNN.arrow` has the rows after them as
of a checkpoint. A shard's bytes depend only on its rows, not on the times of checkpoints or interruptions.
"""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cluster.errors import InputError
from cluster.files import sha256_json, write_atomic, write_json
from cluster.run.fence import verify
from cluster.run.manifest import MANIFEST, write_manifest


class DatasetWriter:
    """Writes the rows of one dataset in order, shard by shard. The folder is unfinished until `seal`.

    After an InputError about a full disk the writer cannot be used any more: continue from the last state.
    """

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_shard: int, state: dict | None = None) -> None:
        """Start an empty dataset, or continue from an earlier `state()`. Rows and files after it are removed.

        Raises InputError if a shard or the tail of the state is missing or has another length.
        """
        state = state or {"shards": [], "tail": None}
        check_state(folder, state, rows_per_shard)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.num_rows = sum(entry["rows"] for entry in state_files(state))
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._shards: list[dict] = list(state["shards"])  # name, rows and bytes of each
        self._tail: dict | None = state["tail"]  # likewise, as last saved
        self._rows: list[dict] = []  # of the next shard, not yet in columns
        self._batches: list[pa.RecordBatch] = list(read_batches(folder / self._tail["name"])) if self._tail else []
        self._num_tail_rows = self._tail["rows"] if self._tail else 0  # of the next shard, in rows and batches
        _remove_all_but(folder, {entry["name"] for entry in state_files(state)})

    def add(self, row: dict) -> None:
        """Append a row with every column of the schema. A shard is written as soon as it is full."""
        self._rows.append(row)
        self.num_rows += 1
        self._num_tail_rows += 1
        if self._num_tail_rows == self._rows_per_shard:
            self._write_shard()

    def save_tail(self, number: int) -> None:
        """Write the rows after the last full shard to a new file of this number.

        The earlier tail stays until `remove_old_tails`, because the earlier state names it.
        """
        if self._tail and not self._rows and self._tail["rows"] == self._num_tail_rows:
            return  # nothing was added since
        self._tail = None
        if self._num_tail_rows:
            self._tail = self._write(f"tail-{number:05d}.arrow", self._in_columns())

    def state(self) -> dict:
        """What a later writer needs to continue, as JSON: names, rows and bytes of the shards and of the last tail."""
        return {"shards": list(self._shards), "tail": self._tail}

    def remove_old_tails(self) -> None:
        """Remove all tails except the one that was saved last."""
        current = self._tail["name"] if self._tail else None
        for path in self.folder.glob("tail-*.arrow"):
            if path.name != current:
                path.unlink()

    def seal(self, **fields: object) -> dict:
        """Write the remaining rows, the files that `datasets` needs, and then the manifest. Returns the manifest."""
        from datasets import Features  # importing it takes a second, and only `seal` needs it

        if self._num_tail_rows or not self._shards:
            self._write_shard()
        names = [entry["name"] for entry in self._shards]
        state = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": sha256_json([self.num_rows, fields])[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / "state.json", state)
        write_json(self.folder / "dataset_info.json", {"features": Features.from_arrow_schema(self._schema).to_dict()})
        files = [*names, "state.json", "dataset_info.json"]
        return write_manifest(self.folder, files, rows=self.num_rows, columns=self._schema.names, **fields)

    def _in_columns(self) -> list[pa.RecordBatch]:
        """The rows of the next shard."""
        if self._rows:
            columns = [pa.array([row[field.name] for row in self._rows], field.type) for field in self._schema]
            self._batches.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
            self._rows = []
        return self._batches

    def _write_shard(self) -> None:
        table = pa.Table.from_batches(self._in_columns(), self._schema).combine_chunks()
        self._shards.append(self._write(f"data-{len(self._shards):05d}.arrow", table.to_batches()))
        self._batches = []
        self._num_tail_rows = 0
        self._tail = None

    def _write(self, name: str, batches: list[pa.RecordBatch]) -> dict:
        buffer = pa.BufferOutputStream()
        with pa.ipc.new_stream(buffer, self._schema) as stream:
            for batch in batches:
                stream.write_batch(batch)
        content = buffer.getvalue()
        verify(self.folder.parents[1])  # <run>/data/<name>
        write_atomic(self.folder / name, content)
        return {"name": name, "rows": sum(batch.num_rows for batch in batches), "bytes": content.size}


def state_files(state: dict) -> list[dict]:
    """The shards of a writer's state and its tail, in the order of their rows."""
    return [*state["shards"], *([state["tail"]] if state["tail"] else [])]


def check_state(folder: Path, state: dict, rows_per_shard: int) -> None:
    """Raise InputError if the files of a writer's state are missing or have another length."""
    for entry in state_files(state):
        path = folder / entry["name"]
        found = path.stat().st_size if path.is_file() else None
        if found != entry["bytes"]:
            what = "missing" if found is None else f"{found} bytes long, not {entry['bytes']}"
            raise InputError(
                f"{path}: {what}, though the last checkpoint names it. Restore it, or remove "
                f"{folder.parent} and start again: finished requests stay in the log and are not generated again."
            )
    if any(entry["rows"] != rows_per_shard for entry in state["shards"]):
        raise InputError(f"{folder}: its shards do not have {rows_per_shard} rows. Set the old rows_per_shard.")


def read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a shard or a tail, mapped from the file."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
        yield from stream


def _remove_all_but(folder: Path, names: set[str]) -> None:
    """Remove the files of a writer, the manifest first."""
    for name in (MANIFEST, "state.json", "dataset_info.json"):
        (folder / name).unlink(missing_ok=True)
    for path in (*folder.glob("data-*.arrow"), *folder.glob("tail-*.arrow"), *folder.glob(".*.tmp")):
        if path.name not in names:
            path.unlink()
