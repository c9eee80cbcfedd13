"""Novelty decides exactly as rouge_score does, however many texts it skips."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from generation.novelty import NoveltyIndex, rouge_tokens

SCORER = RougeScorer(["rougeL"], use_stemmer=False)
words = st.sampled_from(
    ["sort", "the", "The", "words", "list", "a", "of", "it's", "x-y", "3.5", "für", "日本", "", "!"]
)
texts = st.lists(words, max_size=12).map(" ".join)


def rouge_l(first: str, second: str) -> float:
    return SCORER.score(first, second)["rougeL"].fmeasure


@settings(deadline=None)
@given(kept=st.lists(texts, max_size=30), text=texts, max_neighbors=st.integers(1, 12))
def test_nearest_are_the_best_scores_of_rouge_score_in_order(kept, text, max_neighbors):
    index = NoveltyIndex()
    for number, other in enumerate(kept):
        index.add(str(number), other)
    expected = sorted(((-rouge_l(other, text), number) for number, other in enumerate(kept)))
    expected = [(str(number), -score) for score, number in expected if score < 0][:max_neighbors]
    assert [(neighbor.id, neighbor.score) for neighbor in index.nearest(text, max_neighbors)] == expected


@pytest.mark.parametrize("vocabulary_size", [12, 400])
def test_skipping_what_cannot_be_near_changes_nothing(vocabulary_size):
    """Enough texts that most are never scored (those that are skipped have a bound below the last place)."""
    draw = random.Random(vocabulary_size)
    vocabulary = [f"word{i}" for i in range(vocabulary_size)]
    kept = [" ".join(draw.choices(vocabulary, k=draw.randint(4, 20))) for _ in range(1500)]
    index = NoveltyIndex()
    for number, text in enumerate(kept):
        index.add(str(number), text)
    for _ in range(3):
        text = " ".join(draw.choices(vocabulary, k=12))
        expected = sorted(((-rouge_l(other, text), number) for number, other in enumerate(kept)))[:10]
        expected = [(str(number), -score) for score, number in expected if score < 0]
        assert [(neighbor.id, neighbor.score) for neighbor in index.nearest(text, 10)] == expected


@given(texts)
def test_tokens_are_those_of_rouge_score(text):
    from rouge_score.tokenize import tokenize

    assert rouge_tokens(text) == tokenize(text, None)


def test_text_in_other_scripts_is_similar_to_nothing():
    index = NoveltyIndex()
    index.add("a", "把句子翻译成英文")
    assert index.nearest("把句子翻译成英文", 5) == []
