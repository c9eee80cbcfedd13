"""Each rule, with the case just inside and just outside."""

import json
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from cluster.errors import InputError
from generation.config.filters import (
    ALPACA_FILTERS,
    ROW_FILTERS,
    SELF_INSTRUCT_FILTERS,
    STOP_WORDS,
    FilterConfig,
)
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Instance
from generation.filters.rules import check_instance, check_instances, duplicate_share
from generation.seed_tasks import load_seed_tasks
from tests.generation.harness import ROOT

FILTERS = TypeAdapter(list[FilterConfig])


def chain(*entries: dict) -> FilterChain:
    """A chain out of what a recipe says."""
    return FilterChain(FILTERS.validate_python(list(entries)))


def reason(entry: dict, **fields: str) -> str | None:
    rejection = chain(entry).decide(Draft(**{"instruction": "Sort these four words", **fields})).rejection
    return rejection and rejection.reason


# -- Self-Instruct's heuristics, in their order

HEURISTICS = [
    ("", "empty"),
    (" \n", "empty"),
    ("Sort these words", "too_short"),
    ("Sort these four words", None),
    (" ".join(["word"] * 150), None),
    (" ".join(["word"] * 151), "too_long"),
    ("Describe the image in words", "blacklisted_word"),
    ("Describe the IMAGES in words", "blacklisted_word"),
    ("Then go to the market today", "blacklisted_word"),
    ("Then go on to the market", None),
    ("Explain photography to a child", None),
    ("Draw a cat with words", "blacklisted_word"),
    ("Use a drawer for the socks", None),
    ("Use a draw_er for socks", None),
    ("Sort the files, then stop.", "blacklisted_word"),
    ("Write a program that sorts words", "begins_with"),
    ("Write a programme for the concert", "begins_with"),
    ("write a program that sorts words", None),
    ("Please Write a program that sorts", None),
    ("'Sort' these words by length", "starts_with_punctuation"),
    ("_Sort_ these words by length", "starts_with_punctuation"),
    ("Écrivez une lettre à votre mère", None),
    ("“Sort” these words by length", None),
    ("• Sort these words by length", "starts_with_punctuation"),
    ("🙂 Sort these words by length", "starts_with_punctuation"),
    ("¿Cuál es la capital de Perú?", None),
    ("Объясните, почему небо голубое.", None),
    ("给出三个健康早餐的建议。", None),
    ("「写」一封感谢信给你的老师。", None),
    ("写信", "too_short"),
    ("写" * 151, "too_long"),
    ("空はなぜ青いのですか", None),
    ("อธิบายว่าทำไมท้องฟ้าเป็นสีฟ้า", None),
    ("Write a letter to François now", None),
    ("7 is a prime number, why?", None),
]


@pytest.mark.parametrize(("instruction", "expected"), HEURISTICS)
def test_the_heuristics_of_self_instruct(instruction, expected):
    for decide in (FilterChain(SELF_INSTRUCT_FILTERS).decide, FilterChain(ALPACA_FILTERS).decide):
        rejection = decide(Draft(instruction)).rejection
        assert (rejection and rejection.reason) == expected


@pytest.mark.parametrize("word", ["video", "Audio", "music", "flowchart", "diagram"])
def test_alpaca_forbids_more_words(word):
    draft = Draft(f"Describe a {word} in five words")
    assert FilterChain(SELF_INSTRUCT_FILTERS).decide(draft).rejection is None
    assert FilterChain(ALPACA_FILTERS).decide(draft).rejection.detail == word


@pytest.mark.parametrize("filters", [SELF_INSTRUCT_FILTERS, ALPACA_FILTERS])
def test_the_published_chains_end_with_novelty_at_seven_tenths(filters):
    novelty = filters[-1]
    assert (novelty.type, novelty.max_score, novelty.num_nearest, novelty.tokenizer) == ("novelty", 0.7, 10, "unicode")
    chain = FilterChain(filters)
    chain.remember("a", Draft("one two three four five six seven eight nine ten"))
    # Nine and nine of ten tokens in common: 0.9; seven of ten: 0.7, which is not more than 0.7.
    assert chain.decide(Draft("one two three four five six seven eight nine zen")).rejection.reason == "not_novel"
    decision = chain.decide(Draft("one two three four five six seven xx yy zz"))
    assert decision.rejection is None
    assert [(n.id, round(n.score, 9)) for n in decision.nearest] == [("a", 0.7)]


def test_lists_without_entries_reject_nothing():
    assert reason({"type": "blacklist", "words": []}, instruction="Draw a graph and a map") is None
    assert reason({"type": "begins_with", "texts": []}) is None
    assert reason({"type": "format_leakage", "markers": []}, instruction="### Instruction:") is None
    assert reason({"type": "refusal", "phrases": [], "short_phrases": []}, output="Sorry.") is None


@pytest.mark.parametrize(
    ("entry", "text", "expected"),
    [
        ({"type": "length", "min_words": 0, "max_words": None, "min_characters": 3}, "ab", "too_short"),
        ({"type": "length", "min_words": 0, "max_words": None, "min_characters": 3}, "abc", None),
        ({"type": "length", "min_words": 0, "max_words": None, "max_characters": 3}, "abc", None),
        ({"type": "length", "min_words": 0, "max_words": None, "max_characters": 3}, "abcd", "too_long"),
        ({"type": "blacklist", "words": ["C++", "c"]}, "Write it in C++ now", "blacklisted_word"),
        ({"type": "blacklist", "words": ["C++"]}, "Write it in C++17 now", None),
        ({"type": "begins_with", "ignore_case": True}, "WRITE A PROGRAM", "begins_with"),
        ({"type": "begins_with", "texts": ["", "x"]}, "anything", "begins_with"),
        ({"type": "first_character", "reject_punctuation": False}, "'Sort' it", None),
        ({"type": "first_character", "reject_non_ascii": True}, "Écrivez", "starts_with_non_ascii"),
        ({"type": "first_character"}, "", None),
        ({"type": "first_character"}, " 'Sort'", None),
    ],
)
def test_the_heuristics_as_a_recipe_sets_them(entry, text, expected):
    assert reason(entry, instruction=text) == expected


def test_a_text_may_be_short_in_both_units_and_the_limits_leave_room():
    entry = {"type": "length", "min_words": 2, "min_characters": 30, "max_words": None}
    assert chain(entry).decide(Draft("one")).rejection.detail == "1 words"
    assert chain(entry).decide(Draft("one two")).rejection.detail == "7 characters"
    with pytest.raises(ValidationError, match="min_words=9 is larger than max_words=8"):
        chain({"type": "length", "min_words": 9, "max_words": 8})


# -- which fields are read


def test_the_first_field_that_fails_decides_and_is_named():
    entry = {"type": "blacklist", "words": ["map"], "fields": ["instruction", "input", "output"]}
    assert chain(entry).decide(Draft("a map", "a map", "a map")).rejection.detail == "map"
    assert chain(entry).decide(Draft("a", "a map", "a map")).rejection.detail == "input: map"
    assert chain(entry).decide(Draft("a", "a", "a map")).rejection.detail == "output: map"
    assert chain(entry).decide(Draft("a", "a", None)).rejection is None


def test_an_empty_field_has_a_reason_of_its_own():
    entry = {"type": "empty", "fields": ["instruction", "input", "output"]}
    assert reason(entry, instruction="", input="", output="") == "empty"
    assert reason(entry, input="\t", output="") == "empty_input"
    assert reason(entry, input="x", output=" ") == "empty_output"
    assert reason(entry, input="x") is None  # the output is not written yet


@pytest.mark.parametrize("kind", ["refusal", "only_stopwords", "repetition", "same_as_input"])
def test_what_is_not_written_yet_is_not_judged(kind):
    assert reason({"type": kind}) is None


# -- what a model writes when it fails


@pytest.mark.parametrize(
    ("finish_reason", "expected"), [("stop", None), ("length", "truncated"), ("", None), ("engine_died", None)]
)
def test_truncation(finish_reason, expected):
    assert reason({"type": "truncation"}, finish_reason=finish_reason) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Sort it.\nInput: pear", "Input:"),
        ("sort it. OUTPUT: none", "OUTPUT:"),
        ("####Instruction:Sort it", "###"),
        ("Here is the #Rewritten Prompt#: sort", "#Rewritten Prompt#"),
        ("Rewrite the Given Prompt so that it is harder", "Given Prompt"),
        ("Say hello. <noinput>", "<noinput>"),
        ("Sort as in Example 1", "Example 1"),
        ("Put the input into a table", None),
        ("Give an example of a prompt", None),
        ("Tag it with #sorted and ## once", None),
    ],
)
def test_format_leakage(text, expected):
    rejection = chain({"type": "format_leakage"}).decide(Draft(text)).rejection
    assert (rejection and rejection.detail) == expected
    assert rejection is None or rejection.reason == "format_leakage"


def test_a_heading_in_an_output_is_no_leak_unless_asked_for():
    assert reason({"type": "format_leakage"}, output="### Summary") is None
    assert reason({"type": "format_leakage", "fields": ["output"]}, output="### Summary") == "format_leakage"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Sorry, I can not do that.", "refusal"),
        ("I'm SORRY.", "refusal"),
        (" ".join(["word"] * 78 + ["sorry"]), "refusal"),
        (" ".join(["word"] * 79 + ["sorry"]), None),
        (" ".join(["word"] * 200) + " As an AI I have no taste.", "refusal"),
        ("I’m unable to open links.", "refusal"),
        ("I can't help with that.", "refusal"),
        ("Sorrya is a plant.", None),
        ("He was an aide to the king.", None),
        ("Was an airplane ever as an airship?", None),
        ("", None),
    ],
)
def test_refusal(output, expected):
    assert reason({"type": "refusal"}, output=output) == expected


def test_no_text_is_short_if_the_limit_is_zero():
    assert reason({"type": "refusal", "max_words": 0}, output="Sorry.") is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("...", "only_stopwords"),
        ("It is what it is.", "only_stopwords"),
        ("— The, and; THE?", "only_stopwords"),
        ("It is blue.", None),
        ("No", None),
        ("A", None),
        ("7", None),
        ("日本", None),
        ("x", None),
        ("", None),
    ],
)
def test_only_stopwords(output, expected):
    assert reason({"type": "only_stopwords"}, output=output) == expected


def test_stop_words_are_listed_once_and_in_lower_case():
    assert len(set(STOP_WORDS)) == len(STOP_WORDS)
    assert all(word == word.casefold() and word.isalpha() for word in STOP_WORDS)


@pytest.mark.parametrize(
    ("words", "ngram_words", "expected"),
    [
        ([], 2, 0.0),
        (["a"], 2, 0.0),
        (["a", "b", "a", "b"], 2, 0.5),  # the second "a b"; "b a" occurs once
        (["a", "b", "cc", "a", "b"], 2, 2 / 6),
        (["a"] * 5, 2, 4 / 5),  # every one from the second on is inside an n-gram seen before, none counted twice
        (["a", "b", "c", "a", "b"], 3, 0.0),
        (["a", "b", "a"], 1, 1 / 3),
    ],
)
def test_the_share_inside_repeated_ngrams(words, ngram_words, expected):
    assert duplicate_share(words, ngram_words) == pytest.approx(expected)


def test_repetition():
    distinct = [f"word{i:02d}" for i in range(60)]
    assert reason({"type": "repetition"}, output=" ".join(distinct)) is None
    # Five words again at the end: 5 of 65 words, 0.08. Ten again: 10 of 70, 0.14. Eleven: 11 of 71, 0.155.
    assert reason({"type": "repetition"}, output=" ".join(distinct + distinct[:10])) is None
    assert reason({"type": "repetition"}, output=" ".join(distinct + distinct[:11])) == "repetition"
    assert reason({"type": "repetition"}, output=" ".join(distinct + distinct[:11]).title()) == "repetition"
    short = " ".join(distinct[:20] * 2)  # of fewer than 50 words
    assert reason({"type": "repetition"}, output=short) is None
    assert reason({"type": "repetition", "min_words": 40}, output=short) == "repetition"
    assert reason({"type": "repetition"}, output="no " * 8) is None
    assert reason({"type": "repetition"}, output="no NO " * 4 + "no") == "repetition"


ENGLISH = "Write a short story about a cat that goes to the market."
GERMAN = "Schreibe eine kurze Geschichte über eine Katze, die zum Markt geht."
CHINESE = "请写一个关于一只猫去市场买鱼的短篇故事，故事要有趣，并且适合孩子阅读。"


@pytest.mark.parametrize(
    ("text", "allowed", "expected"),
    [
        (ENGLISH, ["en"], None),
        (GERMAN, ["en"], "wrong_language"),
        (GERMAN, ["en", "de"], None),
        (CHINESE, ["en"], "wrong_language"),
        (CHINESE, ["zh"], None),
        ("Guten Tag!", ["en"], None),  # too short to tell
        ("12 + 30 = 42; 17 * 3 = 51; 99 - 98 = 1", ["en"], None),  # no letters at all
    ],
)
def test_language(text, allowed, expected):
    assert reason({"type": "language", "allowed": allowed}, instruction=text) == expected


def test_a_language_that_is_not_known_is_named():
    with pytest.raises(InputError, match="py3langid does not know xx in `allowed`"):
        chain({"type": "language", "allowed": ["en", "xx"]})


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ("same", "same", "input_equals_output"),
        ("same ", "\nsame", "input_equals_output"),
        ("", "", "input_equals_output"),
        ("same", "Same", None),
        ("", "x", None),
    ],
)
def test_same_as_input(given, output, expected):
    assert reason({"type": "same_as_input"}, input=given, output=output) == expected


# -- what a recipe may say


def test_a_recipe_names_a_filter_by_its_type():
    with pytest.raises(ValidationError, match="novelty"):
        chain({"type": "noveltey"})
    with pytest.raises(ValidationError, match="max_scor"):
        chain({"type": "novelty", "max_scor": 0.5})
    with pytest.raises(ValidationError, match="fields"):
        chain({"type": "empty", "fields": []})


@pytest.mark.parametrize("filters", [SELF_INSTRUCT_FILTERS, ALPACA_FILTERS])
def test_a_resolved_recipe_says_the_same_again(filters):
    written = [json.loads(config.model_dump_json()) for config in filters]
    assert FILTERS.validate_python(written) == list(filters)


def test_every_constant_says_what_it_is():
    for model in get_args(get_args(FilterConfig)[0]):
        for name, field in model.model_fields.items():
            assert name == "type" or field.description, (model, name)


# -- instances


@pytest.mark.parametrize(
    ("given", "output", "expected"),
    [
        ("", "", "input_equals_output"),
        ("same", "same", "input_equals_output"),
        ("text", "", "empty_output"),
        ("text:", "answer", "ends_with_colon"),
        ("text", "answer:", "ends_with_colon"),
        ("", "answer", None),
        ("a: b", "c", None),
    ],
)
def test_instance_rules(given, output, expected):
    rejection = check_instance(Instance(given, output))
    assert (rejection.reason if rejection else None) == expected


def reasons(*pairs: tuple[str, str]) -> list[str | None]:
    decisions = check_instances([Instance(*pair) for pair in pairs])
    return [rejection.reason if rejection else None for _, rejection in decisions]


def test_a_contradiction_costs_the_task_all_its_instances():
    assert reasons(("a", "1"), ("a", "2"), ("b", "3")) == ["contradicting_outputs"] * 3


def test_without_an_input_several_outputs_are_no_contradiction():
    assert reasons(("", "1"), ("", "2")) == [None, None]


def test_a_rejected_instance_contradicts_nothing():
    assert reasons(("a", "1"), ("a", "a"), ("a", "x:")) == [None, "input_equals_output", "ends_with_colon"]


def test_a_repeated_instance_counts_once():
    assert reasons(("a", "1"), ("a", "1"), ("b", "2")) == [None, "duplicate_instance", None]


# -- the filters of rows

QUESTION = "Write a short poem about rain."


@pytest.mark.parametrize(
    ("instruction", "input_text", "output", "expected"),
    [
        (QUESTION, "", "Drops fall on the town.", None),
        (QUESTION, "", "write a short poem -- about Rain", "repeats_instruction"),
        (QUESTION, "", "“Write a short poem about the rain.”", "repeats_instruction"),
        ("Fix the spelling.", "teh cat", "Fix the spelling: teh cat", "repeats_instruction"),
        ("Fix the spelling.", "A long text without any mistake.", "A long text without any mistake.", None),
        ("写一首关于秋天的短诗。", "", "写一首关于秋天的短诗", "repeats_instruction"),
        (QUESTION, "", "I'm sorry, but I can't help with that.", "refusal"),
        (QUESTION, "", "As an AI language model, I do not feel rain.", "refusal"),
        (QUESTION, "", "I am not able to browse the web.", "refusal"),
        (QUESTION, "", "对不起，我无法提供该信息。", "refusal"),
        (QUESTION, "", "作为一个人工智能语言模型，我没有感情。", "refusal"),
        (QUESTION, "", "Als KI-Sprachmodell kenne ich keinen Regen.", "refusal"),
        (QUESTION, "", "Dear Ann, I am sorry that I am unable to come. I can't help but wish you well.", None),
        (QUESTION, "", "Hm, rain.</think> Drops.", "reasoning"),
        (QUESTION, "", "Okay, the user wants a poem.", "reasoning"),
        (QUESTION, "", "Close it with `</think>`.", None),
        (QUESTION, "", "drip " * 9, "repetition"),
        (QUESTION, "", "drip and drop " * 30, "repetition"),
        (QUESTION, "", "好的" * 60, "repetition"),
    ],
)
def test_the_default_filters_of_rows(instruction, input_text, output, expected):
    rejection = FilterChain(ROW_FILTERS).decide(Draft(instruction, input_text, output)).rejection
    assert (rejection and rejection.reason) == expected


def test_the_seed_tasks_pass_the_default_filters():
    chain = FilterChain(ROW_FILTERS)
    for task in load_seed_tasks(ROOT / "generation" / "seeds" / "seed_tasks.jsonl"):
        for each in task.instances:
            assert chain.decide(Draft(task.instruction, each.input, each.output)).rejection is None, task


def test_a_rejection_names_its_filter():
    assert FilterChain(SELF_INSTRUCT_FILTERS).decide(Draft("Too short")).rejection.filter == "length"
