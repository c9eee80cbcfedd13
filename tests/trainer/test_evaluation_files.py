"""Evaluation files are read as other data is, and a wrong row is named."""

import gzip
import json
from pathlib import Path

import pytest

from cluster.errors import InputError
from trainer.evaluate import read_set

ROW = {"id": "1", "task": "t", "group": "g", "instruction": "Two?", "input": "", "references": ["2", "two"]}


def test_sets_may_be_compressed_lists_or_tables(tmp_path: Path) -> None:
    (tmp_path / "set.json.gz").write_bytes(gzip.compress(json.dumps([{**ROW, "input": None}]).encode()))
    (tmp_path / "set.csv").write_text(f'{",".join(ROW)}\n1,t,g,Two?,,"[""2"", ""two""]"\n')
    assert read_set(tmp_path / "set.json.gz") == read_set(tmp_path / "set.csv") == [ROW]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([], r"evaluate\.sets: .*set\.jsonl is empty"),
        (["", json.dumps({"id": "1"})], r"set\.jsonl:2: the row lacks group, input, instruction"),
        ([json.dumps({**ROW, "references": []})], r"set\.jsonl:1: `references` is not a list of texts"),
        ([json.dumps({**ROW, "references": "2"})], r"set\.jsonl:1: `references` is not a list of texts"),
        ([json.dumps({**ROW, "input": 7})], r"set\.jsonl:1: `input` is a number, not text"),
    ],
)
def test_a_wrong_row_of_a_set_is_named(tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    with pytest.raises(InputError, match=complaint):
        read_set(tmp_path / "set.jsonl")
