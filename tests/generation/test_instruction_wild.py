"""InstructionWild: instructions alone from five demonstrations, in any language, answered in a second pass."""

import re

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.methods import InstructionWildConfig
from generation.requester import ServedModel
from generation.seed_tasks import SeedTask, load_seed_tasks
from tests.generation.harness import ROOT, SEEDS, CoroutinePool, drive, prompt_text

PACKAGED = ROOT / "generation" / "seeds" / "user_instructions.jsonl"


def answering(listed: str, answer: str | tuple[str, str] = "An answer.") -> CoroutinePool:
    """A pool whose lists of instructions are all `listed`."""
    return CoroutinePool(answer=lambda request: listed if isinstance(request.prompt, str) else answer)


def lists(pool: CoroutinePool) -> list[str]:
    return [request.prompt for request in pool.requests if isinstance(request.prompt, str)]


def test_five_seeds_are_shown_and_the_list_goes_on_at_six(tmp_path):
    pool = CoroutinePool(0)
    made = drive(tmp_path, pool, InstructionWildConfig(num_instructions=20, max_concurrent_proposals=1))
    seeds = {seed.instruction for seed in SEEDS}
    for prompt in lists(pool):
        shown = re.findall(r"^\d\. (.*)$", prompt, re.MULTILINE)
        assert len(shown) == len(set(shown)) == 5 and seeds >= set(shown)
        assert prompt.endswith("\n6.") and "in English" in prompt
    assert len(made.instructions) == 20
    assert all(len(row["seed_ids"]) == 5 and row["parent_ids"] == [] for row in made.rows)


def test_rows_are_instruction_and_answer_without_an_input(tmp_path):
    pool = answering(" How do I rest?\n7. fix this:  print(1\n8. why NASA", " Like this.\n")
    made = drive(tmp_path, pool, InstructionWildConfig(num_instructions=3, max_requests=1))
    assert made.turns() == [
        ("How do I rest?", "Like this."),
        ("fix this: print(1", "Like this."),
        ("why NASA", "Like this."),
    ]
    assert {row["input"] for row in made.instructions} == {""}
    assert {(row["method"], row["prompt_name"]) for row in made.rows} == {
        ("instruction_wild", "instruction_wild/answer")
    }
    asked = [request.prompt for request in pool.requests if not isinstance(request.prompt, str)]
    assert [len(turns) for turns in asked] == [1, 1, 1]
    assert {turns[0]["content"] for turns in asked} == {row["instruction"] for row in made.instructions}


def test_a_chat_that_begins_the_list_anew_adds_no_instruction(tmp_path):
    def answer(request: GenerationRequest) -> str:
        is_list = prompt_text(request).endswith("\n6.")
        return "Here are some more:\n\n6. one of them\n7. two of these" if is_list else "An answer."

    config = InstructionWildConfig(num_instructions=2, max_requests=1, models={"writer": {"form": "chat"}})
    made = drive(tmp_path, CoroutinePool(answer=answer), config)
    assert [row["instruction"] for row in made.instructions] == ["one of them", "two of these"]


def test_another_model_may_answer(tmp_path):
    writer, answerer = CoroutinePool(1), CoroutinePool(2)
    models = {
        "writer": ServedModel("the-writer", ModelConfig(path="w"), "rev-w", writer, "completion"),
        "answerer": ServedModel("the-answerer", ModelConfig(path="a"), "rev-a", answerer, "chat"),
    }
    made = drive(tmp_path, CoroutinePool(answer=None, max_requests=0), InstructionWildConfig(), models=models)
    assert len(made.instructions) == len(answerer.requests) == 100
    assert {(row["model"], row["model_revision"]) for row in made.rows} == {("the-answerer", "rev-a")}
    assert all(isinstance(request.prompt, str) for request in writer.requests)
    assert {request.prompt[0]["content"] for request in answerer.requests} == {
        row["instruction"] for row in made.instructions
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (" \n", "empty_output"),
        (("Cut in the mid", "length"), "truncated_response"),
        (("", "engine_died"), "engine_died"),
    ],
)
def test_an_answer_that_is_none_is_a_reject(tmp_path, answer, reason):
    made = drive(tmp_path, answering(" hello there", answer), InstructionWildConfig(num_instructions=1))
    assert (made.rows, made.reasons) == ([], {reason})
    assert made.rejected[0]["kind"] == "answer" and made.rejected[0]["task"] == made.instructions[0]["id"]


def test_a_list_cut_at_max_tokens_loses_its_last_instruction(tmp_path):
    cut = (" a first\n7. b second\n8. c thi", "length")
    pool = CoroutinePool(answer=lambda request: cut if isinstance(request.prompt, str) else "An answer.")
    made = drive(tmp_path, pool, InstructionWildConfig(max_requests=1))
    assert [row["instruction"] for row in made.instructions] == ["a first", "b second"]


# -- languages

CHINESE = [
    SeedTask("zh0", "", "写一首关于秋天的诗", (), False, "Chinese"),
    SeedTask("zh1", "", "怎么煮鸡蛋", (), False, "Chinese"),
]
MIXED = [*CHINESE, SeedTask("en", "", "how do i boil an egg", (), False, "English")]


def test_novelty_sees_chinese(tmp_path):
    listed = ("写一首关于冬天的诗", "7. 推荐三本适合孩子的书", "8、推荐三本适合孩子的书吧", "9. 解释什么是通货膨胀")
    pool = answering("\n".join(listed), "好的。")
    config = InstructionWildConfig(num_instructions=9, max_requests=1, language="Chinese")
    made = drive(tmp_path, pool, config, seeds=CHINESE)
    assert [row["instruction"] for row in made.instructions] == ["推荐三本适合孩子的书", "解释什么是通货膨胀"]
    assert [(row["instruction"], row["reason"]) for row in made.rejected] == [
        ("写一首关于冬天的诗", "not_novel"),  # 8 of 9 characters are those of a seed
        ("推荐三本适合孩子的书吧", "not_novel"),
    ]


@pytest.mark.parametrize(
    ("language", "shown", "said"),
    [
        ("Chinese", {"zh0", "zh1"}, "in Chinese."),
        ("English", {"en"}, "in English."),
        (None, {"zh0", "zh1", "en"}, None),
    ],
)
def test_seeds_of_the_language_alone_are_shown(tmp_path, language, shown, said):
    pool = answering(" something else entirely")
    made = drive(tmp_path, pool, InstructionWildConfig(max_requests=1, language=language), seeds=MIXED)
    assert set(made.rows[0]["seed_ids"]) == shown
    assert lists(pool)[0].splitlines()[0].endswith(said or "can be answered in text.")


def test_a_language_without_seeds_is_an_error(tmp_path):
    with pytest.raises(
        InputError, match=r"language=Dutch: no seed is in that language; they are in Chinese, English\."
    ):
        drive(tmp_path, answering(""), InstructionWildConfig(language="Dutch"), seeds=MIXED)


def test_a_run_over_the_packaged_seeds(tmp_path):
    def write(request: GenerationRequest) -> str:
        number = len(prompt_text(request)) * 31 + request.sampling.seed
        return f" {number:x} {number * 7:x}\n7. {number * 3:x} or {number * 5:x}"

    pool, seeds = CoroutinePool(answer=write), load_seed_tasks(PACKAGED)
    made = drive(tmp_path, pool, InstructionWildConfig(num_instructions=80, max_concurrent_proposals=4), seeds=seeds)
    assert len(made.rows) == 80
    english = {seed.id for seed in seeds if seed.language == "English"}
    assert english > {seed_id for row in made.rows for seed_id in row["seed_ids"]}
    assert all(prompt.count("\n") == 7 for prompt in lists(pool))  # pasted text of several lines is on one
