"""The published rules, each with the case just inside and just outside."""

import pytest

from generation.config import SynthesizeConfig
from generation.filters import Instance, InstructionRules, check_instance, check_instances

CONFIG = SynthesizeConfig()
RULES = InstructionRules(CONFIG.min_instruction_words, CONFIG.max_instruction_words, CONFIG.blacklist)


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("", "empty"),
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
        ("Write a program that sorts words", "write_a_program"),
        ("Please Write a program that sorts", None),
        ("'Sort' these words by length", "starts_with_punctuation"),
        ("Écrivez une lettre à votre mère", "starts_with_non_ascii"),
        ("Write a letter to François now", None),
    ],
)
def test_instruction_rules(instruction, reason):
    rejection = RULES.check(instruction)
    assert (rejection.reason if rejection else None) == reason


def test_no_blacklist_forbids_no_word():
    assert InstructionRules(4, 150, ()).check("Draw a graph and a map") is None


@pytest.mark.parametrize(
    ("given", "output", "reason"),
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
def test_instance_rules(given, output, reason):
    rejection = check_instance(Instance(given, output))
    assert (rejection.reason if rejection else None) == reason


def reasons(*pairs: tuple[str, str]) -> list[str | None]:
    verdicts = check_instances([Instance(*pair) for pair in pairs])
    return [rejection.reason if rejection else None for _, rejection in verdicts]


def test_a_contradiction_costs_the_task_all_its_instances():
    assert reasons(("a", "1"), ("a", "2"), ("b", "3")) == ["contradicting_outputs"] * 3


def test_without_an_input_several_outputs_are_no_contradiction():
    assert reasons(("", "1"), ("", "2")) == [None, None]


def test_a_rejected_instance_contradicts_nothing():
    assert reasons(("a", "1"), ("a", "a"), ("a", "x:")) == [None, "input_equals_output", "ends_with_colon"]


def test_a_repeated_instance_counts_once():
    assert reasons(("a", "1"), ("a", "1"), ("b", "2")) == [None, "duplicate_instance", None]
