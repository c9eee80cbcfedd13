"""Novelty decides exactly as rouge_score does, however many texts it skips."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize

from generation.filters import rouge_index
from generation.filters.rouge_index import RougeIndex, rouge_tokens, unicode_tokens

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
words = st.sampled_from(
    ["sort", "the", "The", "words", "list", "a", "of", "it's", "x-y", "3.5", "für", "日本", "", "!"]
)
texts = st.lists(words, max_size=12).map(" ".join)
any_text = texts | st.text(max_size=40) | st.text(alphabet="abK İé\n-'", max_size=30)


def rouge_l(first: str, second: str) -> float:
    return SCORER.score(first, second)["rougeL"].fmeasure


def ranked(kept: list[str], text: str, max_neighbors: int, min_score: float = 0.0) -> list[tuple[str, float]]:
    """The best scores by the reference implementation. Of equal scores, the text added first comes first."""
    scores = sorted((-rouge_l(other, text), number) for number, other in enumerate(kept))
    return [(str(number), -score) for score, number in scores if score < 0 and -score >= min_score][:max_neighbors]


def nearest(index: RougeIndex, text: str, max_neighbors: int, min_score: float = 0.0) -> list[tuple[str, float]]:
    return [(neighbor.id, neighbor.score) for neighbor in index.nearest(text, max_neighbors, min_score)]


def indexed(kept: list[str], num_at_once: int = 0) -> RougeIndex:
    """An index of these texts, the first of them added at once and the others one by one."""
    index = RougeIndex()
    index.add_many([str(number) for number in range(num_at_once)], kept[:num_at_once])
    for number in range(num_at_once, len(kept)):
        index.add_many([str(number)], [kept[number]])
    return index


@pytest.fixture(
    params=[(2048, 1 / 32), (1, 1 / 4)],
    ids=["lists", "columns"],
)
def layout(request, monkeypatch):
    """Few texts have no columns of their own accord; with these values every frequent feature gets one."""
    monkeypatch.setattr(rouge_index, "MIN_TEXTS_FOR_COLUMNS", request.param[0])
    monkeypatch.setattr(rouge_index, "FREQUENT", request.param[1])
    monkeypatch.setattr(rouge_index, "NUM_PROBED", 2)


@pytest.mark.usefixtures("layout")
def test_nearest_are_the_best_scores_of_rouge_score_in_order():
    @settings(deadline=None)
    @given(
        kept=st.lists(any_text, max_size=30),
        text=any_text,
        max_neighbors=st.integers(1, 12),
        min_score=st.sampled_from([0.0, 0.3, 0.5, 0.7, 1.0]),
        num_at_once=st.integers(0, 30),
    )
    def holds(kept, text, max_neighbors, min_score, num_at_once):
        index = indexed(kept, min(num_at_once, len(kept)))
        expected = ranked(kept, text, max_neighbors, min_score)
        assert nearest(index, text, max_neighbors, min_score) == expected
        assert nearest(index, text, max_neighbors, min_score) == expected  # and leaves no trace

    holds()


@pytest.mark.usefixtures("layout")
def test_a_token_that_no_text_has_matches_none():
    kept = ["sort the words", "words"]
    assert nearest(indexed(kept), "list the words", 2) == ranked(kept, "list the words", 2)


@pytest.mark.parametrize("vocabulary_size", [12, 400])
def test_skipping_what_cannot_be_near_changes_nothing(vocabulary_size):
    """Enough texts that most are never scored (those that are skipped have a bound below the last place)."""
    draw = random.Random(vocabulary_size)
    vocabulary = [f"word{i}" for i in range(vocabulary_size)]
    kept = [" ".join(draw.choices(vocabulary, k=draw.randint(4, 20))) for _ in range(2500)]
    index = indexed(kept, 2100)
    for _ in range(2):
        text = " ".join(draw.choices(vocabulary, k=12))
        assert nearest(index, text, 10) == ranked(kept, text, 10)


def test_few_texts_are_scored(monkeypatch):
    """The point of the bounds: of 20,000 texts fewer than a twentieth are compared with the query."""
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(2000)]
    index = RougeIndex()
    kept = [" ".join(draw.choices(vocabulary, k=12)) for _ in range(20_000)]
    index.add_many([str(number) for number in range(len(kept))], kept)
    num_scored = 0
    exact = RougeIndex._exact

    def counting(self, query, places):
        nonlocal num_scored
        num_scored += len(places)
        return exact(self, query, places)

    monkeypatch.setattr(RougeIndex, "_exact", counting)
    assert nearest(index, kept[7], 10)[0] == ("7", 1.0)
    assert 10 <= num_scored < 1000


@pytest.mark.parametrize("num_tokens", [49, 255, 256, 300])
def test_long_texts_and_many_repetitions(num_tokens):
    """Around the 255 that fit a byte, and 49, for which 1 / 49 * 49 is not 1: the order of operations shows."""
    draw = random.Random(num_tokens)
    distinct = [f"w{i}" for i in range(num_tokens)]
    shuffled = draw.sample(distinct, len(distinct))
    kept = [" ".join(distinct), " ".join(["again"] * num_tokens), " ".join(shuffled), "again w1"]
    index = indexed(kept)
    for text in (
        *kept,
        " ".join(["again"] * (num_tokens + 7)),
        " ".join(distinct[::-1]),
        " ".join([*distinct[1:], "x"]),
    ):
        assert nearest(index, text, 4) == ranked(kept, text, 4)


def test_equal_texts_come_in_the_order_in_which_they_were_added():
    index = indexed(["sort the list", "Sort, the list!", "other", "sort the list"] * 60)
    expected = [str(number) for number in range(240) if number % 4 != 2][:50]
    assert [text_id for text_id, _ in nearest(index, "sort the list", 50)] == expected


def test_a_query_is_not_remembered():
    index = indexed(["sort the list"])
    index.nearest("name a bird", 5)
    assert nearest(index, "name a bird", 5) == []
    assert len(index) == 1


@settings(deadline=None)
@given(any_text)
def test_tokens_are_those_of_rouge_score(text):
    assert rouge_tokens(text) == tokenize(text, None)


@pytest.mark.parametrize("text", ["broken \ud800half", "K is a sign", "İstanbul", "ſharp", "x\x00y", "１２"])
def test_tokens_of_odd_characters_are_those_of_rouge_score(text):
    assert rouge_tokens(text) == tokenize(text, None)


# -- other scripts


def test_text_in_other_scripts_is_similar_to_nothing_as_published():
    index = indexed(["把句子翻译成英文"])
    assert index.nearest("把句子翻译成英文", 5) == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("Écrivez UNE lettre, s'il vous plaît!", ["écrivez", "une", "lettre", "s", "il", "vous", "plaît"]),
        ("Straße STRASSE", ["strasse", "strasse"]),
        ("ﬁn e\u0301t\u00e9", ["fin", "été"]),
        ("把句子翻译成English3。", ["把", "句", "子", "翻", "译", "成", "english3"]),
        ("ひらがなとカタカナ", list("ひらがなとカタカナ")),
        ("ที่นี่", ["ที่", "นี่"]),
        ("हिन्दी में लिखो", ["हिन्दी", "में", "लिखो"]),
        ("напиши письмо", ["напиши", "письмо"]),
        ("편지를 쓰세요", ["편지를", "쓰세요"]),
        ("...!? 🙂", []),
        ("", []),
    ],
)
def test_words_of_every_script(text, tokens):
    assert unicode_tokens(text) == tokens


def test_novelty_in_other_scripts():
    index = RougeIndex(unicode_tokens)
    index.add_many(["a"], ["把句子翻译成英文"])
    assert nearest(index, "把句子翻译成中文", 5) == [("a", pytest.approx(7 / 8))]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_unicode_tokens_are_found_again_in_each_other(text):
    tokens = unicode_tokens(text)
    assert unicode_tokens(" ".join(tokens)) == tokens
