"""The toy world: its tasks have one right answer, what is held out stays out, and its tokenizer keeps words whole."""

import re
import tomllib
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from setuptools import find_namespace_packages
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.files import read_jsonl
from generation.config.filters import BLACKLIST
from launcher.slurm.snapshot import code_files
from toy_world import words
from toy_world.build import base_tokenizer, untrained_model
from toy_world.documents import documents, input_first, is_classification_sheet, label_sheet
from toy_world.rows import ASSETS, MAX_ROUGE_L, PROMPTS, asset_rows, evaluation_rows, rouge_l, seed_tasks
from toy_world.tokenizer import CHAT_MARKS, END_OF_TEXT, world_words
from toy_world.world import (
    FAMILIES,
    SEEN_FAMILIES,
    UNSEEN_FAMILIES,
    held_out_phrasings,
    recognize,
    seen_phrasings,
    unseen_phrasings,
    verify,
)

ALL_PHRASINGS = [phrasing for family in FAMILIES for phrasing in family.phrasings]
ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "world-base"


def literals(template: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"\{\w\}", " ", template).lower())


@pytest.fixture(scope="module")
def tokenizer():
    return base_tokenizer()


@pytest.fixture(scope="module")
def some_documents() -> list[str]:
    return documents(Random(1), 400)


def matches_held_out(line: str) -> str | None:
    """The held-out template that a line is written in, unless a seen one with more literal text fits too."""
    fitting = [p for p in ALL_PHRASINGS if p.pattern.fullmatch(line)]
    best = max(fitting, key=lambda p: p.literal_length, default=None)
    return best.template if best is not None and best.held_out else None


def test_there_are_enough_families_and_phrasings():
    assert len(SEEN_FAMILIES) >= 20
    assert len(UNSEEN_FAMILIES) >= 3
    assert all(sum(not p.held_out for p in family.phrasings) >= 10 for family in SEEN_FAMILIES)
    assert all(2 <= sum(p.held_out for p in family.phrasings) <= 4 for family in SEEN_FAMILIES)
    assert len({p.template for p in ALL_PHRASINGS}) == len(ALL_PHRASINGS)


@settings(deadline=None)
@given(st.sampled_from(ALL_PHRASINGS), st.integers(0, 10_000))
def test_every_task_is_recognized_with_its_own_answer(phrasing, seed):
    task = phrasing.task(Random(seed))
    found = recognize(task.instruction, task.input)
    assert found is not None
    assert verify(found, task.output)
    assert verify(task, f" {task.output}\n")
    assert not verify(task, f"{task.output} x")


@settings(deadline=None)
@given(st.sampled_from(ALL_PHRASINGS), st.integers(0, 10_000))
def test_instructions_pass_the_published_filters(phrasing, seed):
    instruction = phrasing.task(Random(seed)).instruction
    tokens = instruction.split()
    assert 3 < len(tokens) <= 150 or phrasing.takes_input
    assert not set(BLACKLIST) & set(literals(instruction))
    # Self-Instruct capitalizes what it parses, which lower-cases the rest: that must not change a task.
    assert instruction.capitalize() == instruction


@settings(deadline=None)
@given(st.sampled_from(ALL_PHRASINGS), st.integers(0, 10_000))
def test_answers_are_one_line_and_differ_from_the_input(phrasing, seed):
    task = phrasing.task(Random(seed))
    assert task.output and "\n" not in task.output and task.output == task.output.strip()
    assert not task.output.endswith(":") and not task.input.endswith(":")


def test_answers_worked_out_by_hand():
    answers = {
        "Reverse the words: cow red sun": "sun red cow",
        "Sort the words: pear cow red": "cow pear red",
        "Sort from high to low: 7 30 4": "30 7 4",
        "What is 7 plus 12?": "19",
        "Take 7 from 12.": "5",
        "Even or odd: 4 7 10": "even odd even",
        "Continue the sequence: 2 4 6": "8",
        "Continue the pattern: cow red cow red cow": "red",
        "Count cow in: cow red cow": "2",
        "Is sun in: cow red": "no",
        "Replace cow with fig: red cow": "red fig",
        "Remove repeated words: cow red cow": "cow red",
        "Which word does not fit: cow dog plum": "plum",
        "List the animals in: cow plum dog": "cow dog",
        "Give the opposites: hot wet": "cold dry",
        "Write as a numbered list: cow red": "1. cow 2. red",
        "Write cow 3 times.": "cow cow cow",
        "Give the third word: cow red sun": "sun",
    }
    for instruction, answer in answers.items():
        task = recognize(instruction)
        assert task is not None and task.output == answer, instruction
    assert recognize("Is the number above or below 50?", "70").output == "above"
    assert recognize("Classify the word as tool, fruit or color.", "pear").output == "fruit"


def test_text_outside_the_world_is_not_recognized():
    for text in ("Write a poem about the sea.", "Give the opposites: hot zebra", "Reverse", ""):
        assert recognize(text) is None


def test_no_document_holds_a_held_out_phrasing(some_documents):
    for document in some_documents:
        for line in document.splitlines():
            line = re.sub(r"^(Task: |\d+\. )", "", line)
            assert matches_held_out(line) is None, line


def test_no_seed_holds_a_held_out_phrasing_and_all_families_are_there():
    rows = seed_tasks(Random(0))
    assert 120 <= len(rows) <= 175
    assert not [row["instruction"] for row in rows if matches_held_out(row["instruction"])]
    assert {row["name"] for row in rows} == {family.name.replace(" ", "_") for family in SEEN_FAMILIES}


def test_seeds_are_novel_to_each_other():
    instructions = [row["instruction"] for row in seed_tasks(Random(0))]
    for index, first in enumerate(instructions):
        assert all(rouge_l(first, second) <= MAX_ROUGE_L for second in instructions[:index])


def test_evaluation_asks_only_what_is_held_out():
    rows = evaluation_rows(Random(0))
    assert all(matches_held_out(row["instruction"]) for row in rows)
    groups = [row["group"] for row in rows]
    assert groups.count("seen families, unseen phrasings") >= 200
    assert groups.count("unseen families") >= 50
    assert len({row["id"] for row in rows}) == len(rows)


def test_held_out_phrasings_use_only_words_that_are_taught():
    taught = {word for phrasing in seen_phrasings() for word in literals(phrasing.template)} | set(words.ORDINALS)
    for phrasing in held_out_phrasings() + unseen_phrasings():
        assert set(literals(phrasing.template)) <= taught, phrasing.template


def test_documents_depend_on_the_seed_alone():
    assert documents(Random(3), 20) == documents(Random(3), 20)
    assert documents(Random(3), 20) != documents(Random(4), 20)


def test_documents_are_no_chats(some_documents):
    for mark in (*CHAT_MARKS, END_OF_TEXT, "user", "assistant"):
        assert not any(mark in document for document in some_documents)


def test_documents_end_where_the_prompts_end(some_documents):
    """What a prompt stops at is followed, somewhere in the documents, by what the pipeline expects there."""
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

    def render(name: str, **variables: object) -> str:
        return environment.from_string((PROMPTS / "self_instruct" / f"{name}.jinja").read_text()).render(**variables)

    task = next(p for p in seen_phrasings() if p.template == "Write the input backwards.").task(Random(0))
    text = input_first(Random(0), task)
    assert text.startswith(render("input_first", instruction=task.instruction) + "Example 1\nInput: ")
    assert render("answer", instruction=task.instruction, input=task.input) + f" {task.output}\n" in text
    embedded = next(p for p in seen_phrasings() if not p.takes_input).task(Random(0))
    text = input_first(Random(0), embedded)
    assert text == render("answer", instruction=embedded.instruction, input="") + f" {embedded.output}\n"
    text = is_classification_sheet(Random(0))
    instruction = re.match(r"Task: (.*)\n", text)[1]
    assert re.match(re.escape(render("classify", instruction=instruction)) + " (Yes|No)\n", text)
    text = label_sheet(Random(0))
    instruction = re.match(r"Task: (.*)\n", text)[1]
    assert re.match(re.escape(render("output_first", instruction=instruction)) + r" \w+\nInput: \w", text)
    lists = [document for document in some_documents if document.startswith("Come up")]
    shown = re.findall(r"\d+\. (.*)\n", lists[0])[:8]
    assert lists[0].startswith(render("instructions", demonstrations=shown) + " ")


def test_every_word_and_number_is_one_token(tokenizer):
    for word in (*world_words(), *words.NUMBERS):
        assert len(tokenizer(word)["input_ids"]) == 1, word
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word
    for piece in ("\n", ":", ".", ",", *CHAT_MARKS, END_OF_TEXT):
        assert len(tokenizer(piece)["input_ids"]) == 1, piece
    assert tokenizer.chat_template is None


def test_documents_need_no_token_of_single_letters(tokenizer, some_documents):
    for document in some_documents:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(document)["input_ids"])
        assert all(token.removeprefix("Ġ") in {"a", "z"} for token in tokens if re.fullmatch("Ġ?[A-Za-z]", token))


@settings(deadline=None)
@given(st.text())
def test_any_text_survives_the_round_trip(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def _tokenizer(made=[]):  # noqa: B006 - made once for all examples
    if not made:
        made.append(base_tokenizer())
    return made[0]


def test_the_model_starts_out_able_to_copy(tokenizer):
    """The circuits laid out in advance work: a repeated list is continued far better than by chance."""
    model, rng, hits = untrained_model(tokenizer, 0).eval(), Random(0), 0
    for _ in range(10):
        line = " ".join(rng.sample(words.CONTENT_WORDS, 8))
        ids = tokenizer(f"Copy: {line}\nCopy: {line}", return_tensors="pt")["input_ids"]
        likeliest = model(input_ids=ids).logits[0].topk(5).indices
        hits += sum(int(ids[0, t + 1]) in likeliest[t].tolist() for t in range(ids.shape[1] - 8, ids.shape[1] - 1))
    assert hits > 70 * 0.3


def test_the_shipped_model_is_small_and_complete():
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    shipped = AutoTokenizer.from_pretrained(MODEL)
    assert 1_000_000 <= model.num_parameters() <= 2_000_000
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000
    assert model.config.eos_token_id == model.generation_config.eos_token_id == shipped.eos_token_id
    assert shipped.chat_template is None
    assert shipped.get_vocab() == base_tokenizer().get_vocab()


def test_the_seeds_and_evaluation_rows_are_what_the_world_makes():
    for name, rows in asset_rows().items():
        assert read_jsonl(ASSETS / name) == rows


@pytest.mark.parametrize("model", ["world-base", "world-chat"])
def test_both_models_refer_to_the_one_copy_of_the_assets(model):
    assert (ROOT / "models" / model / "tunesmith").samefile(ASSETS)


def test_the_toy_world_is_in_no_wheel_and_in_no_copy_of_a_runs_code():
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_namespace_packages(str(ROOT), include=find["include"])
    copied = {file.parts[0] for file in code_files(ROOT)}
    assert {"generation.methods", "launcher.slurm"} <= set(packages)
    assert not [name for name in packages if name.split(".")[0] in ("toy_world", "models", "tests")]
    assert {"generation", "launcher"} <= copied and not copied & {"toy_world", "models", "tests"}
