"""Datasets of other shapes become the same conversations; what cannot be used is counted, source by source."""

import json
import random
import re
from pathlib import Path

import pytest
from datasets import Dataset
from pydantic import ValidationError

from cluster.errors import InputError
from launcher.recipe import load
from tests.trainer.tools import write_chats
from trainer.config.data import DataSource
from trainer.config.train import TrainConfig
from trainer.data.mixture import Mixture
from trainer.data.sources import Examples, check_source
from trainer.data.tokens import Tokens, load_tokens, prepare_tokens

REAL = Path(__file__).parents[3] / "shared" / "data"
QUESTION, GIVEN, ANSWER = "Sort the words", "pear fig", "fig pear"
USER = f"{QUESTION}\n\n{GIVEN}"
CONVERSATION = [("user", USER), ("assistant", ANSWER), ("user", "Thanks"), ("assistant", "Welcome")]


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encode(tokenizer, cache: Path, *sources: DataSource, **settings: object) -> Tokens:
    config = TrainConfig(data=sources, max_seq_len=512, **settings)
    return load_tokens(prepare_tokens(config, tokenizer, config.data, cache))


def texts(tokenizer, tokens: Tokens) -> list[str]:
    return [tokenizer.decode(tokens.input_ids[tokens.span(d)].tolist()) for d in range(tokens.num_documents)]


def chat(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns: list[tuple[str, str]], names: dict[str, str]) -> list[dict]:
    return [{"from": names[role], "value": content} for role, content in turns]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": chat(CONVERSATION)}, CONVERSATION),
        ({"instruction": QUESTION, "input": GIVEN, "output": ANSWER, "text": "unused"}, CONVERSATION[:2]),
        ({"instruction": USER, "input": "", "output": ANSWER}, CONVERSATION[:2]),
        ({"instruction": USER, "output": ANSWER}, CONVERSATION[:2]),
        ({"conversations": sharegpt(CONVERSATION, {"user": "human", "assistant": "gpt"})}, CONVERSATION),
        ({"conversations": sharegpt(CONVERSATION, {"user": "user", "assistant": "bard"})}, CONVERSATION),
        ({"conversations": chat(CONVERSATION)}, CONVERSATION),
        (
            {"id": "x", "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": USER},
                                          {"from": "chatgpt", "value": ANSWER}]},
            [("system", "Be brief."), *CONVERSATION[:2]],
        ),
    ],
)  # fmt: skip
def test_rows_of_every_shape_give_the_conversation(chatml, tmp_path: Path, row: dict, turns: list) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [row])
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=str(path)))
    assert texts(chatml, tokens) == [chatml.apply_chat_template(chat(turns), tokenize=False)]


@pytest.mark.parametrize("kind", ["json", "parquet", "saved"])
def test_other_shapes_may_come_in_every_kind_of_file(chatml, tmp_path: Path, monkeypatch, kind: str) -> None:
    """And in folders whose names a shell would take for a pattern."""
    (tmp_path / "try [2]*").mkdir()
    monkeypatch.chdir(tmp_path / "try [2]*")
    path, row = Path(f"rows.{kind}"), {"instruction": QUESTION, "input": GIVEN, "output": ANSWER}
    if kind == "json":
        path.write_text(json.dumps([row, row]))
    elif kind == "parquet":
        Dataset.from_list([row, row]).to_parquet(path)
    else:
        Dataset.from_list([row, row]).save_to_disk(path)
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=str(path)))
    assert texts(chatml, tokens) == [chatml.apply_chat_template(chat(CONVERSATION[:2]), tokenize=False)] * 2


def test_a_stated_format_comes_before_what_the_columns_tell(chatml, tmp_path: Path) -> None:
    row = {"messages": chat(CONVERSATION), "instruction": "Say fig", "output": "fig"}
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    told = encode(chatml, tmp_path / "cache", DataSource(path=path))
    stated = encode(chatml, tmp_path / "cache", DataSource(path=path, format="alpaca"))
    assert QUESTION in texts(chatml, told)[0]
    assert "Say fig" in texts(chatml, stated)[0]


def test_columns_of_other_names_are_read_as_the_formats(chatml, tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"question": "Say fig", "answer": "fig", "output": "a file"}]))
    source = DataSource(path=path, columns={"instruction": "question", "output": "answer"})
    (text,) = texts(chatml, encode(chatml, tmp_path / "cache", source))
    assert "Say fig" in text
    assert "a file" not in text
    with pytest.raises(InputError, match=r"no column `reply`, which `columns` names\. It has `question`, `answer`"):
        list(Examples(DataSource(path=path, columns={"output": "reply"}), "chat"))
    with pytest.raises(
        InputError, match=r"rows\.jsonl: there is no column `messages`, which the format messages requires"
    ):
        list(Examples(DataSource(path=path, format="messages"), "chat"))


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "Say fig", "chosen": "fig", "rejected": "pear"}, "completion: chosen"),
        ({"chosen": chat([("user", "a"), ("assistant", "b")]), "rejected": []}, "messages: chosen"),
        ({"Instruction": "Say fig", "Output": "fig"}, "instruction: Instruction, output: Output"),
        ({"ask": "Say fig", "reply": "fig"}, "instruction: ask, output: reply"),
    ],
)
def test_the_error_about_columns_shows_what_to_write(tmp_path: Path, row: dict, columns: str) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [row]))
    with pytest.raises(InputError) as error:
        check_source(DataSource(path=path), "chat")
    override = re.search(r"'(train\.data=.*)'", str(error.value)).group(1)
    assert override == f"train.data={{path: {path}, columns: {{{columns}}}}}"
    (tmp_path / "recipe.yaml").write_text("name: test\nmodel: {path: a}\n")
    (source,) = load(tmp_path / "recipe.yaml", [override]).train.data
    check_source(source, "chat")


def test_a_column_that_differs_in_case_is_suggested(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "rows.jsonl", [{"ask": "a", "Reply": "b"}]))
    with pytest.raises(InputError, match=r"no column `reply`.* Did you mean `Reply`\?"):
        check_source(DataSource(path=path, columns={"instruction": "ask", "output": "reply"}), "chat")


@pytest.mark.parametrize(
    ("rows", "dropped"),
    [
        ([{"instruction": "", "output": "a"}], {"`instruction` is empty": 1}),
        ([{"instruction": "a", "output": " "}, {"instruction": "a", "output": None}], {"an answer is empty": 2}),
        ([{"conversations": []}], {"`conversations` is not a list of turns": 1}),
        ([{"conversations": [{"from": "narrator", "value": "a"}]}], {"the speaker 'narrator' is unknown": 1}),
        ([{"conversations": sharegpt(CONVERSATION[1:], {"user": "human", "assistant": "gpt"})}],
         {"the assistant starts the conversation": 1}),
        ([{"conversations": [{"from": "human", "value": None}, {"from": "gpt", "value": "a"}]}],
         {"a turn has no text": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_counted_with_its_source(chatml, tmp_path: Path, rows: list, dropped: dict) -> None:
    good = {"instruction": "Say fig", "output": "fig"} if "instruction" in rows[0] else None
    good = good or {"conversations": sharegpt(CONVERSATION, {"user": "human", "assistant": "gpt"})}
    mixed = str(write_rows(tmp_path / "mixed.jsonl", [good, *rows]))
    clean = str(write_chats(tmp_path / "clean.jsonl", [chat(CONVERSATION)]))
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=clean), DataSource(path=mixed))
    assert [(source.num_documents, source.dropped) for source in tokens.sources] == [(1, {}), (1, dropped)]
    assert tokens.dropped == dropped


def test_what_cannot_be_used_is_named_with_its_line_and_a_fix_before_any_rank_starts(chatml, tmp_path: Path) -> None:
    bad = [{"instruction": "a", "output": 3}, {"instruction": "a", "output": " "}, {"instruction": "b", "output": 4}]
    good = {"instruction": "Say fig", "output": "fig"}
    mixed = str(write_rows(tmp_path / "mixed.jsonl", [good, *bad]))
    check_source(DataSource(path=mixed), "chat")
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=mixed))
    reasons = (
        r"`output` is a number, not text: 2, the first in mixed\.jsonl:2; an answer is empty: 1, in mixed\.jsonl:3"
    )
    assert re.search(reasons, Mixture(tokens, TrainConfig(), 0).shares[0].describe())
    useless = DataSource(path=str(write_rows(tmp_path / "useless.jsonl", bad)))
    with pytest.raises(InputError, match=r"train\.data: no row .* 2, the first in useless\.jsonl:1; .*in quotes"):
        check_source(useless, "chat")


def test_a_source_without_a_trainable_row_is_an_error_even_beside_a_good_one(chatml, tmp_path: Path) -> None:
    clean = str(write_chats(tmp_path / "clean.jsonl", [chat(CONVERSATION)]))
    empty = str(write_rows(tmp_path / "empty.jsonl", [{"instruction": "a", "output": ""}] * 3))
    with pytest.raises(
        InputError,
        match=r"train\.data: no row of .*empty\.jsonl .*\(an answer is empty: 3, the first in empty\.jsonl:1\)",
    ):
        encode(chatml, tmp_path / "cache", DataSource(path=clean), DataSource(path=empty))


def test_a_source_of_rows_that_are_all_too_long_is_an_error_with_the_fix(chatml, tmp_path: Path) -> None:
    long = write_chats(tmp_path / "long.jsonl", [chat([("user", "fig " * 600), ("assistant", "fig")])] * 2)
    with pytest.raises(
        InputError, match=r"long\.jsonl .*max_seq_len: 2, .*long\.jsonl:1\)\. .* Raise train\.max_seq_len"
    ):
        encode(chatml, tmp_path / "cache", DataSource(path=str(long)))


def test_an_answer_that_was_cut_off_when_it_was_written_gets_no_end(chatml, tmp_path: Path) -> None:
    rows = [{"messages": chat(CONVERSATION), "finish_reason": reason} for reason in ("stop", "length", None)]
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=str(write_rows(tmp_path / "rows.jsonl", rows))))
    whole, cut, unknown = texts(chatml, tokens)
    assert whole == unknown
    assert cut + "<|im_end|>\n" == whole
    labels = tokens.labels[tokens.span(1)]
    assert chatml.decode(labels[labels >= 0].tolist()) == f"{ANSWER}<|im_end|>Welcome"


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ({"data": [{"path": "a", "weight": 1.0}, "b"]}, "b has no weight, while other sources"),
        ({"data": [{"path": "a", "weight": 1.0, "epochs": 2.0}]}, "Remove one of them"),
        ({"data": [{"path": "a", "format": "text"}]}, "objective=chat cannot use a of format text"),
        ({"data": ["a"], "validation": {"every_steps": 3}}, "set either path"),
        ({"data": ["a"], "validation": {"path": "b", "fraction": 0.1}}, "set either path"),
        ({"data": [{"path": "a", "epochs": 0}]}, "greater than 0"),
        ({"data": [{"path": "a", "columns": {"ouput": "b"}}]}, "output"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(train: dict, complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        TrainConfig(**train)


def test_a_path_a_list_of_paths_and_sources_are_all_accepted() -> None:
    for way in ("a", ["a"], {"path": "a"}, [{"path": "a"}], [DataSource(path="a")]):
        assert TrainConfig(data=way).data == (DataSource(path="a"),)
    assert [source.path for source in TrainConfig(data=["a", {"path": "b", "epochs": 2}]).data] == ["a", "b"]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not beside this checkout (../shared/data)")
def test_real_sharegpt_conversations_are_all_used(chatml, tmp_path: Path) -> None:
    path = REAL / "fastchat" / "dummy_conversation.json"
    tokens = encode(chatml, tmp_path / "cache", DataSource(path=str(path)))
    rows = json.loads(path.read_text())
    assert tokens.num_documents == len(rows)
    for document in random.Random(0).sample(range(len(rows)), 20):
        labels = tokens.labels[tokens.span(document)]
        said = [turn["value"] for turn in rows[document]["conversations"] if turn["from"] == "gpt"]
        assert chatml.decode(labels[labels >= 0].tolist()) == "".join(text + "<|im_end|>" for text in said)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files are not beside this checkout (../shared/data)")
def test_real_prompts_with_completions_are_read_by_renaming(chatml, tmp_path: Path) -> None:
    """Their completions end in this tokenizer's end token, written out: no such row is trained."""
    path = REAL / "t0" / "glue_mrpc_generate_paraphrase.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    bare = [{**row, "completion": row["completion"].removesuffix("<|endoftext|>")} for row in rows]
    columns = {"instruction": "prompt", "output": "completion"}
    cleaned = DataSource(path=str(write_rows(tmp_path / "bare.jsonl", bare)), columns=columns)
    assert encode(chatml, tmp_path / "cache", cleaned).num_documents == len(rows)
    with pytest.raises(InputError, match=f"an assistant turn contains an end token: {len(rows)}"):
        encode(chatml, tmp_path / "cache", DataSource(path=str(path), columns=columns))
