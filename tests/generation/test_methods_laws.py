"""What holds for every method: no timing and no kill changes its data, nothing is asked twice, no id given twice."""

import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.engines.pool import RequestRefused
from generation.config.common import JudgeConfig, SynthesisConfig
from generation.config.methods import (
    AlpacaConfig,
    AnswerOnlyConfig,
    EvolInstructConfig,
    InstructionWildConfig,
    MagpieConfig,
    RejectionSamplingConfig,
    SelfInstructConfig,
)
from generation.methods import METHODS
from generation.request_log import RequestLog
from tests.fakes import continue_prompt, prompt_text
from tests.generation.harness import CoroutinePool, Made, drive

JUDGE = JudgeConfig(min_score=2)
CONFIGS: dict[str, SynthesisConfig] = {
    config.method: config
    for config in (
        SelfInstructConfig(num_instructions=25, max_concurrent_proposals=8, judge=JUDGE),
        AlpacaConfig(num_instructions=25, max_concurrent_proposals=4, num_tasks=6),
        InstructionWildConfig(num_instructions=25, max_concurrent_proposals=8, judge=JUDGE),
        EvolInstructConfig(num_rounds=2, max_concurrent_proposals=4),
        MagpieConfig(num_instructions=20, max_concurrent_proposals=8),
        AnswerOnlyConfig(max_concurrent_proposals=4, judge=JUDGE),
        RejectionSamplingConfig(max_concurrent_proposals=4, min_score=3),
    )
}
assert CONFIGS.keys() == METHODS.keys()
by_method = pytest.mark.parametrize("method", CONFIGS)


def say(request: GenerationRequest) -> str | list[str]:
    """What the pseudo-model says in any method: a function of the request and nothing else."""
    prompt, sampling = prompt_text(request.prompt).removesuffix("\nassistant:"), request.sampling
    draw = random.Random(f"{sampling.model_dump_json()}\0{prompt}")
    if sampling.structured:
        return draw.choice(sampling.structured.choice)
    if opening := re.search(r"(\d+)\. Instruction:$", prompt):
        return _tasks(draw, int(opening[1]))
    words = [continue_prompt(prompt, f"{draw.random()}") for _ in range(sampling.n)]
    return words if sampling.n > 1 else words[0]


def _tasks(draw: random.Random, first: int) -> str:
    """Three tasks of Alpaca, some of them with a wrong number or without an output, some the same every time."""
    items = []
    for number in range(first, first + 3):
        written = number + (draw.random() < 0.1)
        words = continue_prompt("", f"{draw.random()}") if draw.random() < 0.8 else " the same words as ever"
        output = "" if draw.random() < 0.1 else words[::-1]
        items.append(f"{written}. Instruction: Do{words}\n{number}. Input:\n<noinput>\n{number}. Output: {output}\n")
    return "###\n".join(items).partition(":")[2]


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory) -> ModelConfig:
    """A tokenizer with a chat template; there are no weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat-model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<user>": 1, "<end>": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}<end>{% endfor %}"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<user>"],
        chat_template=template,
    ).save_pretrained(folder)
    return ModelConfig(path=str(folder))


Drive = Callable[..., Made]


@pytest.fixture(scope="module")
def run_method(chat_model) -> Drive:
    def run_method(folder: Path, pool: CoroutinePool, method: str, seed: int = 0, **changes: object) -> Made:
        return drive(folder, pool, CONFIGS[method].model_copy(update=changes), seed=seed, source=chat_model)

    return run_method


@pytest.fixture(scope="module")
def undisturbed(run_method, tmp_path_factory) -> dict[str, tuple[Made, list[str]]]:
    """Of each method what it makes when nothing happens, and the ids of its requests."""
    made = {}
    for method in CONFIGS:
        pool = CoroutinePool(0, answer=say)
        made[method] = (
            run_method(tmp_path_factory.mktemp(method), pool, method),
            [request.request_id for request in pool.requests],
        )
    return made


@by_method
def test_there_is_something_to_hold_the_laws_on(undisturbed, method):
    made, asked = undisturbed[method]
    machine = [row for row in made.rows if row["method"] == method]
    assert len(machine) >= 5
    assert len(made.rejected) >= 1 or method == "magpie"
    assert len(asked) >= 10
    assert made.driver.stopped_because == ""


@by_method
@pytest.mark.parametrize("timing", [1, 2])
def test_the_order_in_which_answers_come_changes_nothing(tmp_path, run_method, undisturbed, method, timing):
    pool = CoroutinePool(timing, answer=say)
    assert run_method(tmp_path, pool, method).data == undisturbed[method][0].data


@by_method
@pytest.mark.parametrize("checkpoint_seconds", [0, 1000])
@pytest.mark.parametrize("part_done", [0.0, 0.4, 0.9])
def test_after_a_kill_the_same_data_is_made_and_nothing_logged_is_asked_again(
    tmp_path, run_method, undisturbed, method, part_done, checkpoint_seconds
):
    expected, asked = undisturbed[method]
    num_before_kill = max(1, int(part_done * len(asked)))
    with pytest.raises(ExceptionGroup):
        killed = CoroutinePool(5, max_requests=num_before_kill, answer=say)
        run_method(tmp_path, killed, method, checkpoint_seconds=checkpoint_seconds)
    with RequestLog(tmp_path / "requests") as log:
        logged = log.ids()
    assert len(logged) == num_before_kill
    pool = CoroutinePool(6, answer=say)
    made = run_method(tmp_path, pool, method, checkpoint_seconds=checkpoint_seconds)
    assert made.data == expected.data
    assert logged.isdisjoint(request.request_id for request in pool.requests)


@by_method
def test_no_request_is_made_twice_and_no_id_given_twice(undisturbed, method):
    made, asked = undisturbed[method]
    assert len(asked) == len(set(asked))
    for rows in made.data:
        ids = [row["id"] for row in rows]
        assert len(ids) == len(set(ids))


@by_method
def test_all_that_was_generated_is_kept_or_rejected(undisturbed, method):
    made, asked = undisturbed[method]
    done = {row["task"] for row in made.rows} | {row["task"] for row in made.rejected}
    assert done >= {row["id"] for row in made.instructions}
    kinds = Counter(row["kind"] for row in made.rejected)
    committed = made.driver.committed
    assert committed.num_generated == len(made.instructions) + kinds["instruction"]
    proposals = {row["request_id"] for row in made.instructions} | {row["source"] for row in made.rejected}
    assert sum(request_id in proposals for request_id in asked) <= committed.num_requests <= len(asked)
    if method in ("answer_only", "rejection_sampling"):
        n = CONFIGS[method].answer_sampling.n
        assert len(made.rows) + len(made.rejected) - kinds["instruction"] == n * len(made.instructions)


@by_method
def test_reasoning_is_kept_apart_and_changes_no_text(tmp_path, run_method, undisturbed, method):
    def think(request: GenerationRequest) -> str | list[str]:
        said = say(request)
        if request.sampling.structured:
            return said
        texts = [
            f"<think>\nOkay, 1. the user wants this.\n\n2. Output: fine\n</think>\n\n{text}"
            for text in (said if isinstance(said, list) else [said])
        ]
        return texts if isinstance(said, list) else texts[0]

    made = run_method(tmp_path, CoroutinePool(1, answer=think), method)
    assert made.turns() == undisturbed[method][0].turns()
    assert [row["reason"] for row in made.rejected] == [row["reason"] for row in undisturbed[method][0].rejected]
    for row in made.rows:
        assert (row["reasoning_content"] or "").startswith("Okay, 1. the user") == (row["method"] == method)
        assert "think" not in row["messages"][0]["content"] + row["messages"][1]["content"]


@by_method
def test_requests_that_the_engine_refuses_cost_their_own_rows_alone(tmp_path, run_method, method):
    def refuse(request: GenerationRequest) -> str | list[str]:
        if int(request.request_id[:8], 16) % 5 == 0:
            raise RequestRefused(request.request_id, "ValueError: the prompt is empty")
        return say(request)

    made = run_method(tmp_path / "1", CoroutinePool(1, answer=refuse), method)
    assert any(row["method"] == method for row in made.rows)
    refused = [row for row in made.rejected if "refused" in (row["reason"], row["detail"].partition(":")[0])]
    assert refused and all("ValueError: the prompt is empty" in row["detail"] for row in refused)
    again = CoroutinePool(2, answer=refuse)
    assert run_method(tmp_path / "2", again, method).data == made.data


@by_method
def test_another_seed_makes_other_data(tmp_path, run_method, undisturbed, method):
    made = run_method(tmp_path, CoroutinePool(0, answer=say), method, seed=1)
    ids = {row["id"] for row in made.rows if row["method"] == method}
    assert ids and ids.isdisjoint(row["id"] for row in undisturbed[method][0].rows)
