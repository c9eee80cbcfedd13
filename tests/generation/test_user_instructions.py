"""The packaged seeds of InstructionWild: what their page says of them."""

import json
import re
from collections import Counter
from itertools import combinations

import pytest
from rapidfuzz.distance import LCSseq

from generation.config.filters import INSTRUCTION_WILD_FILTERS
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft
from generation.filters.rouge_index import unicode_tokens
from tests.generation.harness import ROOT

PATH = ROOT / "generation" / "seeds" / "user_instructions.jsonl"
SCRIPTS = {
    "Chinese": "[\u4e00-\u9fff]",
    "Japanese": "[\u3040-\u30ff]",
    "Arabic": "[\u0600-\u06ff]",
    "Hindi": "[\u0900-\u097f]",
}
LATIN = {"English", "Spanish", "German", "French", "Portuguese"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()]


def test_there_are_150_with_running_ids_and_one_form(rows):
    assert [row["id"] for row in rows] == [f"user_instruction_{number}" for number in range(150)]
    for row in rows:
        assert list(row) == ["id", "instruction", "language", "license"]
        assert row["license"] == "Apache-2.0"
        assert row["instruction"] == row["instruction"].strip() != ""


def test_english_leads_and_each_text_is_in_the_script_of_its_language(rows):
    counts = Counter(row["language"] for row in rows)
    assert counts["English"] == 90
    assert counts.keys() == SCRIPTS.keys() | LATIN
    assert min(counts.values()) >= 5
    for row in rows:
        found = {name for name, script in SCRIPTS.items() if re.search(script, row["instruction"])}
        expected = set() if row["language"] in LATIN else {row["language"]}
        assert found - {"Chinese"} == expected - {"Chinese"}, row[
            "id"
        ]  # Japanese is written with Chinese characters too
        assert ("Chinese" in found) <= (row["language"] in ("Chinese", "Japanese")), row["id"]


def test_each_is_new_beside_all_others(rows):
    tokens = [unicode_tokens(row["instruction"]) for row in rows]
    scores = [
        (2 * LCSseq.similarity(a, b) / (len(a) + len(b)), i, j) for (i, a), (j, b) in combinations(enumerate(tokens), 2)
    ]
    score, i, j = max(scores)
    assert score < 0.5, f"ROUGE-L {score:.2f}: {rows[i]['instruction']!r} and {rows[j]['instruction']!r}"


def test_each_passes_the_methods_own_filters(rows):
    chain = FilterChain(INSTRUCTION_WILD_FILTERS)
    for row in rows:
        draft = Draft(row["instruction"])
        assert chain.decide(draft).rejection is None, row["id"]
        chain.remember(row["id"], draft)


def test_they_are_as_uneven_as_what_people_type(rows):
    english = [row["instruction"] for row in rows if row["language"] == "English"]
    num_words = [len(text.split()) for text in english]
    assert min(num_words) <= 5 and max(num_words) >= 60
    assert sum(text[0].islower() for text in english) >= 30
    assert sum(text[-1].isalnum() for text in english) >= 30  # no mark at the end
    assert sum("\n" in text for text in english) >= 4  # something is pasted below
    assert len({unicode_tokens(text)[0] for text in english}) >= 50


def test_none_holds_an_address_a_number_to_call_or_a_link(rows):
    for row in rows:
        assert not re.search(r"@\w|https?:|www\.|\+?\d[\d /-]{7,}\d", row["instruction"]), row["id"]
