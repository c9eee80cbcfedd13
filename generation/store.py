"""Datasets on disk: Arrow shards in the layout of `datasets.save_to_disk`, sealed by a manifest that comes last."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from cluster.files import sha256_json, write_atomic, write_json
from cluster.manifest import MANIFEST, verify_manifest, write_manifest


class DatasetWriter:
    """Writes the rows of one dataset in order, shard by shard. Until `seal`, the folder is unfinished work."""

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_shard: int) -> None:
        """Begin a dataset anew: what an interrupted writer left in `folder` is removed."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (MANIFEST, "state.json", "dataset_info.json"):
            (folder / name).unlink(missing_ok=True)
        for leftover in (*folder.glob("data-*.arrow"), *folder.glob(".*.tmp")):
            leftover.unlink()
        self.folder = folder
        self.num_rows = 0
        self._schema = schema
        self._rows_per_shard = rows_per_shard
        self._rows: list[dict] = []
        self._shards: list[str] = []

    def add(self, row: dict) -> None:
        """Append a row with every column of the schema; a full shard is written at once."""
        self._rows.append(row)
        self.num_rows += 1
        if len(self._rows) == self._rows_per_shard:
            self._write_shard()

    def seal(self, **fields: object) -> dict:
        """Write the rest, what `datasets` needs to open the folder, and then the manifest, which is returned."""
        if self._rows or not self._shards:
            self._write_shard()
        state = {
            "_data_files": [{"filename": name} for name in self._shards],
            "_fingerprint": sha256_json([self.num_rows, fields])[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        write_json(self.folder / "state.json", state)
        write_json(self.folder / "dataset_info.json", {"features": _features(self._schema)})
        files = [*self._shards, "state.json", "dataset_info.json"]
        return write_manifest(self.folder, files, rows=self.num_rows, columns=self._schema.names, **fields)

    def _write_shard(self) -> None:
        name = f"data-{len(self._shards):05d}.arrow"
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self._schema) as stream:
            stream.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        write_atomic(self.folder / name, sink.getvalue().to_pybytes())
        self._shards.append(name)
        self._rows = []


def read_rows(folder: Path) -> Iterator[dict]:
    """All rows of a sealed dataset, in order. Raises InputError if it is unfinished or damaged."""
    verify_manifest(folder)
    for entry in json.loads((folder / "state.json").read_text())["_data_files"]:
        with pa.memory_map(str(folder / entry["filename"])) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                yield from batch.to_pylist()


def _features(schema: pa.Schema) -> dict:
    """The columns as `datasets` describes them."""
    from datasets import Features  # takes a second to import, and only a finished dataset needs it

    return Features.from_arrow_schema(schema).to_dict()
