"""A model scores finished rows, and rows with low scores are rejected."""

import shutil

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from generation.config.common import JudgeConfig
from generation.config.methods import AnswerOnlyConfig
from generation.driver import Driver
from generation.judge import SCORES
from generation.requester import ServedModel
from generation.seed_tasks import SeedTask
from tests.generation.harness import SEEDS, CoroutinePool, drive, prompt_text

RUBRIC = "Rhymes are good."


def is_judge(request: GenerationRequest) -> bool:
    return request.sampling.structured is not None


def judging(score_of: dict[str, str | tuple[str, str]], default: str = "5") -> CoroutinePool:
    """Every answer repeats its question. The judge scores by a text that occurs in the row."""

    def answer(request: GenerationRequest) -> str | tuple[str, str]:
        text = prompt_text(request)
        if not is_judge(request):
            return f"You asked: {text}"
        return next((score for piece, score in score_of.items() if piece in text), default)

    return CoroutinePool(answer=answer)


def config(**judge: object) -> AnswerOnlyConfig:
    return AnswerOnlyConfig(judge=JudgeConfig(rubric=RUBRIC, **judge))


def counts(driver: Driver) -> tuple[int, int]:
    total = driver.committed
    return total.num_requests, total.num_completion_tokens


def test_rows_that_score_too_low_are_rejected_with_their_score(tmp_path):
    pool = judging({"about boats": "3", "about drums": "1", "about inks": "4"})
    made = drive(tmp_path, pool, config())
    assert len(made.rows) == len(SEEDS) - 2
    assert {row["task"]: row["score"] for row in made.rows}["seed-8-0"] == 4
    assert not {"seed-1", "seed-3"} & {row["task"] for row in made.rows}
    rejected = [(row["kind"], row["task"], row["reason"], row["detail"]) for row in made.rejected]
    assert rejected == [("row", "seed-1-0", "low_score", "3"), ("row", "seed-3-0", "low_score", "1")]
    assert made.rejected[0]["output"] == f"You asked: {SEEDS[1].instruction}"


@pytest.mark.parametrize(("min_score", "num_rows"), [(1, 10), (2, 9), (5, 1)])
def test_the_lowest_score_that_passes_is_a_setting(tmp_path, min_score, num_rows):
    made = drive(tmp_path, judging({"apples": "5", "boats": "1"}, default="4"), config(min_score=min_score))
    assert len(made.rows) == num_rows


@pytest.mark.parametrize(
    ("answer", "detail"),
    [(("", "prompt_too_long"), "prompt_too_long"), (("", "engine_died"), "engine_died"), (" great \n", "great")],
)
def test_a_row_without_a_score_is_rejected(tmp_path, answer, detail):
    made = drive(tmp_path, judging({"about boats": answer}), config(min_score=1))
    assert [(row["reason"], row["detail"], row["task"]) for row in made.rejected] == [
        ("not_judged", detail, "seed-1-0")
    ]
    assert len(made.rows) == len(SEEDS) - 1


def test_the_engine_may_write_only_a_score(tmp_path):
    pool = judging({})
    seeds = [SeedTask("a", "a", "Rhyme on this.", SEEDS[0].instances, False)]
    made = drive(tmp_path, pool, config(), seeds=seeds)
    (request,) = filter(is_judge, pool.requests)
    assert request.sampling.structured.choice == SCORES == ("1", "2", "3", "4", "5")
    assert (request.sampling.temperature, request.sampling.max_tokens) == (0, 8)
    (turn,) = request.prompt
    assert turn["role"] == "user"
    for part in (RUBRIC, "Rhyme on this.", made.rows[0]["messages"][1]["content"]):
        assert part in turn["content"]


def test_requests_to_the_judge_are_counted(tmp_path):
    plain = drive(tmp_path / "plain", judging({}), AnswerOnlyConfig())
    judged = drive(tmp_path / "judged", judging({}), config())
    (num_plain, tokens_plain), (num_judged, tokens_judged) = counts(plain.driver), counts(judged.driver)
    assert (num_plain, num_judged) == (10, 20)
    assert tokens_judged == tokens_plain + 10  # one word a score


def test_another_model_may_judge_and_its_answers_are_logged(tmp_path):
    judge, answerer = judging({"about boats": "2"}), judging({})
    models = {
        "judge": ServedModel("the-judge", ModelConfig(path="j"), "rev-j", judge, "chat"),
        "answerer": ServedModel("the-answerer", ModelConfig(path="a"), "rev-a", answerer, "chat"),
    }
    made = drive(tmp_path, CoroutinePool(max_requests=0), config(), models=models)
    assert [len(pool.requests) for pool in (judge, answerer)] == [10, 10]
    assert {row["model"] for row in made.rows} == {"the-answerer"}
    shutil.rmtree(tmp_path / "data")
    again = drive(tmp_path, CoroutinePool(max_requests=0), config(), models=models)
    assert again.data == made.data
    assert [len(pool.requests) for pool in (judge, answerer)] == [10, 10]
    assert again.requester.num_resumed == 20
