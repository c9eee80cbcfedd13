"""Self-Instruct's rules beyond the main way: layouts, classification alone, contradictions, and the published seeds."""

from collections import Counter
from random import Random

import pytest

from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.filters import ALPACA_FILTERS, SELF_INSTRUCT_FILTERS
from generation.config.methods import SelfInstructConfig
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Instance
from generation.methods.base import one_line
from generation.methods.self_instruct import clean_input, encode
from generation.seed_tasks import SeedTask, load_seed_tasks
from tests.generation.harness import ROOT, SEEDS, CoroutinePool, drive

PUBLISHED_SEEDS = ROOT.parent / "shared" / "data" / "self_instruct" / "seed_tasks.jsonl"
needs_published_seeds = pytest.mark.skipif(
    not PUBLISHED_SEEDS.is_file(), reason="the published seeds are not beside this checkout"
)

# The forms of the released `encode_instance`, for the instruction "Do" and the input "it".
PUBLISHED_WITH_INPUT = {
    "Do\nInput: it\nOutput:",
    "Do\n\nInput: it\n\nOutput:",
    "Task: Do\nInput: it\nOutput:",
    "Do\n\nit\n\nOutput:",
    "Do\n\nit\n\n",
    "Do\nit\n\n",
    "Task: Do\n\nit\n\n",
}
PUBLISHED_WITHOUT_INPUT = {"Do Output:", "Do\nOutput:", "Do\n\nOutput:", "Do\n", "Do\n\n", "Task: Do\n\n"}


# -- layouts


def test_the_published_layouts_are_seven_with_an_input_and_six_without():
    draws = [Random(number) for number in range(300)]
    assert {encode("Do", "it", "published", draw) for draw in draws} == PUBLISHED_WITH_INPUT
    assert {encode("Do", "", "published", draw) for draw in draws} == PUBLISHED_WITHOUT_INPUT
    counts = Counter(encode("Do", "it", "published", Random(number)) for number in range(7000))
    assert min(counts.values()) > 800  # all with the same chance


def test_braces_in_a_text_are_text():
    assert encode("Fill {x}", "{i}", "published", Random(0)).count("{") == 2
    assert encode("Fill {x}", "{i}", "plain", Random(0)) == "Fill {x}\n\n{i}"
    assert encode("Do", "", "plain", Random(0)) == "Do"


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Sentence: It rains.", "It rains."),
        ("Sentence: a\n\nSentence: b", "a\nSentence: b"),  # as released: the first one goes
        ("Name: Ada\nAge: 36", "Name: Ada\nAge: 36"),  # two labels say which is which
        ("Meet at 10:30", "Meet at 10:30"),  # our deviation: nothing is lost
        ("one\n\ntwo", "one\ntwo"),
        ("", ""),
    ],
)
def test_an_input_is_cleaned_or_left_alone(text, cleaned):
    assert clean_input(text, Random(0), probability=1) == cleaned
    assert clean_input(text, Random(0), probability=0) == text


def test_label_and_empty_lines_are_cleaned_together_half_of_the_time():
    draw = Random(1)
    results = Counter(clean_input("Text: a\n\nb", draw, 0.5) for _ in range(400))
    assert set(results) == {"Text: a\n\nb", "a\nb"}
    assert min(results.values()) > 150


def test_rows_of_seeds_and_of_the_machine_get_the_published_layouts(tmp_path):
    seeds = [SeedTask("s", "s", "Do", (Instance("it", "done"), Instance("", "nothing")), False), *SEEDS]
    config = SelfInstructConfig(num_instructions=20, encoding="published")
    turns = drive(tmp_path, CoroutinePool(0), config, seeds=seeds).turns()
    assert turns[0][0] in PUBLISHED_WITH_INPUT and turns[0][1] == "done"
    assert turns[1][0] in PUBLISHED_WITHOUT_INPUT and turns[1][1] == "nothing"
    machine = [user for user, _ in turns[len(seeds) + 1 :]]
    with_marks = [user for user in machine if user.startswith("Task: ") or user.endswith(("Output:", "\n"))]
    assert machine == with_marks
    assert len({user.endswith("Output:") for user in machine}) == 2


# -- only classification


def test_classification_seeds_alone_are_shown_under_a_header_of_their_own(tmp_path):
    kinds = [SeedTask(f"c{i}", "", f"Is {word} warm or cold? Say one.", (), True) for i, word in enumerate("xyz")]
    pool = CoroutinePool(0)
    config = SelfInstructConfig(num_instructions=5, max_concurrent_proposals=1, only_classification_seeds=True)
    made = drive(tmp_path / "only", pool, config, seeds=[*kinds, *SEEDS])
    first = pool.requests[0].prompt
    header, *shown = first.splitlines()
    assert "classification tasks" in header
    assert sorted(line.partition(". ")[2] for line in shown[:-1]) == [task.instruction for task in kinds]
    assert {seed for row in made.instructions for seed in row["seed_ids"]} == {"c0", "c1", "c2"}

    everything = CoroutinePool(0)
    drive(tmp_path / "all", everything, SelfInstructConfig(num_instructions=5), seeds=[*kinds, *SEEDS])
    assert "classification" not in everything.requests[0].prompt.splitlines()[0]


def test_without_a_classification_seed_there_is_nothing_to_show(tmp_path):
    with pytest.raises(InputError, match="only_classification_seeds=true, but no seed task has"):
        drive(tmp_path, CoroutinePool(0), SelfInstructConfig(only_classification_seeds=True))


# -- contradictions


def contradicting(request: GenerationRequest) -> str:
    if request.prompt.endswith("9."):
        return " Sort these three words by length."
    if request.prompt.endswith("classification?"):
        return " No"
    return "Example 1\nInput: a b\nOutput: a\nExample 2\nInput: a b\nOutput: b\nExample 3\nInput: c\nOutput: d\n"


@pytest.mark.parametrize(("drop", "num_rows"), [(True, 0), (False, 3)])
def test_an_input_with_two_outputs_costs_the_task_all_its_instances(tmp_path, drop, num_rows):
    config = SelfInstructConfig(num_instructions=1, drop_contradictions=drop, include_seed_tasks=False)
    made = drive(tmp_path, CoroutinePool(answer=contradicting), config)
    assert len(made.rows) == num_rows
    assert [row["reason"] for row in made.rejected] == ["contradicting_outputs"] * (3 - num_rows)
    assert len(made.instructions) == 1


# -- the published seeds


def published_seeds() -> list[SeedTask]:
    return load_seed_tasks(PUBLISHED_SEEDS)


def test_demonstrations_stand_on_one_line_without_a_colon():
    assert one_line(" Write about\n this  word: ") == "Write about this word"


@needs_published_seeds
def test_what_the_filters_say_of_the_published_seeds():
    def results(filters: tuple) -> dict[str, str]:
        chain = FilterChain(filters)
        judged = {task.id: chain.decide(Draft(task.instruction)).rejection for task in published_seeds()}
        return {task_id: rejection.reason for task_id, rejection in judged.items() if rejection}

    too_short = {"seed_task_12": "too_short", "seed_task_79": "too_short"}  # three words each
    program = {"seed_task_139": "begins_with"}
    assert results(SELF_INSTRUCT_FILTERS[:-1]) == {**too_short, **program}
    assert results(ALPACA_FILTERS[:-1]) == {**too_short, **program, "seed_task_169": "blacklisted_word"}

    novelty = FilterChain(SELF_INSTRUCT_FILTERS[-1:])
    close = {}
    for task in published_seeds():
        if rejection := novelty.decide(Draft(task.instruction)).rejection:
            close[task.id] = rejection.detail
        novelty.remember(task.id, Draft(task.instruction))
    assert close == {
        "seed_task_74": "ROUGE-L 0.824 to seed_task_47",
        "seed_task_113": "ROUGE-L 0.750 to seed_task_77",
    }


@needs_published_seeds
def test_a_run_over_the_published_seeds(tmp_path):
    pool, seeds = CoroutinePool(0), published_seeds()
    made = drive(tmp_path, pool, SelfInstructConfig(num_instructions=40, max_concurrent_proposals=4), seeds=seeds)
    answered = [
        task for task in seeds if task.id != "seed_task_115"
    ]  # its answer is a refusal, which a filter takes out
    assert [row["task"] for row in made.rows if row["method"] == "seed"] == [task.id for task in answered]
    assert {row["messages"][1]["content"] for row in made.rows[:174]} == {t.instances[0].output for t in answered}
    assert len(made.instructions) == 40
    lists = [request.prompt for request in pool.requests if request.prompt.endswith("\n9.")]
    assert all(prompt.count("\n") == 9 for prompt in lists)  # the seed of several lines too
    near = [row["nearest"] for row in made.instructions]
    assert all(len(found) <= 10 for found in near)
    assert {neighbor["id"] for found in near for neighbor in found} & {task.id for task in seeds}
