"""A chain is a pure function of a draft and of what it remembers, in the order that a recipe lists."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from rouge_score.rouge_scorer import RougeScorer

from generation.config.filters import ALPACA_FILTERS, SELF_INSTRUCT_FILTERS, FilterConfig
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft
from generation.seed_tasks import SeedTask, load_seed_tasks
from tests.generation.test_self_instruct import PUBLISHED_SEEDS

FILTERS = TypeAdapter(list[FilterConfig])
STATEFUL_FILTERS = FILTERS.validate_python(
    [
        {"type": "exact_duplicate", "fields": ["instruction"]},
        {"type": "near_duplicate", "fields": ["instruction", "input"], "shingle_size": 2, "threshold": 0.9},
        {"type": "novelty", "fields": ["instruction"], "num_nearest": 3},
        {"type": "novelty", "fields": ["output"], "tokenizer": "unicode", "num_nearest": 2},
        {"type": "exact_duplicate", "fields": ["instruction", "output"]},
    ]
)
words = st.sampled_from(["sort", "The", "words", "list", "of", "é", "日本", "", "?"])
texts = st.lists(words, max_size=6).map(" ".join)
drafts = st.builds(Draft, texts, texts, st.none() | texts)


def test_the_first_filter_that_objects_decides():
    draft = Draft("Draw a map")
    short, forbidden = {"type": "length"}, {"type": "blacklist"}
    for order, expected in (([short, forbidden], "too_short"), ([forbidden, short], "blacklisted_word")):
        assert FilterChain(FILTERS.validate_python(order)).decide(draft).rejection.reason == expected


def test_an_empty_chain_lets_everything_pass():
    assert FilterChain([]).decide(Draft("")).rejection is None


@settings(deadline=None, max_examples=30)
@given(remembered=st.lists(drafts, max_size=8), judged=st.lists(drafts, max_size=6))
def test_judging_changes_nothing(remembered, judged):
    chain, other = FilterChain(STATEFUL_FILTERS), FilterChain(STATEFUL_FILTERS)
    for number, draft in enumerate(remembered):
        for one in judged:
            chain.decide(one)
        chain.remember(str(number), draft)
        other.remember(str(number), draft)
    first = [chain.decide(draft) for draft in judged]
    assert first == [chain.decide(draft) for draft in judged] == [other.decide(draft) for draft in judged]


@settings(deadline=None, max_examples=30)
@given(remembered=st.lists(st.builds(Draft, texts, texts, texts), max_size=12), judged=st.lists(drafts, max_size=6))
def test_columns_are_remembered_as_one_by_one(remembered, judged):
    one_by_one, at_once = FilterChain(STATEFUL_FILTERS), FilterChain(STATEFUL_FILTERS)
    ids = [str(number) for number in range(len(remembered))]
    for draft_id, draft in zip(ids, remembered, strict=True):
        one_by_one.remember(draft_id, draft)
    at_once.remember_many(
        ids, [d.instruction for d in remembered], [d.input for d in remembered], [d.output for d in remembered]
    )
    assert [one_by_one.decide(draft) for draft in judged] == [at_once.decide(draft) for draft in judged]


def test_columns_that_are_left_out():
    chain = FilterChain(STATEFUL_FILTERS)
    chain.remember_many(["a"], ["Name three birds"])
    assert chain.decide(Draft("name  THREE birds", "", "wren")).rejection.detail == "same as a"
    by_output = FilterChain(FILTERS.validate_python([{"type": "exact_duplicate", "fields": ["output"]}]))
    by_output.remember_many(["a"], ["Name three birds"])
    by_output.remember("b", Draft("Name three birds"))
    assert by_output.decide(Draft("Name three birds", "", "")).rejection is None
    by_output.remember("c", Draft("Name three birds", "", "wren"))
    assert by_output.decide(Draft("Name a bird", "", "Wren ")).rejection.detail == "same as c"


def test_columns_of_unequal_length_are_refused():
    for chain in (FilterChain(STATEFUL_FILTERS), FilterChain([])):
        with pytest.raises(ValueError, match="there are 2 ids"):
            chain.remember_many(["a", "b"], ["x y", "y z"], ["only one"])
        with pytest.raises(ValueError, match="there are 2 ids"):
            chain.remember_many(["a", "b"], ["x y"])


def test_nearest_are_told_of_what_is_kept_and_of_what_is_not_new():
    chain = FilterChain(SELF_INSTRUCT_FILTERS)
    chain.remember_many(["a", "b"], ["Name three birds of the forest", "Sort these words by length"])
    kept = chain.decide(Draft("Name some old trees of the forest"))
    assert kept.rejection is None and [n.id for n in kept.nearest] == ["a"]
    again = chain.decide(Draft("Name three birds of the forest today"))
    assert again.rejection.reason == "not_novel" and again.nearest[0].id == "a"
    assert again.rejection.detail == "ROUGE-L 0.923 to a"
    assert chain.decide(Draft("Draw three birds of the forest")).nearest == ()  # novelty was not asked


def test_nearest_are_told_whatever_a_later_filter_says():
    chain = FilterChain(FILTERS.validate_python([{"type": "novelty"}, {"type": "empty"}, {"type": "blacklist"}]))
    chain.remember("a", Draft("Name three birds of the forest"))
    decision = chain.decide(Draft("Draw some old trees of the forest"))
    assert decision.rejection.reason == "blacklisted_word" and [n.id for n in decision.nearest] == ["a"]
    assert [n.id for n in chain.decide(Draft("Grow some old trees of the forest")).nearest] == ["a"]


def test_no_neighbors_are_stored_if_none_are_wanted():
    chain = FilterChain(FILTERS.validate_python([{"type": "novelty", "num_nearest": 0}]))
    chain.remember("a", Draft("Name three birds of the forest"))
    assert chain.decide(Draft("Name three birds of the forest today")) == chain.decide(
        Draft("name three birds of the forest, today")
    )
    decision = chain.decide(Draft("Name three birds of the forest today"))
    assert (decision.rejection.detail, decision.nearest) == ("ROUGE-L 0.923 to a", ())
    assert chain.decide(Draft("Name two trees")).rejection is None


@pytest.mark.skipif(not PUBLISHED_SEEDS.is_file(), reason="the published seeds are not at hand")
@pytest.mark.parametrize(
    ("filters", "expected_reasons"),
    [
        (SELF_INSTRUCT_FILTERS, {"kept": 170, "too_short": 2, "begins_with": 1, "not_novel": 2}),
        (ALPACA_FILTERS, {"kept": 169, "too_short": 2, "begins_with": 1, "not_novel": 2, "blacklisted_word": 1}),
    ],
    ids=["self_instruct", "alpaca"],
)
def test_the_published_seeds_one_after_the_other(filters, expected_reasons):
    """Neighbors and decisions are those of rouge_score over all seeds that were kept before."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    chain = FilterChain(filters)
    kept: list[SeedTask] = []
    reasons: Counter[str] = Counter()
    for task in load_seed_tasks(PUBLISHED_SEEDS):
        decision = chain.decide(Draft(task.instruction))
        reason = decision.rejection.reason if decision.rejection else "kept"
        reasons[reason] += 1
        if reason in ("kept", "not_novel"):
            scores = [scorer.score(other.instruction, task.instruction)["rougeL"].fmeasure for other in kept]
            ranked = sorted(range(len(kept)), key=lambda place: (-scores[place], place))[:10]
            expected = [(kept[place].id, scores[place]) for place in ranked if scores[place] > 0]
            assert [(neighbor.id, neighbor.score) for neighbor in decision.nearest] == expected
            assert (reason == "not_novel") is (max(scores, default=0.0) > 0.7)
        if reason == "kept":
            kept.append(task)
            chain.remember(task.id, Draft(task.instruction))
    assert reasons == expected_reasons
