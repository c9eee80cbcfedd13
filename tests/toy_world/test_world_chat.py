"""The chat model of the toy world: its documents are true and leak nothing, and the model has learned them."""

import re
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.toy_world.test_world import matches_held_out
from toy_world import evolution
from toy_world.build import CHAT_ROW_TOKENS, chat_tokenizer
from toy_world.chat_documents import (
    END_OF_TURN,
    FORMS,
    OPERATIONS,
    VARIABLES,
    alpaca_list,
    chat,
    chat_documents,
    draw_request,
    equal,
    instruction_list,
    judge,
    training_rows,
)
from toy_world.evolution import STEPS, Request, ask_the_same, read_request, score_answer, wrong_answer
from toy_world.measure_chat import is_changed_as_named, parse_alpaca
from toy_world.rows import PROMPTS
from toy_world.world import UNSEEN_FAMILIES, draw_task, recognize, seen_phrasings

MODEL = Path(__file__).parents[2] / "models" / "world-chat"
SEEDS = st.integers(0, 100_000)


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer()


@pytest.fixture(scope="module")
def some_documents() -> list[str]:
    return chat_documents(Random(1), 500)


# ---- requests


@settings(deadline=None)
@given(SEEDS)
def test_a_request_is_read_as_it_was_written(seed):
    request = draw_request(Random(seed), 1.0)
    found = read_request(request.text)
    assert (found.output, found.steps, found.data_format) == (request.output, request.steps, request.data_format)
    assert not found.task.phrasing.held_out


def test_evolved_requests_worked_out_by_hand():
    answers = {
        "Reverse the words: cow red sun. Use commas.": "sun, red, cow",
        "Write cow red backwards. Use dashes.": "red - cow",
        "Sort the words: pear cow red. Give only the first.": "cow",
        "Sort the words of the input. Give only the first. Say it 2 times.\n\npear cow": "cow cow",
        "What is 7 plus 12? Add 1 to it.": "20",
        "Give the first word: fig sun moon. Say it 3 times.": "fig fig fig",
        'Reverse the words:\n\n{"c": "cow red"}': "red cow",
        "Write the input backwards.\n\n<c>cow red</c>": "red cow",
        "Write the input backwards.\n\ncow red": "red cow",
    }
    for text, answer in answers.items():
        assert read_request(text).output == answer, text
    for text in (
        "Write the input backwards.",
        "Give the first word: fig sun. Use",
        "Add 1 to it.",
        "Reverse:\n\n<c>a b",
    ):
        assert read_request(text) is None, text
    assert read_request("Give the first word: fig sun. Add 1 to it.") is None


@settings(deadline=None)
@given(st.sampled_from(sorted(OPERATIONS)), SEEDS)
def test_an_operation_changes_what_its_name_says_and_makes_a_task_of_the_world(name, seed):
    rng = Random(seed)
    before = draw_request(rng)
    after = OPERATIONS[name](rng, before)
    if after is not None:
        assert is_changed_as_named(name, before, after, after.data_format)
        assert read_request(after.text).output == after.output
        assert not ask_the_same(before, after)


def test_no_step_makes_a_pair_of_skills_that_is_kept_for_evaluation():
    """Those are: reversed or last in upper case, second to last, a category counted."""
    assert not [step.text for step in STEPS if re.search("upper|capital|shout|last|second|count", step.text, re.I)]
    assert not set(evolution.LISTS | evolution.NUMBERS | evolution.SINGLES) & {f.name for f in UNSEEN_FAMILIES}


@settings(deadline=None)
@given(SEEDS)
def test_scores_tell_right_from_wrong(seed):
    rng = Random(seed)
    request = draw_request(rng)
    assert score_answer(request.output, f"{request.output}\n") == 5
    assert 1 <= score_answer(request.output, wrong_answer(rng, request)) < 5


def test_scores_worked_out_by_hand():
    scores = {"a b c": 5, "a c b": 4, "a b": 4, "a b d": 3, "a": 3, "a d e f g": 2, "d": 1}
    for answer, score in scores.items():
        assert score_answer("a b c", answer) == score, answer


# ---- documents


def test_documents_depend_on_the_seed_alone(tokenizer):
    def rows(seed: int, num_rows: int) -> list[str]:
        return training_rows(Random(seed), num_rows, tokenizer, CHAT_ROW_TOKENS)

    assert rows(3, 3) == rows(3, 3)
    assert rows(3, 1) != rows(4, 1)


def test_no_document_holds_a_held_out_phrasing(some_documents):
    for document in some_documents:
        for line in document.replace(END_OF_TURN, "").splitlines():
            line = re.sub(r"^(Task: |\d+\. (Instruction: )?)", "", line)
            for step in STEPS:
                line = line.replace(f" {step.text}", "")
            if not line.endswith(":"):  # its content is on a line of its own
                assert matches_held_out(line) is None, line


def test_every_answer_in_a_chat_is_right():
    for seed in range(150):
        user, assistant = _turns(FORMS[0][0](Random(seed)))
        assert read_request(user).output == assistant


def test_every_label_and_every_score_is_true():
    for seed in range(150):
        user, label = _turns(equal(Random(seed)))
        assert label == ("Equal" if ask_the_same(*_pair(user)) else "Not equal")
        user, score = _turns(judge(Random(seed)))
        text, output = re.fullmatch(r"[^\n]*\nTask: (.*)\nOutput: (.*)", user, re.DOTALL).groups()
        request = read_request(text.replace("\nExample 1\nInput: ", "\n\n"))
        assert int(score) == score_answer(request.output, output)


def test_lists_are_parsed_by_the_published_marks():
    text = alpaca_list(Random(0))
    first = text.index("###\n1. Instruction:") + len("###\n1. Instruction:")
    items = parse_alpaca(text[first:], 1)
    assert len(items) == int(re.search(r"series of (\d+) tasks", text)[1])
    for instruction, content, output in items:
        assert recognize(instruction, content.replace("<noinput>", "")).output == output
    assert re.fullmatch(r"[^\n]+:\n(\d+\. [^\n]+\n){9,20}", instruction_list(Random(0)))


def test_rows_are_full_and_open_with_a_task(tokenizer):
    for row in training_rows(Random(0), 20, tokenizer, CHAT_ROW_TOKENS):
        assert CHAT_ROW_TOKENS - 60 < len(tokenizer(row)["input_ids"]) < CHAT_ROW_TOKENS
        user, assistant, *_ = row.removeprefix("<|im_start|>user\n").split(f"{END_OF_TURN}\n")
        assert assistant == f"<|im_start|>assistant\n{read_request(user).output}"


def _pair(user: str) -> tuple[Request, Request]:
    """The two instructions of an equality question, parted by the line break that leaves both readable."""
    lines = user.split("\n")[:-1]
    pairs = [
        ("\n".join(lines[:at]), "\n".join(lines[at:])) for at in range(1, len(lines)) if lines[at] and lines[at - 1]
    ]
    (found,) = [pair for pair in ((read_request(a), read_request(b)) for a, b in pairs) if None not in pair]
    return found


def _turns(document: str) -> tuple[str, str]:
    user, assistant = document.removeprefix("<|im_start|>user\n").split(f"{END_OF_TURN}\n<|im_start|>assistant\n")
    return user, assistant


# ---- the shipped model


def test_the_chat_template_renders_the_documents_and_marks_what_the_assistant_says(tokenizer):
    messages = [{"role": "user", "content": "Shout: a"}, {"role": "assistant", "content": "A"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == chat("Shout: a", "A") + f"{END_OF_TURN}\n"
    assert tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True) == chat(
        "Shout: a", ""
    )
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    trained = [i for i, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert tokenizer.decode(trained) == f"A{END_OF_TURN}"


def test_the_shipped_model_is_small_and_ends_at_the_end_of_a_turn(tokenizer):
    model, shipped = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    assert (MODEL / "model.safetensors").stat().st_size <= 4_000_000
    assert model.dtype == torch.bfloat16
    end = shipped.convert_tokens_to_ids(END_OF_TURN)
    assert model.config.eos_token_id == model.generation_config.eos_token_id == shipped.eos_token_id == end
    assert shipped.chat_template == tokenizer.chat_template
    assert shipped.get_vocab() == tokenizer.get_vocab()


def test_every_prompt_file_is_taught():
    """`chat_documents` loads the prompts in VARIABLES when it is imported, so a missing file fails there."""
    files = {str(path.relative_to(PROMPTS).with_suffix("")) for path in PROMPTS.rglob("*.jinja")}
    assert files == {f"{method}/{name}" for method, names in VARIABLES.items() for name in names}


@pytest.fixture(scope="module")
def reply():
    """Greedy replies of the shipped model, to messages or to plain text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

    def ask(prompts: list[str], max_new_tokens: int = 40) -> list[str]:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            ids = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return ask


def test_the_shipped_model_answers_tasks(reply):
    rng = Random(11)
    requests = [Request(draw_task(rng, seen_phrasings())) for _ in range(100)]
    answers = reply([chat(request.text, "") for request in requests])
    assert sum(answer == request.output for request, answer in zip(requests, answers, strict=True)) >= 70
