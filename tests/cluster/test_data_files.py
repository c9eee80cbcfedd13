"""Rows are read as the file has them, whatever its layout and compression, and errors name the file and the line."""

import bz2
import gzip
import itertools
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.data import text
from cluster.data.json_rows import ROW_LISTS, JsonRows
from cluster.data.rows import Rows
from cluster.errors import InputError

ROWS = [
    {"instruction": "a\u2028b", "input": None, "output": "2024-02-22"},
    {"instruction": "Größe? 🍏", "output": "2024-03-01T12:00:00Z", "unread": {"deep": [1, 10**40]}},
    {"instruction": 'say "fig",\nthen\tpear', "input": "x", "output": "007"},
]


def read(path: Path, columns=None) -> list[dict]:
    return [row for _, row in Rows(path, "train.data", columns)]


def places(path: Path) -> list[str]:
    return [place.removeprefix(str(path)) for place, _ in Rows(path, "train.data")]


def lines(rows: list[dict], **options) -> str:
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# -- layouts of JSON


@pytest.mark.parametrize(
    "content",
    [
        lines(ROWS), lines(ROWS, ensure_ascii=False), lines(ROWS).strip(), "\n\n" + lines(ROWS).replace("\n", "\r\n\n"),
        "".join(json.dumps(row) for row in ROWS), lines(ROWS, indent=2), json.dumps(ROWS), json.dumps(ROWS, indent=1),
        json.dumps({"data": ROWS}), json.dumps({"version": {"of": [1]}, "data": ROWS, "licence": "x"}, indent=2),
        json.dumps({"train": ROWS}),
    ],
    ids=itertools.count(),
)  # fmt: skip
@pytest.mark.parametrize("chunk", [1, 7, 2**20])
def test_every_layout_of_json_gives_the_rows(tmp_path: Path, monkeypatch, content: str, chunk: int) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
    for name in ("rows.jsonl", "rows.json", "rows.NDJSON", "rows"):
        assert read(write(tmp_path / name, content)) == ROWS


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(TEXTS.filter(lambda key: key not in ROW_LISTS), VALUES, max_size=3), max_size=3)


@pytest.mark.parametrize("number", [0.0, -1.5, 1e300, 2.5e-7, 12345678901234567890, -0.0])
def test_a_number_in_two_pieces_is_one_number(number: float) -> None:
    content = json.dumps({"a": number, "b": [number]})
    for size in range(1, len(content)):
        pieces = iter([content[begin : begin + size] for begin in range(0, len(content), size)])
        assert [row for _, row in JsonRows(Path("rows"), pieces)] == [{"a": number, "b": [number]}]


@settings(max_examples=50)
@given(OBJECTS, st.sampled_from([None, 2]), st.booleans(), st.integers(1, 9), st.booleans())
def test_any_rows_in_pieces_of_any_size_are_read(rows, indent, is_list, size, ensure_ascii) -> None:
    content = (json.dumps if is_list else lines)(rows, indent=indent, ensure_ascii=ensure_ascii)
    pieces = iter([content[begin : begin + size] for begin in range(0, len(content), size)])
    assert [row for _, row in JsonRows(Path("rows"), pieces)] == rows


def test_a_place_is_the_line_at_which_a_row_begins(tmp_path: Path) -> None:
    assert places(write(tmp_path / "a", "\n" + lines(ROWS))) == [":2", ":3", ":4"]
    assert places(write(tmp_path / "b", json.dumps(ROWS, indent=1))) == [":2", ":7", ":17"]
    assert places(write(tmp_path / "c", json.dumps(ROWS))) == [":1", ":1 (row 2)", ":1 (row 3)"]


def test_a_missing_value_of_pandas_is_null(tmp_path: Path) -> None:
    assert read(write(tmp_path / "rows.jsonl", '{"input": NaN, "output": "NaN"}')) == [{"input": None, "output": "NaN"}]


def test_a_list_that_is_a_rows_own_is_no_list_of_rows(tmp_path: Path) -> None:
    rows = [{"id": 1, "instances": [{"input": "a"}], "data": ["x"]}, {"data": [{"role": "user", "content": "a"}]}]
    for row in rows:
        assert read(write(tmp_path / "rows.json", json.dumps(row))) == [row]


GOOD = '{"a": "b"}\n'


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (GOOD + '{"a": "b\n' + GOOD, r"rows\.jsonl:2: not JSON .*Fix or remove this row"),
        (GOOD * 3 + '{"a": "b', r"rows\.jsonl:4: not JSON \(Unterminated string starting at character 7\)"),
        (GOOD * 3 + '{"a": tru', r"rows\.jsonl:4: not JSON"),
        (GOOD + '{"a": 1},\n' + GOOD, r"rows\.jsonl:2 \(row 2\): not JSON"),
        ('[{"a": 1},\n{"a": 2},\n]', r"rows\.jsonl:3: not JSON \(a comma before the end of a list\)"),
        ('[{"a": 1}\n{"a": 2}]', r"rows\.jsonl:2: not JSON \(expected ',' or ']'\)"),
        ('[{"a": 1},\n{"a": 2}', r"rows\.jsonl:2: not JSON \(the file ends inside a list\)"),
        ('{"data": [{"a": 1}, {"a": 2}', r"the file ends inside a list"),
        ('[{"a": 1}, {"a": 2}, {"a": "b', r"rows\.jsonl:1 \(row 3\): not JSON .*The file seems cut off"),
        ('[{"a": 1}, {"a": 2},', r"rows\.jsonl:1 \(row 3\): not JSON .*The file seems cut off"),
        ('[{"a": 1}, {"a": 2', r"rows\.jsonl:1 \(row 2\): not JSON .*The file seems cut off"),
        ('[{"a": 1}, {"a": 2,}, {"a": 3}]', r"rows\.jsonl:1 \(row 2\): not JSON \([^)]*\)\. Fix or remove"),
        ('{"data": [{"a": 1}],}', r"a comma before the end of an object"),
        ('{"data": [{"a": 1}], "train": [{"a": 2}]}', r"rows\.jsonl: `data` and `train` both hold rows"),
        (GOOD + '{"a": {"b": 1,\n"c": }}', r"rows\.jsonl:2: not JSON \(Expecting value at line 3\)"),
        (GOOD + "7\n", r"rows\.jsonl:2: expected a JSON object, found int"),
        ('[["a"]]', r"rows\.jsonl:1: expected a JSON object, found list"),
        (GOOD + '{"a": "x", "a": "y"}', r"rows\.jsonl:2: .*the key 'a' occurs twice, with different values"),
        ('{"a": "x", "a": "y"}', r"rows\.jsonl:1: .*the key 'a' occurs twice, with different values"),
        (GOOD + r'{"a": "\ud83d!"}', r"rows\.jsonl:2: .*'\\ud83d' is half of a character"),
        (GOOD + '{"a": ' + "[" * 10**4, r"rows\.jsonl:2: not JSON"),
        (GOOD * 2 + "\0\0\0\0", r"rows\.jsonl:3: a NUL byte"),
        (
            (GOOD * 2).encode() + b'{"a": "caf\xe9"}\n',
            r"rows\.jsonl:3: not UTF-8 \(byte 0xe9: .*Save the file",
        ),
        ((GOOD * 2).encode() + b'{"a": "caf\xc3', r"rows\.jsonl:3: not UTF-8"),
        (GOOD.encode("utf-16")[2:], r"rows\.jsonl:1: a NUL byte"),
    ],
    ids=itertools.count(),
)
@pytest.mark.parametrize("chunk", [3, 2**20])
def test_what_is_no_json_is_named_with_its_line(tmp_path: Path, monkeypatch, content, complaint: str, chunk) -> None:
    monkeypatch.setattr(text, "CHUNK_BYTES", chunk)
    with pytest.raises(InputError, match=complaint):
        read(write(tmp_path / "rows.jsonl", content))


def test_pairs_of_escapes_are_one_character_and_equal_values_may_be_repeated(tmp_path: Path) -> None:
    content = r'{"a": "\ud83c\udf4f", "b": "\\ud83c", "a": "\ud83c\udf4f"}'
    assert read(write(tmp_path / "rows.json", content)) == [{"a": "🍏", "b": "\\ud83c"}]


# -- encodings and compression


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize(
    ("ending", "compress"),
    [
        ("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress),
        (".zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
        (".ZST", lambda data: pa.compress(data, "zstd", asbytes=True)), (".gz", bytes), ("", gzip.compress),
    ],
    ids=itertools.count(),
)  # fmt: skip
def test_compressed_files_are_read_and_the_content_decides(
    tmp_path: Path, encoding: str, ending: str, compress: Callable[[bytes], bytes]
) -> None:
    path = write(tmp_path / f"rows.jsonl{ending}", compress(lines(ROWS, ensure_ascii=False).encode(encoding)))
    assert read(path) == ROWS


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_file_that_is_cut_off_is_named(tmp_path: Path, compress) -> None:
    path = write(tmp_path / "rows.jsonl.gz", compress(lines(ROWS * 50).encode())[:-20])
    with pytest.raises(InputError, match=r"rows\.jsonl\.gz: the compressed file is cut off or damaged near line 1"):
        read(path)


def test_a_cut_file_of_zstd_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl.zst", pa.compress(lines(ROWS).encode(), "zstd", asbytes=True)[:-20])
    with pytest.raises(InputError, match=r"rows\.jsonl\.zst: the compressed file is cut off or damaged"):
        read(path)


# -- tables


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'instruction,output\r\n"say ""fig"",\nthen",007\r\n\r\nb,2024-01-01\r\n'),
        ("a.csv", '\ufeffinstruction;output\n"say ""fig"",\nthen";007\nb;2024-01-01'),
        ("a.TSV", 'instruction\toutput\n"say ""fig"",\nthen"\t007\nb\t2024-01-01'),
    ],
)
def test_cells_of_a_table_are_text(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert [tuple(row.values()) for row in read(path)] == [('say "fig",\nthen', "007"), ("b", "2024-01-01")]
    assert places(path)[0] == ":2"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n1,2\n1,2,3\n", r"rows\.csv:3: the row has 3 cells, and the header has 2"),
        ('a,b\n1,2\n"1,2\n3,4\n', r"rows\.csv:3: not CSV"),
        ('a,b\n"1" x,2\n', r"rows\.csv:2: not CSV"),
        ("a,a\n1,2\n", r"rows\.csv: two columns have the name 'a'"),
        (b"a,b\n1,\xe9\n", r"rows\.csv:2: not UTF-8"),
    ],
)
def test_what_is_no_table_is_named_with_its_line(tmp_path: Path, content, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read(write(tmp_path / "rows.csv", content))


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    assert read(write(tmp_path / "rows.csv", f"a\n{'x' * 2**20}\n")) == [{"a": "x" * 2**20}]


CALLS = [
    {"tools": [{"name": "weather", "arguments": {"city": "Paris"}}], "text": None},
    {"tools": [{"name": "sum", "arguments": {"a": 1, "b": 0}}, {"name": "now", "arguments": {}}], "text": "x"},
]


def arrow_stream(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def arrow_file(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("rows.parquet", lambda path, table: pq.write_table(table, path)),
        ("rows.PARQUET", lambda path, table: pq.write_table(table, path)),
        ("rows.arrow", arrow_stream),
        ("rows.arrow", arrow_file),
    ],
)
def test_keys_that_arrow_filled_with_null_are_gone(tmp_path: Path, name: str, save) -> None:
    save(tmp_path / name, pa.Table.from_pylist(CALLS).append_column("unread", pa.array([1, 2])))
    assert read(tmp_path / name, {"tools", "text"}) == CALLS
    assert places(tmp_path / name) == [":1", ":2"]


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rows\.parquet: the file cannot be read as parquet"):
        read(write(tmp_path / "rows.parquet", "{}"))


# -- several files


def test_folders_and_patterns_give_all_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for number, name in enumerate(("b.jsonl", "data/c.jsonl.gz", "a.jsonl")):
        content = json.dumps({"a": number}).encode()
        write(tmp_path / name, gzip.compress(content) if name.endswith("gz") else content)
    for name in ("README.md", ".hidden.jsonl", "dataset_info.json"):
        write(tmp_path / name, "no data")
    assert read(tmp_path) == [{"a": 2}, {"a": 0}, {"a": 1}]
    assert read(tmp_path / "*.jsonl") == [{"a": 2}, {"a": 0}]
    assert read(tmp_path / "**/[ac].*") == [{"a": 2}, {"a": 1}]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (["a.jsonl", "b.csv"], r"several types \(\.csv, \.jsonl\)\. Set a pattern"),
        (["train-0.jsonl", "test-0.jsonl"], r"several splits, since test-0\.jsonl is not for training"),
        (["train/0.jsonl", "validation/0.jsonl"], r"several splits"),
        (["README.md"], r"is no dataset folder, or an unfinished one"),
        (["data-00000-of-00001.arrow"], r"is no dataset folder, or an unfinished one"),
    ],
)
def test_a_folder_whose_files_do_not_belong_together_is_refused(tmp_path: Path, names, complaint: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, "")
    with pytest.raises(InputError, match=rf"train\.data: .*{complaint}"):
        read(tmp_path)


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.data: .*\*\.jsonl does not exist\. Set a \.jsonl, "):
        read(tmp_path / "*.jsonl")
