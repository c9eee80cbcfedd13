"""Rows of the files that people have: JSON of any layout, CSV, Parquet, Arrow, compressed or not, and folders of them.

for place, row in Rows("my.jsonl.gz", "train.data"):      # "my.jsonl.gz:12", {"messages": [...]}

JSON and CSV are read as they are: no type is inferred, so a date is the text that the file has. A file may be larger
than memory.
"""

import csv
import glob
import itertools
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from cluster.data.json_rows import JsonRows
from cluster.data.text import named_type, text_chunks
from cluster.errors import InputError
from cluster.run.manifest import is_sealed, verify_manifest

if TYPE_CHECKING:
    from datasets import Dataset

KINDS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow",
}  # fmt: skip
READ = "a .jsonl, .json, .csv, .tsv or .parquet file, also with .gz, .bz2, .xz or .zst, or a folder of such files"
BATCH_ROWS = 1000
DELIMITERS = (",", ";", "\t")  # Excel writes semicolons where the comma is the decimal mark
HUB_FILES = ("dataset_info.json", "dataset_infos.json")  # beside the data, in folders from the hub
DATASET_FILES = ("manifest.json", "state.json", "dataset_dict.json")  # one of them is in every dataset folder
HELD_OUT = re.compile(r"(?:^|[-_./])(?:test|validation|valid|val|dev|eval)(?=[-_./])")


class Rows:
    """The rows of a file, of a folder, or of all files that match a pattern, each with its place.

    key: the recipe's, for errors.
    columns: what is read of Parquet and Arrow. None means all columns. Rows of JSON and CSV are whole.

    Raises InputError if there is no such file; while rows are read, it names the line, or row, that cannot be read.
    """

    def __init__(self, path: Path, key: str, columns: Collection[str] | None = None) -> None:
        self.path = path
        self.found: dict[str, None] = {}  # the columns of all rows so far, in their order
        self._wanted = columns
        self._files = [] if is_dataset(path) else find_files(path, key)

    def __iter__(self) -> Iterator[tuple[str, dict]]:
        if not self._files:
            dataset = open_dataset(self.path)
            batches = dataset.select_columns(self._read(dataset.column_names)).with_format("arrow").iter(BATCH_ROWS)
            yield from _numbered(self.path, batches)
        for file in self._files:
            kind = _kind_of(file)
            if kind == "parquet":
                yield from _numbered(file, self._parquet_batches(file))
            elif kind == "arrow":
                yield from _numbered(file, self._arrow_batches(file))
            else:
                for place, row in JsonRows(file, text_chunks(file)) if kind == "json" else _csv_rows(file):
                    if not row.keys() <= self.found.keys():
                        self.found.update(dict.fromkeys(row))
                    yield place, row

    def _read(self, columns: list[str]) -> list[str]:
        """Those of a file's columns that are read."""
        self.found.update(dict.fromkeys(columns))
        return [name for name in columns if self._wanted is None or name in self._wanted] or columns[:1]

    def _parquet_batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(BATCH_ROWS, columns=self._read(parquet.schema_arrow.names))

    def _arrow_batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        with pa.memory_map(str(file)) as source:
            try:
                reader = pa.ipc.open_stream(source)
                batches: Iterator[pa.RecordBatch] = iter(reader)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))
            read = self._read(reader.schema.names)
            for batch in batches:
                for begin in range(0, len(batch), BATCH_ROWS):
                    yield batch.select(read).slice(begin, BATCH_ROWS)


def find_files(path: Path, key: str) -> list[Path]:
    """The file, the files of a folder, or those that match a pattern such as `data/*.jsonl`, in alphabetical order."""
    if path.is_dir():
        return _files_of_folder(path, key)
    if path.exists():
        return [path]
    files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
    if not files:
        raise InputError(f"{key}: {path} does not exist. Set {READ}, or a dataset folder.")
    return files


def _files_of_folder(folder: Path, key: str) -> list[Path]:
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and named_type(file) in KINDS and file.name not in HUB_FILES
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]  # fmt: skip
    types = {named_type(file) for file in files}
    if not files or ".arrow" in types:
        raise InputError(
            f"{key}: {folder} is no dataset folder, or an unfinished one, because it has neither manifest.json nor "
            f"state.json. Set {READ}."
        )
    fix = f"Set a pattern that matches some of them, such as {folder}/*{files[0].suffix}."
    if len(types) > 1:
        raise InputError(f"{key}: {folder} holds files of several types ({', '.join(sorted(types))}). {fix}")
    held_out = [file.name for file in files if HELD_OUT.search(str(file.relative_to(folder)))]
    if 0 < len(held_out) < len(files):
        raise InputError(f"{key}: {folder} holds several splits, since {held_out[0]} is not for training. {fix}")
    return files


def is_dataset(path: Path) -> bool:
    """Whether `path` is a dataset folder of a run, or one that `datasets` saved."""
    return any((path / name).is_file() for name in DATASET_FILES)


def open_dataset(folder: Path) -> "Dataset":
    """A dataset folder of a run, with its files checked, or one that `datasets` saved."""
    from datasets import Dataset, load_from_disk  # takes a second, and files do not need it

    if is_sealed(folder):
        verify_manifest(folder)
    try:
        dataset = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid and JSONDecodeError are ValueErrors
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: the dataset folder cannot be read ({reason}). Fix or replace it.") from error
    if not isinstance(dataset, Dataset):
        raise InputError(
            f"{folder}: there are several splits ({', '.join(dataset)}). Choose the folder of one of them."
        )
    return dataset


def _kind_of(file: Path) -> str:
    """The kind of a file, by its name, or by its content if the name has no ending that is known."""
    if kind := KINDS.get(named_type(file)):
        return kind
    beginning = next(filter(None, map(str.lstrip, text_chunks(file))), "{")
    if beginning[0] not in "{[":
        raise InputError(f"{file}: the type of the file is unknown. Use {READ}.")
    return "json"


def to_rows(batch: pa.RecordBatch | pa.Table) -> list[dict]:
    """Rows of a batch. Arrow gives all objects of a column the same keys; those that it filled with null are gone."""
    nested = [field.name for field in batch.schema if pa.types.is_nested(field.type)]
    rows = batch.to_pylist()
    for row in rows:
        for name in nested:
            row[name] = _without_nulls(row[name])
    return rows


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _numbered(path: Path, batches: Iterator[pa.RecordBatch | pa.Table]) -> Iterator[tuple[str, dict]]:
    number = 0
    try:
        for batch in batches:
            for row in to_rows(batch):
                number += 1
                yield f"{path}:{number}", row
    except (pa.ArrowException, OSError) as error:
        after = f" after row {number}" if number else f" as {path.suffix.lower().removeprefix('.')}"
        raise InputError(
            f"{path}: the file cannot be read{after} ({str(error).splitlines()[0]}). Replace it."
        ) from error


def _csv_rows(file: Path) -> Iterator[tuple[str, dict]]:
    """Rows of a file whose first line names the columns, each with the line at which it begins. Every cell is text."""
    csv.field_size_limit(sys.maxsize)
    lines = _lines(text_chunks(file))
    num_blank, header_line = next(((n, line) for n, line in enumerate(lines) if line.strip()), (0, ""))
    delimiter = "\t" if named_type(file) == ".tsv" else max(DELIMITERS, key=header_line.count)
    reader = csv.reader(itertools.chain([header_line], lines), delimiter=delimiter, strict=True)
    header, begin = None, num_blank + 1
    try:
        for cells in reader:
            if header is None:
                header = [cell.strip() for cell in cells]
                if repeated := [name for name in header if header.count(name) > 1]:
                    raise InputError(f"{file}: two columns have the name {repeated[0]!r}. Rename one of them.")
            elif cells and len(cells) != len(header):
                raise InputError(
                    f"{file}:{begin}: the row has {len(cells)} cells, and the header has {len(header)}. Put cells that "
                    "contain a delimiter, a quote or a line break into quotes."
                )
            elif cells:
                yield f"{file}:{begin}", dict(zip(header, cells, strict=True))
            begin = num_blank + reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{file}:{begin}: not CSV ({error}). Fix the quotes of this row.") from error


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    rest = ""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split("\n")
        for line in whole:
            yield f"{line}\n"
    if rest:
        yield rest
