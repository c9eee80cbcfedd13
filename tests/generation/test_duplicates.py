"""Exact and near duplicates: what counts as the same, and how sure it is found."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rensa import RMinHash

from generation.config.filters import ExactDuplicateConfig, NearDuplicateConfig
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft
from generation.filters.duplicates import jaccard, normalized, num_bands, shingles

INSTRUCTION = ("instruction",)


def remembering(config, *texts: str) -> FilterChain:
    chain = FilterChain([config])
    chain.remember_many([f"id{number}" for number in range(len(texts))], texts)
    return chain


@pytest.mark.parametrize(
    ("text", "is_duplicate"),
    [
        ("Name three birds.", True),
        ("  name\tTHREE\n birds. ", True),
        ("Ｎame three birds.", True),  # a full-width N
        ("Name three birds", False),
        ("Name thre ebirds.", False),
        ("", False),
    ],
)
def test_exact_duplicates(text, is_duplicate):
    rejection = remembering(ExactDuplicateConfig(), "Name a tree.", "Name three birds.").decide(Draft(text)).rejection
    assert (rejection is not None) is is_duplicate
    assert not is_duplicate or (rejection.reason, rejection.detail) == ("exact_duplicate", "same as id1")


def test_the_input_is_a_part_of_what_is_compared():
    chain = FilterChain([ExactDuplicateConfig()])
    chain.remember("a", Draft("Translate.", "one two"))
    assert chain.decide(Draft("Translate.", "one")).rejection is None
    assert chain.decide(Draft("translate.", "One  two")).rejection.detail == "same as a"
    assert chain.decide(Draft("translate. ", " One two\n")).rejection.detail == "same as a"
    assert chain.decide(Draft("Translate. one", "two")).rejection is None


def test_of_several_equal_ones_the_first_is_named():
    assert remembering(ExactDuplicateConfig(), "x", "X", "x").decide(Draft("x")).rejection.detail == "same as id0"


def test_text_that_is_no_unicode_stops_nothing():
    for config in (ExactDuplicateConfig(), NearDuplicateConfig()):
        remembering(config, "broken \ud800 half").decide(Draft("broken \udc00 half"))


# -- near duplicates


@pytest.mark.parametrize(
    ("text", "unit", "size", "expected"),
    [
        ("abcd", "character", 2, {"ab", "bc", "cd"}),
        ("ab", "character", 5, {"ab"}),
        ("", "character", 5, set()),
        ("a b c", "word", 2, {"a b", "b c"}),
        ("a", "word", 2, {"a"}),
        ("aaaa", "character", 2, {"aa"}),
    ],
)
def test_shingles(text, unit, size, expected):
    assert shingles(text, NearDuplicateConfig(shingle_unit=unit, shingle_size=size)) == expected


def test_jaccard():
    assert jaccard({"a", "b"}, {"b", "c"}) == 1 / 3
    assert jaccard(set(), set()) == jaccard({"a"}, set()) == 0.0


@pytest.mark.parametrize(
    ("threshold", "min_recall", "bands"), [(0.8, 0.9, 16), (0.8, 0.99, 32), (0.5, 0.9, 64), (1.0, 0.9, 1)]
)
def test_bands_are_as_few_as_the_recall_allows(threshold, min_recall, bands):
    assert num_bands(NearDuplicateConfig(threshold=threshold, min_recall=min_recall)) == bands


@pytest.mark.parametrize(("threshold", "is_duplicate"), [(0.6, True), (0.61, False)])
def test_the_jaccard_similarity_itself_decides(threshold, is_duplicate):
    """Three of five words in common, exactly 0.6; with so many bands a miss has a chance below one in a million."""
    config = NearDuplicateConfig(
        threshold=threshold, shingle_unit="word", shingle_size=1, min_recall=0.999_999, fields=INSTRUCTION
    )
    rejection = (
        remembering(config, "nothing like it", "one two three four").decide(Draft("one two three five")).rejection
    )
    assert (rejection is not None) is is_duplicate
    assert not is_duplicate or rejection.detail == "Jaccard 0.600 to id1"


def test_the_nearest_is_named_and_of_equals_the_first():
    config = NearDuplicateConfig(threshold=0.5, fields=INSTRUCTION)
    chain = remembering(
        config, "Name three birds of a forest", "Name three birds of the forest", "name three birds of the forest"
    )
    rejection = chain.decide(Draft("Name three birds of the forest!")).rejection
    assert (rejection.reason, rejection.detail.split()[-1]) == ("near_duplicate", "id1")


def test_texts_that_are_remembered_at_different_times_are_told_apart():
    chain = FilterChain([NearDuplicateConfig()])
    for name, text in (("a", "Name three birds of the forest"), ("b", "Sort these words by length")):
        chain.remember(name, Draft(text))
    assert chain.decide(Draft("Sort these words by length!")).rejection.detail.split()[-1] == "b"
    assert chain.decide(Draft("Name three birds of the forest!")).rejection.detail.split()[-1] == "a"


@settings(deadline=None)
@given(st.lists(st.text(max_size=5), min_size=1, max_size=30), st.randoms(use_true_random=False))
def test_a_sketch_does_not_depend_on_the_order_of_shingles(shingles, draw):
    """Sets of strings come in another order in each process; a resumed run has to decide as the first one did."""
    shuffled = draw.sample(shingles, len(shingles))
    first, second = (RMinHash.digests_from_token_sets([some], 64, 1) for some in (shingles, shuffled))
    assert first == second


def test_text_without_shingles_is_no_duplicate():
    chain = remembering(NearDuplicateConfig(fields=INSTRUCTION), "", " ")
    assert chain.decide(Draft("")).rejection is None


words = st.sampled_from(["one", "two", "three", "four", "five", "six"])


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(words, min_size=1, max_size=8).map(" ".join), max_size=12), st.lists(words, max_size=8))
def test_nothing_below_the_threshold_is_ever_rejected(remembered, words):
    config = NearDuplicateConfig(threshold=0.5, shingle_unit="word", shingle_size=2, fields=INSTRUCTION)
    text = " ".join(words)
    rejection = remembering(config, *remembered).decide(Draft(text)).rejection
    mine = shingles(normalized(text), config)
    best = max((jaccard(mine, shingles(normalized(other), config)) for other in remembered), default=0.0)
    if rejection:
        assert best >= 0.5


def test_as_many_are_found_as_the_configuration_promises():
    """300 texts, each with one word changed; of those pairs that reach the threshold at most a tenth may be missed."""
    draw = random.Random(0)
    vocabulary = [f"word{i}" for i in range(500)]
    texts = [" ".join(draw.choices(vocabulary, k=20)) for _ in range(300)]
    config = NearDuplicateConfig(threshold=0.8, fields=INSTRUCTION)
    chain = remembering(config, *texts)
    found = expected = 0
    for text in texts:
        words = text.split()
        words[draw.randrange(20)] = draw.choice(vocabulary)
        changed = " ".join(words)
        if jaccard(shingles(text, config), shingles(changed, config)) >= config.threshold:
            expected += 1
            found += chain.decide(Draft(changed)).rejection is not None
    assert expected > 200 and found >= config.min_recall * expected
