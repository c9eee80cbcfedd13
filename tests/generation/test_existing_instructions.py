"""Existing instructions: read from any of their forms, answered once, or several times to keep the best answer."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.methods import (
    AlpacaConfig,
    AnswerOnlyConfig,
    EvolInstructConfig,
    MagpieConfig,
    RejectionSamplingConfig,
    SelfInstructConfig,
)
from generation.dataset_writer import DatasetWriter
from generation.filters.drafts import Instance
from generation.methods.rejection_sampling import load_verifier
from generation.records import SCHEMA
from generation.seed_tasks import SeedDataset, SeedTask, load_seed_tasks
from tests.generation.harness import SEEDS, CoroutinePool, Made, drive, prompt_text
from toy_world.world import draw_task, seen_phrasings

PLAIN = [
    {"instruction": "Name a river.", "input": "", "output": "Elbe"},
    {"instruction": "Sort the words.", "input": "b a", "output": "a b"},
    {"instruction": "Name a river.", "input": "", "output": "Elbe"},
]
CHATS = [
    {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Name a river."}]},
    {"messages": [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Elbe, Po"}]},
    {"messages": [{"role": role, "content": role + "?"} for role in ("user", "user", "assistant")]},
]


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


def empty_dataset(folder: Path) -> Path:
    DatasetWriter(folder, SCHEMA, 10).seal()
    return folder


WRITERS = [(write_jsonl, "rows.jsonl"), (write_parquet, "rows.parquet")]


def contents(tasks) -> list[tuple[str, str, str]]:
    return [(task.instruction, task.instances[0].input, task.instances[0].output) for task in tasks]


# -- the forms


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_alpaca_rows(tmp_path, write, name):
    tasks = load_seed_tasks(write(tmp_path / name, PLAIN))
    assert contents(tasks) == [tuple(row.values()) for row in PLAIN]
    assert len({task.id for task in tasks}) == 3  # equal rows stay apart


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_conversations_give_their_first_exchange(tmp_path, write, name):
    tasks = load_seed_tasks(write(tmp_path / name, CHATS))
    assert contents(tasks) == [("Name a river.", "", ""), ("Two?", "", "Elbe, Po"), ("user?", "", "")]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_published_tasks_keep_their_instances(tmp_path, write, name):
    instances = [{"input": "b a", "output": "a b"}, {"input": "d c", "output": "c d"}]
    row = {"id": "s", "name": "sort", "instruction": "Sort.", "instances": instances, "is_classification": False}
    (task,) = load_seed_tasks(write(tmp_path / name, [row]))
    assert task == SeedTask("s", "sort", "Sort.", (Instance("b a", "a b"), Instance("d c", "c d")), False)


def test_the_same_rows_have_the_same_ids_in_every_form_of_file(tmp_path):
    for rows in (PLAIN, CHATS, [{"id": number, **row} for number, row in enumerate(PLAIN)]):
        lines, columns = (load_seed_tasks(write(tmp_path / name, rows)) for write, name in WRITERS)
        assert list(lines) == list(columns)


SHAPES = [
    ({"prompt": "Two?", "response": "Po"}, ("Two?", "", "Po")),
    ({"instruction": "Two?", "context": "Of Italy."}, ("Two?", "Of Italy.", "")),
    ({"conversations": [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Po"}]}, ("Two?", "", "Po")),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Two?"}]}]}, ("Two?", "", "")),
]


@pytest.mark.parametrize(
    "write",
    [
        lambda folder, row: write_jsonl(folder / "rows.jsonl", [row]),
        lambda folder, row: write_parquet(folder / "rows.parquet", [row]),
        lambda folder, row: write_bytes(folder / "rows.json", json.dumps([row]).encode("utf-8-sig")),
        lambda folder, row: write_bytes(folder / "rows.JSONL.gz", gzip.compress(json.dumps(row).encode("utf-16"))),
        lambda folder, row: write_bytes(folder / "rows.csv", as_csv(row)),
    ],
    ids=["jsonl", "parquet", "list", "gzip", "csv"],
)
@pytest.mark.parametrize(("row", "content"), SHAPES)
def test_seeds_may_have_the_shapes_and_files_of_examples(tmp_path, write, row, content):
    assert contents(load_seed_tasks(write(tmp_path, row))) == [content]


def write_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def as_csv(row: dict) -> bytes:
    cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
    return "\n".join(",".join('"' + cell.replace('"', '""') + '"' for cell in cells) for cells in (row, cells)).encode()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"instruction": "O\xf9 est la gare?"}', r"seeds\.jsonl:2: not UTF-8"),
        (b'{"instruction": "Say hi \\ud83d to me"}', r"seeds\.jsonl:2: .*half of a character"),
        (b'{"messages": [{"role": "user", "content": null}]}', r"seeds\.jsonl:2: a turn has no text"),
        (b'{"instruction": "a", "output": 0}', r"seeds\.jsonl:2: `output` is a number, not text"),
        (b'{"text": "a"}', r"seeds\.jsonl:2: the columns \(text\) hold no task\. .*`prompt`"),
        (b'{"conversations": [{"from": "narrator", "value": "a"}]}', r"seeds\.jsonl:2: the speaker 'narrator'"),
    ],
)
def test_a_bad_line_of_seeds_is_named(tmp_path, line, message):
    (tmp_path / "seeds.jsonl").write_bytes(b'{"prompt": "Say hi"}\n' + line)
    with pytest.raises(InputError, match=message):
        load_seed_tasks(tmp_path / "seeds.jsonl")


def test_rows_of_a_dataset_are_a_sequence_and_stay_columns(tmp_path):
    tasks = load_seed_tasks(write_parquet(tmp_path / "rows.parquet", PLAIN))
    assert isinstance(tasks, SeedDataset)
    assert tasks[-1] == tasks[2] == list(tasks)[2]
    assert {task.id for task in Random(0).sample(tasks, 3)} == {task.id for task in tasks}
    with pytest.raises(IndexError):
        tasks[3]


def test_one_of_our_datasets_can_be_answered_anew(tmp_path):
    made = drive(tmp_path / "first", CoroutinePool(answer=lambda _: "Elbe."), AnswerOnlyConfig(), seeds=SEEDS)
    tasks = load_seed_tasks(tmp_path / "first" / "data" / "synthesized")
    assert [(task.id, task.instruction, task.instances[0].output) for task in tasks] == [
        (row["id"], *turns) for row, turns in zip(made.rows, made.turns(), strict=True)
    ]
    again = drive(tmp_path / "again", CoroutinePool(answer=lambda _: "Po."), AnswerOnlyConfig(), seeds=tasks)
    assert again.turns() == [(task.instruction, "Po.") for task in tasks]
    assert [row["seed_ids"] for row in again.rows] == [[row["id"]] for row in made.rows]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a"}, {"instruction": " "}], r"rows\.parquet:2: the instruction is empty"),
        ([{"instruction": "a"}, {"instruction": None}], r"rows\.parquet:2: the instruction is empty"),
        ([{"instruction": 7}], r"rows\.parquet:1: `instruction` is a number, not text"),
        ([{"text": "a"}], r"rows\.parquet:1: the columns \(text\) hold no task"),
        (
            [{"id": i, "instruction": "a"} for i in "aabca"],
            r"rows\.parquet:2: id 'a' is already used in rows\.parquet:1",
        ),
        ([CHATS[0], {"messages": [{"role": "system", "content": "a"}]}], r"rows\.parquet:2: .* no turn of a user"),
        ([*CHATS, {"messages": [{"role": "user", "content": ""}]}], r"rows\.parquet:4: the instruction is empty"),
        ([*CHATS, {"messages": []}], r"rows\.parquet:4: `messages` is not a list of turns"),
        ([{"messages": ["a"]}], r"rows\.parquet:1: `messages` is not a list of"),
        ([{"messages": "a"}], r"rows\.parquet:1: `messages` is text, but not JSON"),
    ],
)
def test_a_bad_row_of_a_column_file_is_named(tmp_path, rows, message):
    with pytest.raises(InputError, match=message):
        load_seed_tasks(write_parquet(tmp_path / "rows.parquet", rows))


def test_files_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "bad.parquet").write_text("no such thing")
    with pytest.raises(InputError, match=r"bad\.parquet: not a Parquet file"):
        load_seed_tasks(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match=r"synthesize\.seeds: .*none\.parquet does not exist"):
        load_seed_tasks(tmp_path / "none.parquet")
    with pytest.raises(InputError, match="holds no seed task"):
        load_seed_tasks(empty_dataset(tmp_path / "empty"))
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(InputError, match="unfinished"):
        load_seed_tasks(tmp_path / "unfinished")


# -- one answer


def test_every_given_instruction_is_answered_with_its_input(tmp_path):
    pool = CoroutinePool(answer=lambda request: f" To {prompt_text(request)!r}.\n")
    made = drive(tmp_path / "run", pool, AnswerOnlyConfig(row_filters=()), seeds=given(tmp_path))
    users = ["Name a river.", "Sort the words.\n\nb a", "Name a river."]
    assert made.turns() == [(user, f"To {user!r}.") for user in users]
    assert len({row["id"] for row in made.rows}) == 3
    assert [row["task"] for row in made.rows] == [row["id"] for row in made.instructions]
    assert {request.sampling.temperature for request in pool.requests} == {0.7}


def test_answers_that_cannot_be_rows_are_rejected_with_their_text(tmp_path):
    answers = {"apples": ("Half an", "length"), "boats": " ", "clouds": ("", "prompt_too_long"), "drums": "Loud."}

    def answer(request: GenerationRequest) -> str | tuple[str, str]:
        return next(text for word, text in answers.items() if word in prompt_text(request))

    made = drive(tmp_path, CoroutinePool(answer=answer), AnswerOnlyConfig(max_instructions=4))
    rejects = [(row["kind"], row["reason"], row["output"]) for row in made.rejected]
    assert rejects == [
        ("answer", "truncated_response", "Half an"),
        ("answer", "empty_output", " "),
        ("answer", "prompt_too_long", ""),
    ]
    assert [assistant for _, assistant in made.turns()] == ["Loud."]


def test_filters_may_reject_any_number_in_a_row_and_the_rest_is_still_answered(tmp_path):
    seeds = [SeedTask(f"{number}", "", "Do.", (), False) for number in range(30)] + SEEDS[:1]
    config = AnswerOnlyConfig(instruction_filters=({"type": "length"},), max_empty_requests=5)
    made = drive(tmp_path, CoroutinePool(answer=lambda _: "Yes."), config, seeds=seeds)
    assert len(made.rows) == 1 and made.driver.stopped_because == ""


def given(folder: Path):
    return load_seed_tasks(write_parquet(folder / "given.parquet", PLAIN))


# -- the best of several


def best_of(folder: Path, answers: list[str], judge: Callable[[str], str] | None, **fields: object) -> Made:
    """One instruction, answered by `answers`, each scored by `judge`, or by the verifier in `fields`."""

    def reply(request: GenerationRequest) -> str | list[str]:
        text = prompt_text(request)
        if "The score alone" not in text:
            assert request.sampling.n == len(answers) and request.sampling.temperature == 1.0
            return answers
        assert request.sampling.structured.choice == ("1", "2", "3", "4", "5")
        return judge(text.partition("answered:\n")[2].partition("\n")[0])

    pool = CoroutinePool(answer=reply)
    return drive(folder, pool, RejectionSamplingConfig(**fields), seeds=SEEDS[:1])


@pytest.mark.parametrize(
    ("scores", "min_score", "best", "reasons"),
    [
        ("2453", 1, 2, ["not_best:2", "not_best:4", "not_best:3"]),
        ("4244", 1, 0, ["not_best:2", "not_best:4", "not_best:4"]),  # of equals the first
        ("2353", 4, 2, ["low_score:2", "low_score:3", "low_score:3"]),
        ("2454", 4, 2, ["low_score:2", "not_best:4", "not_best:4"]),
        ("2333", 4, None, ["low_score:2", "low_score:3", "low_score:3", "low_score:3"]),
        ("?2?3", 1, 3, ["not_judged:?", "not_best:2", "not_judged:?"]),
        ("????", 1, None, ["not_judged:?"] * 4),
    ],
)
def test_the_answer_that_the_judge_likes_best_is_kept(tmp_path, scores, min_score, best, reasons):
    answers = ["Red.", "Green.", "Blue.", "White."]
    made = best_of(tmp_path, answers, lambda output: scores[answers.index(output)], min_score=min_score)
    assert [assistant for _, assistant in made.turns()] == ([] if best is None else [answers[best]])
    assert [f"{row['reason']}:{row['detail']}" for row in made.rejected] == reasons
    assert [row["output"] for row in made.rejected] == [text for number, text in enumerate(answers) if number != best]
    assert len({row["id"] for row in made.rejected}) == len(reasons)
    assert made.driver.committed.num_requests == 5


def test_the_score_of_a_kept_answer_is_in_its_row_and_four_is_enough(tmp_path):
    answers = ["Red.", "Green.", "Blue.", "White."]
    made = best_of(tmp_path / "1", answers, lambda output: "1243"[answers.index(output)])
    assert [(row["messages"][1]["content"], row["score"]) for row in made.rows] == [("Blue.", 4.0)]
    assert best_of(tmp_path / "2", answers, lambda output: "3").rows == []
    made = best_of(tmp_path / "3", answers, None, min_score=0.5, **verified_by("by_length"))
    assert [row["score"] for row in made.rows] == [0.6]


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        (RejectionSamplingConfig, {"min_score": 9}, "min_score=9 is outside the judge's scale"),
        (RejectionSamplingConfig, {"min_score": 0}, "min_score=0 is outside the judge's scale"),
        (AnswerOnlyConfig, {"answer_sampling": {"n": 3, "temperature": 0}}, "temperature=0 is greedy"),
        (MagpieConfig, {"answer_sampling": {"n": 3}}, "temperature=0 is greedy"),
        (AnswerOnlyConfig, {"answer_sampling": {"stop": ["x", ""]}}, "empty text"),
        (AnswerOnlyConfig, {"answer_sampling": {"temperature": 2.5}}, "less than or equal to 2"),
        (AnswerOnlyConfig, {"answer_sampling": {"seed": -1}}, "greater than or equal to 0"),
        (AnswerOnlyConfig, {"answer_sampling": {"structured": {"regex": "[a"}}}, "cannot enforce this form"),
        (AnswerOnlyConfig, {"answer_sampling": {"structured": {"choice": [""]}}}, "at least 1 character"),
        (SelfInstructConfig, {"instruction_sampling": {"n": 2}}, "1 of n=2 would be lost"),
        (EvolInstructConfig, {"answer_sampling": {"n": 2}}, "1 of n=2 would be lost"),
        (AlpacaConfig, {"task_sampling": {"n": 2}}, "1 of n=2 would be lost"),
        (AnswerOnlyConfig, {"judge": {"sampling": {"n": 2, "temperature": 1}}}, "1 of n=2 would be lost"),
    ],
)
def test_settings_that_the_engine_refuses_or_whose_texts_are_lost_are_errors(config, fields, message):
    with pytest.raises(ValidationError, match=message):
        config(**fields)


def test_all_answers_to_an_instruction_are_rows(tmp_path):
    pool = CoroutinePool(answer=lambda _: ["Red.", "Blue.", "Red. ", ""])
    made = drive(tmp_path, pool, AnswerOnlyConfig(answer_sampling={"n": 4}), seeds=SEEDS[:1])
    assert [assistant for _, assistant in made.turns()] == ["Red.", "Blue."]
    assert [(row["kind"], row["reason"]) for row in made.rejected] == [
        ("answer", "duplicate_answer"),
        ("answer", "empty_output"),
    ]
    assert len({row["id"] for row in (*made.rows, *made.rejected)}) == 4


def test_row_filters_see_the_input_of_an_instance(tmp_path):
    seeds = [SeedTask(f"{i}", "", "Fix it.", (Instance(text, ""),), False) for i, text in enumerate(("a b", "secret"))]
    filters = ({"type": "same_as_input"}, {"type": "blacklist", "fields": ["input"], "words": ["secret"]})
    made = drive(tmp_path, CoroutinePool(answer=lambda _: "a b"), AnswerOnlyConfig(row_filters=filters), seeds=seeds)
    assert [(row["reason"], row["filter"], row["instruction"], row["input"]) for row in made.rejected] == [
        ("input_equals_output", "same_as_input", "Fix it.", "a b"),
        ("blacklisted_word", "blacklist", "Fix it.", "secret"),
    ]


def test_only_usable_answers_are_judged(tmp_path):
    asked = []
    made = best_of(tmp_path, ["", "Blue.", " ", ""], lambda output: asked.append(output) or "4")
    assert asked == ["Blue."]
    assert [assistant for _, assistant in made.turns()] == ["Blue."]
    assert [row["reason"] for row in made.rejected] == ["empty_output"] * 3


def test_nothing_usable_asks_no_judge(tmp_path):
    made = best_of(tmp_path, [""] * 4, lambda _: pytest.fail("not to be asked"))
    assert made.rows == [] and len(made.rejected) == 4


def test_n_answers_may_be_other_than_four(tmp_path):
    made = best_of(tmp_path, ["Red.", "Blue."], lambda output: "5", answer_sampling={"n": 2})
    assert [assistant for _, assistant in made.turns()] == ["Red."]


# -- verifiers


def by_length(instruction: str, input_text: str, output: str, reference: str) -> float:
    return len(output) / 10


def is_reference(instruction: str, input_text: str, output: str, reference: str) -> bool:
    return output.rstrip(".") == reference


def broken(instruction: str, input_text: str, output: str, reference: str) -> float:
    raise ZeroDivisionError("no such thing")


def undecided(instruction: str, input_text: str, output: str, reference: str) -> float:
    return float("nan")


NOT_A_FUNCTION = 1


def verified_by(name: str) -> dict[str, object]:
    return {"choose_by": "verifier", "verifier": f"{__name__}:{name}"}


def test_a_verifier_chooses_the_best(tmp_path):
    made = best_of(tmp_path, ["Red.", "Yellow.", "Blue.", ""], None, min_score=0.5, **verified_by("by_length"))
    assert [assistant for _, assistant in made.turns()] == ["Yellow."]
    reasons = [(row["reason"], row["detail"]) for row in made.rejected]
    assert reasons == [("low_score", "0.4"), ("not_best", "0.5"), ("empty_output", "")]
    assert made.driver.committed.num_requests == 1


def test_a_verifier_knows_the_given_output(tmp_path):
    made = best_of(tmp_path, ["pears", "apples.", "apples", "figs"], None, **verified_by("is_reference"))
    assert [assistant for _, assistant in made.turns()] == ["apples."]
    assert [row["reason"] for row in made.rejected] == ["low_score", "not_best", "low_score"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken", r"verifier: .*:broken failed: ZeroDivisionError: no such thing; instruction 'Seed .*output 'Red\.'"),
        ("undecided", "undecided failed: its score is not a number"),
    ],
)
def test_a_verifier_that_fails_is_named_with_what_it_was_given(tmp_path, name, message):
    with pytest.raises(ExceptionGroup) as raised:
        best_of(tmp_path, ["Red."] * 4, None, **verified_by(name))
    (error,) = raised.value.exceptions
    with pytest.raises(InputError, match=message):
        raise error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:score", "cannot load no_such_module:score: ModuleNotFoundError"),
        (f"{__name__}:no_such_function", "cannot load .*AttributeError.*Give module:function"),
        (f"{__name__}:NOT_A_FUNCTION", "is of type int, not a function"),
        ("toy_world.world:recognize.x", "cannot load"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_named(path, message):
    with pytest.raises(InputError, match=message):
        load_verifier(path)


def test_a_module_that_breaks_when_loaded_is_named(tmp_path, monkeypatch):
    (tmp_path / "breaks_when_loaded.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="ZeroDivisionError"):
        load_verifier("breaks_when_loaded:score")


@pytest.mark.parametrize(
    "fields", [{"choose_by": "verifier"}, {"verifier": "a:b"}, {"choose_by": "verifier", "verifier": "a.b"}]
)
def test_a_verifier_is_named_if_and_only_if_it_chooses(fields):
    with pytest.raises(ValidationError):
        RejectionSamplingConfig(**fields)


def test_the_worlds_verifier_knows_its_answers():
    score = load_verifier("toy_world.world:score")
    draw = Random(3)
    for _ in range(200):
        task = draw_task(draw, seen_phrasings())
        assert score(task.instruction, task.input, f" {task.output}\n", "") == 1
        assert score(task.instruction, task.input, task.output + " so", "") == 0
    assert score("Say something else entirely.", "", "yes", "yes") == 0
