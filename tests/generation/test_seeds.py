"""What is published about the seed tasks, the evaluation tasks and the packaged prompts of Self-Instruct."""

import ast
import contextlib
import io
import json
import re
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest
from jinja2 import StrictUndefined, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from rapidfuzz.distance import LCSseq

ROOT = Path(__file__).parents[2]
SEEDS = ROOT / "generation" / "seeds"
PROMPTS = ROOT / "generation" / "prompts" / "self_instruct"
PUBLISHED_SEEDS = ROOT.parent / "shared" / "data" / "self_instruct" / "seed_tasks.jsonl"

# The words that Self-Instruct's instruction filter rejects (Wang et al., 2023; bootstrap_instructions.py).
BLACKLIST = re.compile(r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to)\b", re.IGNORECASE)


@cache
def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def seed_tasks() -> list[dict]:
    return read_jsonl(SEEDS / "seed_tasks.jsonl")


def eval_tasks() -> list[dict]:
    return read_jsonl(SEEDS / "eval_tasks.jsonl")


def seed_named(name: str) -> dict:
    return next(task["instances"][0] for task in seed_tasks() if task["name"] == name)


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).split()


def rouge_l(first: list[str], second: list[str]) -> float:
    return 2 * LCSseq.similarity(first, second) / (len(first) + len(second))


def assert_no_pair_above(limit: float, first: list[str], second: list[str]) -> None:
    first_words, second_words = [words(text) for text in first], [words(text) for text in second]
    scores = ((rouge_l(a, b), i, j) for i, a in enumerate(first_words) for j, b in enumerate(second_words))
    score, i, j = max(scores)
    assert score <= limit, f"ROUGE-L {score:.2f}: {first[i]!r} and {second[j]!r}"


def instructions(tasks: list[dict]) -> list[str]:
    return [task["instruction"] for task in tasks]


def template_source(name: str) -> str:
    return (PROMPTS / f"{name}.jinja").read_text(encoding="utf-8")


def render(name: str, **variables: object) -> str:
    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=False, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(template_source(name)).render(**variables)


def demonstration_blocks(name: str) -> list[str]:
    """The fixed demonstrations of a prompt, each without its leading `Task:`; the open task at the end is left out."""
    return [block.strip() for block in render(name, instruction="OPEN").split("Task: ")[1:-1]]


def python_snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def run_snippet(source: str) -> tuple[dict, str]:
    namespace: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(source, "<seed>", "exec"), namespace)
    return namespace, printed.getvalue()


# ---- seed tasks


def test_there_are_175_seeds_with_running_ids_and_unique_names():
    assert [task["id"] for task in seed_tasks()] == [f"seed_task_{i}" for i in range(175)]
    names = [task["name"] for task in seed_tasks()]
    assert len(set(names)) == 175
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) for name in names)


def test_every_seed_has_the_published_form():
    for task in seed_tasks():
        assert list(task) == ["id", "name", "instruction", "instances", "is_classification"]
        assert isinstance(task["is_classification"], bool)
        assert len(task["instances"]) == 1
        assert list(task["instances"][0]) == ["input", "output"]
        texts = [task["instruction"], *task["instances"][0].values()]
        assert all(isinstance(text, str) and text == text.strip() for text in texts), task["id"]


def test_every_seed_instruction_passes_the_published_filters():
    for instruction in instructions(seed_tasks()):
        assert 3 < len(instruction.split()) <= 150, instruction
        assert not BLACKLIST.search(instruction), instruction
        assert not instruction.startswith("Write a program"), instruction
        assert instruction.isascii(), instruction
        assert instruction[0].isalnum(), instruction


def test_every_seed_instance_passes_the_published_filters():
    for task in seed_tasks():
        instance = task["instances"][0]
        assert instance["output"] and instance["output"] != instance["input"], task["id"]
        assert not instance["input"].endswith(":") and not instance["output"].endswith(":"), task["id"]


def test_no_two_seed_instructions_are_near_duplicates():
    tokens = [words(instruction) for instruction in instructions(seed_tasks())]
    score, i, j = max((rouge_l(tokens[i], tokens[j]), i, j) for i, j in combinations(range(len(tokens)), 2))
    assert score <= 0.6, f"ROUGE-L {score:.2f}: seed_task_{i} and seed_task_{j}"


def test_the_seeds_mix_kinds_of_task():
    tasks = seed_tasks()
    num_classification = sum(task["is_classification"] for task in tasks)
    num_without_input = sum(not task["instances"][0]["input"] for task in tasks)
    assert 26 <= num_classification <= 35
    assert 50 <= num_without_input <= 60
    assert len({words(instruction)[0] for instruction in instructions(tasks)}) >= 70


def test_classification_seeds_have_an_input_and_answer_with_a_short_label():
    for task in seed_tasks():
        if task["is_classification"]:
            assert task["instances"][0]["input"], task["id"]
            assert len(task["instances"][0]["output"].split()) <= 3, task["id"]


def test_python_in_the_seeds_compiles():
    snippets = [s for task in seed_tasks() for text in task["instances"][0].values() for s in python_snippets(text)]
    assert len(snippets) >= 8
    for snippet in snippets:
        ast.parse(snippet)


def test_python_answers_do_what_they_say():
    _, printed = run_snippet(python_snippets(seed_named("palindrome_function")["output"])[0])
    assert printed == "True\nFalse\n"

    task = seed_named("comprehension_refactor")
    before, after = (run_snippet(python_snippets(task[key])[0])[0]["long_words"] for key in ("input", "output"))
    assert before(["tea", "coffee", "juice"], 4) == after(["tea", "coffee", "juice"], 4) == ["COFFEE", "JUICE"]

    task = seed_named("off_by_one")
    wrong, right = (run_snippet(python_snippets(task[key])[0])[0]["sum_to"] for key in ("input", "output"))
    assert (wrong(4), right(4)) == (6, 10)

    _, printed = run_snippet(python_snippets(seed_named("trace_program")["input"])[0])
    assert f"It prints\n\n{printed}" in seed_named("trace_program")["output"]

    _, printed = run_snippet(python_snippets(seed_named("explain_type_error")["output"])[0])
    assert printed == "I am 30\nI am 30\n"

    task = seed_named("hints_and_docstring")
    average_length = run_snippet(python_snippets(task["output"])[0])[0]["average_length"]
    assert (average_length([]), average_length(["a", "bcd"])) == (0.0, 2.0)


def test_the_regular_expression_answer_matches_what_it_says():
    pattern = re.search(r"```\n(.*?)\n```", seed_named("clock_regex")["output"])[1]
    accepted = [text for text in ("00:00", "07:45", "23:59", "24:00", "7:45", "12:60") if re.search(pattern, text)]
    assert accepted == ["00:00", "07:45", "23:59"]


def test_no_seed_is_close_to_a_published_self_instruct_seed():
    if not PUBLISHED_SEEDS.exists():
        pytest.skip("the published Self-Instruct seeds are not beside this checkout (../shared/data/self_instruct)")
    published = instructions(read_jsonl(PUBLISHED_SEEDS))
    assert len(published) == 175
    assert_no_pair_above(0.6, instructions(seed_tasks()), published)


# ---- evaluation tasks


def test_there_are_40_evaluation_tasks_of_40_kinds():
    tasks = eval_tasks()
    assert [task["id"] for task in tasks] == [f"eval_task_{i}" for i in range(40)]
    assert len({task["task"] for task in tasks}) == 40
    for task in tasks:
        assert list(task) == ["id", "task", "group", "instruction", "input", "references", "metric"]
        assert task["group"] == "held-out natural-language tasks"
        assert task["metric"] in ("exact_match", "rouge_l")
        assert task["references"] and all(reference.strip() for reference in task["references"])


def test_exact_match_references_are_short():
    for task in eval_tasks():
        if task["metric"] == "exact_match":
            assert all(len(reference.split()) <= 6 for reference in task["references"]), task["id"]


def test_evaluation_tasks_are_apart_from_the_seeds_and_the_prompts():
    fixed = [block.splitlines()[0] for name in ("classify", "input_first", "output_first")
             for block in demonstration_blocks(name)]  # fmt: skip
    assert_no_pair_above(0.6, instructions(eval_tasks()), instructions(seed_tasks()))
    assert_no_pair_above(0.6, instructions(eval_tasks()), fixed)
    assert not {task["task"] for task in eval_tasks()} & {task["name"] for task in seed_tasks()}


# ---- prompts


def test_instructions_prompt_numbers_its_demonstrations_and_ends_at_the_next_number():
    lines = render("instructions", demonstrations=list("ABCDEFGH"), only_classification=False).split("\n")
    assert len(lines) == 10 and lines[0].endswith(":")
    assert lines[1:] == [f"{i}. {letter}" for i, letter in enumerate("ABCDEFGH", start=1)] + ["9."]


def test_classify_prompt_has_31_demonstrations_12_yes_and_19_no():
    answers = []
    for block in demonstration_blocks("classify"):
        answers.append(re.fullmatch(r"[^\n]+\nIs it classification\? (Yes|No)", block)[1])
    assert (len(answers), answers.count("Yes"), answers.count("No")) == (31, 12, 19)
    assert render("classify", instruction="T").endswith("\n\nTask: T\nIs it classification?")


def test_input_first_prompt_has_11_demonstrations_and_ends_after_the_open_task():
    blocks = demonstration_blocks("input_first")
    assert len(blocks) == 11
    num_examples = [len(re.findall(r"^Example \d+\n", block, flags=re.MULTILINE)) for block in blocks]
    assert num_examples.count(0) == 3 and max(num_examples) >= 3
    for block, count in zip(blocks, num_examples, strict=True):
        numbers = re.findall(r"^Example (\d+)\nInput: .", block, flags=re.MULTILINE)
        assert numbers == [str(i) for i in range(1, count + 1)]
        assert len(re.findall(r"^Output: .", block, flags=re.MULTILINE)) == max(count, 1)
    assert render("input_first", instruction="T").endswith("\n\nTask: T\n")


def test_output_first_prompt_has_16_demonstrations_with_an_input_for_every_label():
    blocks = demonstration_blocks("output_first")
    assert len(blocks) == 16
    for block in blocks:
        assert re.fullmatch(r"[^\n]+(\nClass label: [^\n]+\nInput: [^\n]+){2,}", block), block
        labels = re.findall(r"^Class label: (.+)$", block, flags=re.MULTILINE)
        assert len(set(labels)) == len(labels), block
    assert render("output_first", instruction="T").endswith("\n\nTask: T\nClass label:")


def test_answer_prompt_shows_the_input_only_if_there_is_one():
    assert render("answer", instruction="T", input="X") == "Task: T\nInput: X\nOutput:"
    assert render("answer", instruction="T", input="") == "Task: T\nOutput:"


@pytest.mark.parametrize("name", ["instructions", "classify", "input_first", "output_first", "answer"])
def test_a_prompt_without_its_variables_is_an_error(name):
    with pytest.raises(UndefinedError):
        render(name)


def test_fixed_demonstrations_are_apart_from_the_seeds():
    for name in ("classify", "input_first", "output_first"):
        demonstrated = [block.splitlines()[0] for block in demonstration_blocks(name)]
        assert len(set(demonstrated)) == len(demonstrated)
        assert_no_pair_above(0.7, demonstrated, instructions(seed_tasks()))


# ---- the pages


def test_the_readme_counts_are_the_measured_ones():
    readme = (SEEDS / "README.md").read_text(encoding="utf-8")
    stated = {
        label.strip(): int(count) for label, count in re.findall(r"^\| ([^|]+)\| +(\d+) \|$", readme, re.MULTILINE)
    }
    seeds, evals, users = seed_tasks(), eval_tasks(), read_jsonl(SEEDS / "user_instructions.jsonl")
    num_words = [len(instruction.split()) for instruction in instructions(seeds)]
    assert stated == {
        "seed tasks": len(seeds),
        "seed tasks that are classification": sum(task["is_classification"] for task in seeds),
        "seed tasks without an input": sum(not task["instances"][0]["input"] for task in seeds),
        "distinct first words of the instructions": len({words(text)[0] for text in instructions(seeds)}),
        "words in the shortest instruction": min(num_words),
        "words in the longest instruction": max(num_words),
        "evaluation tasks": len(evals),
        "evaluation tasks scored by exact match": sum(task["metric"] == "exact_match" for task in evals),
        "evaluation tasks scored by ROUGE-L": sum(task["metric"] == "rouge_l" for task in evals),
        "user instructions": len(users),
        "user instructions in English": sum(user["language"] == "English" for user in users),
        "languages of the user instructions": len({user["language"] for user in users}),
        "words in the longest user instruction": max(len(text.split()) for text in instructions(users)),
    }
