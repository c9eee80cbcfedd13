"""All packaged prompts: each renders with what its method gives it, ends as its page says, and is shipped."""

import re
import tomllib

import pytest

from generation.judge import PROMPTS as JUDGE_PROMPTS
from generation.methods import METHODS
from generation.templates import load_prompts
from tests.generation.harness import PROMPT_FOLDER, ROOT

VARIABLES = {
    **{f"{name}/{prompt}": names for name, method in METHODS.items() for prompt, names in method.PROMPTS.items()},
    **{f"judge/{prompt}": names for prompt, names in JUDGE_PROMPTS.items()},
    "self_instruct/answer": ("instruction", "input"),  # of the evaluation
}
TASK = {"instruction": "Do it.", "input": "", "output": "Done."}
VALUES = {
    **TASK,
    "only_classification": False,
    "num_tasks": 20,
    "language": "English",
    "data_format": "JSON",
    "rubric": "It is good.",
    "first": "Do it.",
    "second": "Do that.",
}
ENDS = {
    "self_instruct/instructions": "\n2. b\n3.",
    "self_instruct/classify": "Task: Do it.\nIs it classification?",
    "self_instruct/input_first": "Task: Do it.\n",
    "self_instruct/output_first": "Task: Do it.\nClass label:",
    "self_instruct/answer": "Task: Do it.\nOutput:",
    "alpaca/tasks": "\n###\n2. Instruction: Do it.\n2. Input:\n<noinput>\n2. Output:\nDone.\n###\n3. Instruction:",
    "instruction_wild/instructions": "\n2. b\n3.",
    "evol_instruct/breadth": "#Created Prompt#:",
    "evol_instruct/equal": "Equal / Not equal",
    **dict.fromkeys((name for name in VARIABLES if name.endswith("judge")), "\nThe score alone:"),
    **dict.fromkeys((name for name in VARIABLES if "self" not in name and name.endswith("answer")), "Do it."),
}


def values(name: str) -> dict:
    demonstrations = [TASK, TASK] if name == "alpaca/tasks" else ["a", "b"]
    return {key: {**VALUES, "demonstrations": demonstrations}[key] for key in VARIABLES[name]}


@pytest.mark.parametrize("name", VARIABLES)
def test_a_prompt_renders_and_ends_where_the_answer_begins(name):
    folder, _, file = name.partition("/")
    prompt = load_prompts(PROMPT_FOLDER / folder, {file: VARIABLES[name]})[file]
    assert prompt.render(**values(name)).endswith(ENDS.get(name, "Do it.\n\n#Rewritten Prompt#:"))


def test_every_packaged_prompt_is_some_methods():
    packaged = {str(path.relative_to(PROMPT_FOLDER).with_suffix("")) for path in PROMPT_FOLDER.rglob("*.jinja")}
    assert packaged == VARIABLES.keys()


def test_the_page_names_each_prompt_with_its_variables():
    rows = re.findall(r"^\| (`[^|]*?/[^|]*) \| ([^|]*) \|", (PROMPT_FOLDER / "README.md").read_text(), re.MULTILINE)
    stated = {}
    for names, variables in rows:
        folder, _, _ = names.strip("`").partition("/")
        known = {word for word in re.findall(r"`(\w+)`", re.sub(r"\(list of `.*?\)", "", variables))}
        for name in re.findall(r"`(?:\w+/)?(\w+)`", names):
            stated[f"{folder}/{name}"] = known
    answers = {name for name in VARIABLES if name.endswith("/answer") and name != "self_instruct/answer"}
    assert stated == {name: set(known) for name, known in VARIABLES.items() if name not in answers}


def test_what_is_needed_at_run_time_is_shipped():
    package = ROOT / "generation"
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {path for glob in setuptools["package-data"]["generation"] for path in package.glob(glob)}
    needed = {*(package / "seeds").glob("*.jsonl"), *(package / "prompts").rglob("*.jinja")}
    assert len(needed) > 20
    assert needed <= shipped
