"""What a reasoning model thinks is taken off its answer, however its template marks it, and nothing else is."""

import pytest

from cluster.config import ModelConfig
from generation.config.methods import AnswerOnlyConfig
from generation.filters.reasoning import opened_by, split_reasoning
from generation.requester import ServedModel
from tests.generation.harness import SEEDS, CoroutinePool, drive


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        ("<think>\nHm.\n</think>\n\nParis.", "Paris.", "Hm."),
        ("<think>\n\n</think>\n\nParis.", "Paris.", ""),
        ("Hm, Paris?\n</think>\n\nParis.", "Paris.", "Hm, Paris?"),  # the template has opened it
        ("Hm.</think>Paris.", "Paris.", "Hm."),
        ("<think>It goes on and", "", "It goes on and"),  # cut
        ("<think>a</think>", "", "a"),
        ("Sure.\n<think>\nHm.\n</think>\nParis.", "Sure.\n\nParis.", "Hm."),
        ("<think>a</think>Paris.\n<think>b</think>Lyon.", "Paris.\nLyon.", "a\n\nb"),
        ("<think>a <think> b </think> c</think>Paris.", "Paris.", "a <think> b </think> c"),
        ("<think>I close with `</think>`, so</think>Paris.", "Paris.", "I close with `</think>`, so"),
        ("<THINKING>Hm.</THINKING> Paris.", "Paris.", "Hm."),
        ("<thought>Hm.</thought>\nParis.", "Paris.", "Hm."),
        ("[THINK]Hm.[/THINK]Paris.", "Paris.", "Hm."),
        ("<seed:think>Hm.</seed:think>Paris.", "Paris.", "Hm."),
        ("<think>Hm.</think>\n<answer>\nParis.\n</answer>", "Paris.", "Hm."),
        ("analysisWe need Paris.assistantfinalParis.", "Paris.", "We need Paris."),
        ("Here is my thought process: hm. Here is my response: Paris.", "Paris.", "hm."),
    ],
)
def test_reasoning_is_taken_off(text, answer, reasoning):
    assert split_reasoning(text) == (answer, reasoning)


@pytest.mark.parametrize(
    "text",
    [
        " Paris.\n",
        "Close it with `</think>`, always.",
        "The text between <think> and </think> is hidden.",
        "```\n<think>\nHm.\n</think>\n```",
        "analysis of the assistant",
        "I think <b>so</b>.",
        "",
    ],
)
def test_a_text_without_reasoning_stays_as_it_is(text):
    assert split_reasoning(text) == (text, "")


def test_the_end_of_a_prompt_shows_that_the_template_opens_the_reasoning():
    assert opened_by("<|assistant|>\n<think>\n") == "<think>"
    assert opened_by("<|assistant|>\n<think>\n\n</think>\n\n") == ""
    assert opened_by("<|assistant|>\n") == ""


def test_what_a_template_opened_is_reasoning_until_it_is_closed(tmp_path):
    says = {"apples": "Hm.\n</think>\nRed.", "boats": ("Hm, hm and", "length"), "clouds": "<think>Hm.</think>White."}

    def answer(request) -> str | tuple[str, str]:
        return next(text for word, text in says.items() if word in request.prompt[-1]["content"])

    pool = CoroutinePool(answer=answer)
    model = ServedModel("model", ModelConfig(path="model"), "r", pool, "chat", None, {"effort": 1}, "<think>")
    made = drive(tmp_path, pool, AnswerOnlyConfig(), seeds=SEEDS[:3], models={"answerer": model})
    assert [(row["messages"][1]["content"], row["reasoning_content"]) for row in made.rows] == [
        ("Red.", "Hm."),
        ("White.", "Hm."),
    ]
    assert [(row["reason"], row["output"]) for row in made.rejected] == [("only_reasoning", "Hm, hm and")]
    assert {tuple(request.chat_template_kwargs.items()) for request in pool.requests} == {(("effort", 1),)}
