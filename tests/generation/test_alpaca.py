"""Alpaca: responses taken apart as `post_process_gpt3_response` does, and a run's rows, rejects and prompts."""

import re

import pytest
from pydantic import ValidationError

from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.methods import AlpacaConfig, TaskSampling
from generation.filters.drafts import Draft, Instance
from generation.parsing.chat import TRUNCATED, Dropped
from generation.parsing.labels import parse_tasks
from generation.seed_tasks import SeedTask, load_seed_tasks
from tests.generation.harness import ROOT, SEEDS, CoroutinePool, drive

PUBLISHED_SEEDS = ROOT.parent / "shared" / "data" / "self_instruct" / "seed_tasks.jsonl"

GOLDEN = """ Sort these three words by length.
4. Input:
pear, fig, banana
4. Output:
fig, pear, banana

###
5. Instruction: Name a NASA mission to Mars.
5. Input:
<noinput>
5. Output:
Mars 2020.
"""
SORT = Draft("Sort these three words by length.", "pear, fig, banana", "fig, pear, banana")
NAME = Draft("Name a NASA mission to Mars.", "", "Mars 2020.")


def task(number: int, instruction: str, given: str = "<noinput>", output: str = "Done as you say.") -> str:
    return f"{number}. Instruction: {instruction}\n{number}. Input:\n{given}\n{number}. Output:\n{output}\n"


def response(*tasks: str) -> str:
    """Tasks as a model writes them after a prompt that ends at "4. Instruction:"."""
    return "###\n".join(tasks).removeprefix("4. Instruction:")


# -- parsing


def test_tasks_are_split_in_seven_under_their_numbers():
    assert parse_tasks(GOLDEN, 4) == [SORT, NAME]  # upper case stays


def test_the_last_item_of_a_cut_response_is_rejected():
    cut = Dropped(
        "5. Instruction: Name a NASA mission to Mars.\n5. Input:\n<noinput>\n5. Output:\nMars 2020.", TRUNCATED
    )
    assert parse_tasks(GOLDEN, 4, was_cut=True) == [SORT, cut]
    assert parse_tasks(GOLDEN + "###\n", 4, was_cut=True) == [SORT, NAME]  # nothing of the next one was written
    assert parse_tasks(" Sort the", 4, was_cut=True) == [Dropped("4. Instruction: Sort the", TRUNCATED)]


@pytest.mark.parametrize(
    "words",
    [
        *("<noinput>", "<NoInput>", " <noinput> ", "", "No input required.", "No input is needed for this task."),
        *(
            "(none)",
            "None",
            "None required",
            "N/A",
            "n/a.",
            "[No Input]",
            "**No input needed**",
            "not applicable",
            "-",
            "无",
        ),
    ],
)
def test_no_input_is_an_empty_one(words):
    (parsed,) = parse_tasks(response(task(4, "Do it well.", words)), 4)
    assert parsed.input == ""


@pytest.mark.parametrize("words", ["No one came to the party.", "None of us slept.", "0", "nothing"])
def test_an_input_that_only_looks_like_none_stays(words):
    assert parse_tasks(response(task(4, "Do it well.", words)), 4)[0].input == words


def test_any_number_will_do_if_it_is_the_same_for_the_whole_task():
    tasks = (task(4, "First of all."), task(6, "Second of all."), task(6, "Third of all."))
    assert [each.instruction for each in parse_tasks(response(*tasks), 4)] == [
        *("First of all.", "Second of all.", "Third of all."),
    ]


@pytest.mark.parametrize(
    "broken",
    [
        "4. Instruction: Twice.\n4. Input:\na\n4. Output:\nb\n4. Output:\nc",
        "4. Instruction: Without an output.\n4. Input:\na",
        "4. Instruction: With the next one's.\n4. Input:\na\n4. Output:\nb\n5. Output:\nc",
        "4. Instruction: 4. Input:\na\n4. Output:\nwithout an instruction",
        "4. Instruction: The other way round.\n4. Output:\na\n4. Input:\nb",
    ],
)
@pytest.mark.parametrize("separator", ["###\n", ""])
def test_a_malformed_task_is_rejected_with_its_text(broken, separator):
    sound = task(5, "Sound one.")
    assert parse_tasks(f"{broken.removeprefix('4. Instruction:')}\n{separator}{sound}", 4) == [
        Dropped(broken, "malformed_task"),
        Draft("Sound one.", "", "Done as you say."),
    ]


@pytest.mark.parametrize(
    "text",
    [
        f"4. Instruction:{GOLDEN}",
        f"###\n4. Instruction:{GOLDEN}###\n",
        GOLDEN.replace("###\n5", "### 5"),
        GOLDEN.replace("###\n5", "####\n5"),
        GOLDEN.replace("###\n5", "######\n5"),
        GOLDEN.replace("###\n5", "\n\n###\n\n5"),
        GOLDEN.replace("###\n5", "---\n5"),
        GOLDEN.replace("\n###\n5", "5"),  # no separator
        GOLDEN + "\n###\n",
        f"```\n4. Instruction:{GOLDEN}```",
        f"4. Instruction:{GOLDEN}".replace("4.", "1.").replace("5.", "2."),
        f"4. Instruction:{GOLDEN}".replace("4.", "4)").replace("5.", "5)"),
        f"4. Instruction:{GOLDEN}".replace(". Input:", ". **Input:**").replace(". Output:", ". **Output**:"),
        re.sub(r"(\d\. (?:Input|Output):)", r"**\1**", GOLDEN).replace("5. Instruction:", "**5. Instruction:**"),
        re.sub(r"(\d)\. (Instruction|Input|Output):", r"### \2 \1:", f"4. Instruction:{GOLDEN}"),
        re.sub(r"\d\. (Instruction|Input|Output):", r"\1：", f"4. Instruction:{GOLDEN}")
        .lower()
        .replace("sort", "Sort"),
        re.sub(r"\d\. (Instruction|Input|Output):", r"**\1:**", f"4. Instruction:{GOLDEN}"),
        re.sub(r"\d\. (Input|Output):", r"\1:", f"4. Instruction:{GOLDEN}"),
        f"4. Instruction:{GOLDEN}".replace("Output:", "Response:"),
        re.sub(r"(\d)\. (Instruction):", r"### Task \1\n**\2:**", f"4. Instruction:{GOLDEN}")
        .replace("4. ", "")
        .replace("5. ", ""),
    ],
)
def test_tasks_are_read_in_whatever_way_they_are_labelled_and_parted(text):
    parsed = [each for each in parse_tasks(text, 4) if isinstance(each, Draft)]
    same = [Draft(each.instruction.lower(), each.input.lower(), each.output.lower()) for each in parsed]
    assert same == [Draft(each.instruction.lower(), each.input, each.output.lower()) for each in (SORT, NAME)]


def test_what_a_chat_writes_around_its_tasks_is_rejected():
    opener, closer = "Certainly! Here are the tasks, beginning with number 4:", "Let me know if you need more tasks!"
    assert parse_tasks(f"{opener}\n\n### 4. Instruction:{GOLDEN}\n---\n{closer}", 4) == [
        *(Dropped(opener), SORT, NAME, Dropped(closer)),
    ]


def test_an_answer_may_have_headings_and_speak_of_inputs_and_examples():
    output = "# Parts\n\n### Outside\n1. Input: the keyboard\n2. Output: the screen\n\nOutput: text\nExample: this"
    (parsed,) = parse_tasks(response(task(4, "Name the parts of a computer.", output=output)), 4)
    assert parsed.output == output


def test_a_task_without_an_input_label_has_no_input():
    text = " Name a river.\n4. Output:\nThe Elbe.\n5. Instruction: Name a lake.\nOutput: Como."
    assert parse_tasks(text, 4) == [Draft("Name a river.", "", "The Elbe."), Draft("Name a lake.", "", "Como.")]


def test_labels_inside_a_line_count_if_no_other_does():
    assert parse_tasks(" Name it. 4. Input: a fish 4. Output: Bob", 4) == [Draft("Name it.", "a fish", "Bob")]


def test_text_without_a_label_is_no_task():
    assert parse_tasks("I cannot do that.", 4) == [Dropped("4. Instruction: I cannot do that.", "malformed_task")]
    assert parse_tasks(" \n###\n", 4) == []


def test_an_output_may_be_empty():
    assert parse_tasks(response(task(4, "Say nothing.", output="")), 4)[0].output == ""


# -- the method


def once(text: str, reason: str = "stop"):
    """A pool whose every response is `text`."""
    return CoroutinePool(answer=lambda request: (text, reason))


def test_what_becomes_of_each_item(tmp_path):
    text = response(
        task(4, "Sort these three words by length.", "b, aa", "b, aa"),
        task(5, "Too short."),
        task(6, "Compose some music for a rainy day."),
        task(7, "Write a program that adds two numbers."),
        task(8, "(Parts of it) explain the tides."),
        task(9, "• Überlege dir einen guten Namen."),
        task(10, "Sort these three words by their length."),
        "12. Instruction: Number eleven has no output.\n",
        task(12, "Say nothing at all to this.", output=""),
        task(13, "Explain what NASA does all day."),
    )
    made = drive(tmp_path, once(text), AlpacaConfig(num_instructions=3, max_requests=1))
    assert made.turns() == [
        ("Sort these three words by length.\n\nb, aa", "b, aa"),
        ("Explain what NASA does all day.", "Done as you say."),
    ]
    assert [(row["kind"], row["reason"], row["detail"]) for row in made.rejected][:7] == [
        ("instruction", "too_short", "2 words"),
        ("instruction", "blacklisted_word", "music"),
        ("instruction", "begins_with", "Write a program"),
        ("instruction", "starts_with_punctuation", "("),
        ("instruction", "starts_with_punctuation", "•"),
        ("instruction", "not_novel", made.rejected[5]["detail"]),
        ("response", "malformed_task", ""),
    ]
    assert made.rejected[6]["output"].startswith("12. Instruction: Number eleven")  # kept, to be looked at
    assert [row["reason"] for row in made.rejected[7:]] == ["empty_output"]


def test_a_response_that_was_not_given_is_a_reject_with_its_reason(tmp_path):
    made = drive(tmp_path, once("", "prompt_too_long"), AlpacaConfig(max_empty_requests=2))
    assert [(row["kind"], row["reason"]) for row in made.rejected] == [("response", "prompt_too_long")] * 2


def numbered(request: GenerationRequest) -> str:
    """Two new tasks for every prompt."""
    word = f"{request.sampling.seed:x}"
    return response(task(4, f"Explain {word} to {word[::-1]} now."), task(5, f"Give {word}a its {word[:5]} name."))


def test_three_human_seeds_are_shown_and_never_what_the_machine_wrote(tmp_path):
    pool = CoroutinePool(answer=numbered)
    made = drive(tmp_path, pool, AlpacaConfig(num_instructions=30, max_concurrent_proposals=1))
    seeds = {seed.instruction: seed.id for seed in SEEDS}
    assert len(made.instructions) == 30
    shown_at_all = set()
    for request in pool.requests:
        shown = re.findall(r"^\d+\. Instruction: (.*)$", request.prompt, re.MULTILINE)
        assert len(shown) == len(set(shown)) == 3
        assert seeds.keys() >= set(shown)
        assert request.prompt.endswith("\n###\n4. Instruction:")
        assert request.prompt.count("<noinput>") == 3 + 1  # the rules name it too
        shown_at_all |= set(shown)
    assert shown_at_all == seeds.keys()
    for row in made.rows:
        assert row["parent_ids"] == [] and len(row["seed_ids"]) == 3
        assert row["method"] == "alpaca"


def test_a_demonstration_is_a_whole_task_on_lines_of_its_own(tmp_path):
    pool = once(GOLDEN)
    seeds = [
        SeedTask("a", "a", "Rhyme\non this: ", (Instance("hat", "cat"), Instance("x", "y")), False),
        SeedTask("b", "b", "Nothing is known of this one.", (Instance("x", ""),), False),
        SeedTask("c", "c", "Nor of this.", (), False),
    ]
    drive(tmp_path, pool, AlpacaConfig(num_instructions=1, max_requests=1), seeds=seeds)
    assert pool.requests[0].prompt.endswith(
        "\n###\n1. Instruction: Rhyme on this\n1. Input:\nhat\n1. Output:\ncat\n###\n2. Instruction:"
    )


def test_seeds_without_an_output_cannot_be_shown(tmp_path):
    with pytest.raises(InputError, match="no task has an output"):
        drive(tmp_path, once(""), AlpacaConfig(), seeds=[SeedTask("a", "a", "Do it.", (Instance("x", ""),), False)])


def test_published_sampling_reaches_the_engines_and_stops_at_item_20(tmp_path):
    pool = once(GOLDEN)
    drive(tmp_path, pool, AlpacaConfig(num_instructions=1))
    sampling = pool.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens, sampling.presence_penalty) == (1, 1, 3072, 0)
    assert sampling.stop == ("\n20. Instruction:",)
    assert "20 different tasks" in pool.requests[0].prompt


def test_demonstrations_must_leave_something_to_write():
    assert AlpacaConfig(num_demonstrations=3, num_tasks=4).task_sampling == TaskSampling()
    with pytest.raises(ValidationError, match="no task is left to write"):
        AlpacaConfig(num_demonstrations=4, num_tasks=4)


def test_seeds_are_rows_only_if_that_is_asked_for(tmp_path):
    without = drive(tmp_path / "without", once(GOLDEN), AlpacaConfig(num_instructions=2))
    assert [row["method"] for row in without.rows] == ["alpaca", "alpaca"]
    config = AlpacaConfig(num_instructions=2, include_seed_tasks=True)
    assert [row["method"] for row in drive(tmp_path / "with", once(GOLDEN), config).rows].count("seed") == len(SEEDS)


def test_in_a_chat_the_whole_prompt_is_the_users_turn(tmp_path):
    pool = once(f"Sure, here they are:\n\n###\n4. Instruction:{GOLDEN}")
    config = AlpacaConfig(num_instructions=2, models={"writer": {"form": "chat"}})
    made = drive(tmp_path, pool, config)
    assert [message["role"] for message in pool.requests[0].prompt] == ["user"]
    assert [row["instruction"] for row in made.instructions] == [SORT.instruction, NAME.instruction]


@pytest.mark.skipif(not PUBLISHED_SEEDS.is_file(), reason="the published seeds are not beside this checkout")
def test_a_run_over_the_published_seeds(tmp_path):
    pool, seeds = CoroutinePool(answer=numbered), load_seed_tasks(PUBLISHED_SEEDS)
    made = drive(tmp_path, pool, AlpacaConfig(num_instructions=200, max_concurrent_proposals=4), seeds=seeds)
    assert len(made.rows) == len(made.instructions) == 200
    assert len({seed for row in made.rows for seed in row["seed_ids"]}) > 120
    items = [re.findall(r"^\d+\. (?:Instruction|Input|Output):", r.prompt, re.MULTILINE) for r in pool.requests]
    assert all(len(found) == 10 for found in items)  # three whole demonstrations, and the open one
