"""Parsing as published, and the way of an instruction through the method. No Ray here: the pool is a coroutine."""

import asyncio
from dataclasses import replace

import pytest

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest
from cluster.errors import InputError
from generation.config.methods import SelfInstructConfig
from generation.filters.drafts import Instance
from generation.methods.self_instruct import SelfInstruct
from generation.parsing.chat import TRUNCATED, Dropped
from generation.parsing.labels import parse_input_first, parse_output_first, parse_yes
from generation.parsing.lists import parse_list
from generation.request_log import RequestLog
from generation.requester import Requester, ServedModel
from generation.seed_tasks import load_seed_tasks
from generation.templates import load_prompts
from tests.generation.harness import PROMPT_FOLDER, ROOT, SEEDS, CoroutinePool, drive

PROMPTS = SelfInstruct.PROMPTS
PUBLISHED_SEEDS = ROOT.parent / "shared" / "data" / "self_instruct" / "seed_tasks.jsonl"


# -- parsing


def test_a_continued_list_is_split_at_its_numbers():
    text = " Sort   the words.\n10. Add 2. and 3.\n11 . Name a\tGREAT city.\n12."
    assert parse_list(text, 9) == [
        "Sort the words.",
        "Add 2. and 3.",
        "Name a GREAT city.",
        "",
    ]
    assert parse_list(" Weigh it:\n3.5 kg\n10.写一首诗\n11、再写一首", 9) == [
        "Weigh it: 3.5 kg", "写一首诗", "再写一首",
    ]  # fmt: skip


def test_a_chat_may_repeat_the_number_at_which_the_list_goes_on():
    text = "Of course, here is more:\n\n9. Sort the words.\n10. Add 9. and 3."
    assert parse_list(text, 9) == [Dropped("Of course, here is more:"), "Sort the words.", "Add 9. and 3."]
    assert parse_list("9. Sort the words.", 9) == ["Sort the words."]


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        *((" Yes\n", True), ("yes", True), ("YES ", True), ("Yes.", True), ("**Yes**", True), ("Yes, it", True)),
        *(("No", False), ("", False), ("Yesterday", False), ("Not yes", False)),
    ],
)
def test_an_answer_that_begins_with_yes_is_a_yes(text, is_yes):
    assert parse_yes(text) is is_yes


def test_instances_with_the_input_first():
    text = "Example 1\nInput: pear\nfig\nOutput: fig\nExample 2\nOutput: none"
    both = [Instance("pear\nfig", "fig"), Instance("", "none")]
    assert parse_input_first(text) == both
    assert parse_input_first(text, was_cut=True) == [both[0], Dropped("Output: none", TRUNCATED)]
    for was_cut in (False, True):  # the next task shows that the second instance is complete
        assert parse_input_first(f"{text}\nTask: another", was_cut) == [*both, Dropped("Task: another")]
    assert parse_input_first("Output: alone") == [Instance("", "alone")]
    assert parse_input_first("Output: alone", was_cut=True) == [Dropped("Output: alone", TRUNCATED)]
    assert parse_input_first("no marker at all") == [Dropped("no marker at all", "no_instance")]
    two_pairs = "Input: a\nOutput 1: b\nInput 2: c\nOutput 2: d"
    assert parse_input_first(two_pairs) == [Instance("a", "b"), Instance("c", "d")]


def test_instances_with_the_label_first():
    text = " warm\nInput: soup\nClass label: cold\nSentence: ice\nmore ice\nClass label: mild"
    expected = [Instance("soup", "warm"), Instance("Sentence: ice\nmore ice", "cold"), Instance("", "mild")]
    assert parse_output_first(text) == expected
    assert parse_output_first(text, was_cut=True) == [*expected[:2], Dropped("Class label: mild", TRUNCATED)]


# -- the method


CONFIG = SelfInstructConfig(num_instructions=60, max_concurrent_proposals=8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("undisturbed"), CoroutinePool(0), CONFIG)


@pytest.mark.parametrize("checkpoint_seconds", [0, 1000])
@pytest.mark.parametrize("num_before_kill", [1, 25, 90, 124])
def test_after_a_kill_the_same_data_is_made_and_nothing_logged_is_asked_again(
    tmp_path, undisturbed, num_before_kill, checkpoint_seconds
):
    config = CONFIG.model_copy(update={"checkpoint_seconds": checkpoint_seconds})
    with pytest.raises(ExceptionGroup):
        drive(tmp_path, CoroutinePool(5, max_requests=num_before_kill), config)
    assert (tmp_path / "data" / "progress.json").exists() == (checkpoint_seconds == 0 and num_before_kill > 114)
    with RequestLog(tmp_path / "requests") as log:
        logged = log.ids()
    assert logged
    pool = CoroutinePool(6)
    made = drive(tmp_path, pool, config)
    assert made.data == undisturbed.data
    assert logged.isdisjoint(request.request_id for request in pool.requests)
    assert made.requester.num_resumed <= len(logged)


def test_demonstrations_are_six_seeds_and_two_of_the_machine_once_it_has_some(tmp_path):
    pool = CoroutinePool(0)
    config = SelfInstructConfig(num_instructions=30, max_concurrent_proposals=1, capitalize=False)
    made = drive(tmp_path, pool, config)
    prompts = [request.prompt for request in pool.requests if request.prompt.endswith("9.")]
    seeds = {task.instruction for task in SEEDS}
    machine = {row["instruction"] for row in made.instructions}
    numbers = []
    for prompt in prompts:
        shown = [line.partition(". ")[2] for line in prompt.splitlines()[1:-1]]
        numbers.append((sum(text in seeds for text in shown), sum(text in machine for text in shown)))
    assert numbers == [(8, 0)] + [(6, 2)] * (len(prompts) - 1)
    ids = {row["id"] for row in made.instructions}
    for row in made.rows:
        assert ids.issuperset(row["parent_ids"])
        assert set(row["seed_ids"]) <= {task.id for task in SEEDS}


def test_equal_prompts_are_different_requests(tmp_path):
    pool = CoroutinePool(0)
    config = SelfInstructConfig(num_instructions=30, num_demonstrations=len(SEEDS), num_machine_demonstrations=0)
    made = drive(tmp_path, pool, config, seeds=SEEDS[:1])
    texts = [request.prompt for request in pool.requests if request.prompt.endswith("\n2.")]
    assert len(texts) > len(set(texts)) == 1
    assert len(made.instructions) == 30


def test_any_earlier_instruction_may_be_shown_again(tmp_path):
    config = SelfInstructConfig(num_instructions=60, max_concurrent_proposals=1)
    made = drive(tmp_path, CoroutinePool(0), config)
    order = [row["id"] for row in made.instructions]
    distances = [
        position - order.index(parent) for position, row in enumerate(made.instructions) for parent in row["parent_ids"]
    ]
    assert max(distances) > 30  # not only the latest


def test_kept_instructions_are_all_novel_and_rejects_say_to_what(undisturbed):
    assert undisturbed.reasons >= {"not_novel", "too_short", "blacklisted_word", "empty_output"}
    for row in undisturbed.rejected:
        if row["reason"] == "not_novel":
            assert row["nearest"][0]["score"] > 0.7
            assert row["nearest"][0]["id"] in row["detail"]
    nearest = [neighbor for row in undisturbed.instructions for neighbor in row["nearest"]]
    assert nearest and all(neighbor["score"] <= 0.7 for neighbor in nearest)


def test_published_sampling_reaches_the_engines(tmp_path):
    pool = CoroutinePool(0)
    drive(tmp_path, pool, CONFIG)
    by_end = {"9.": (0.7, 0.5, 2.0, 1024), "classification?": (0.0, 1.0, 0.0, 3), "label:": (0.0, 1.0, 1.5, 300)}
    for request in pool.requests:
        sampling = request.sampling
        end = next((end for end in by_end if request.prompt.endswith(end)), None)
        found = (sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.max_tokens)
        assert found == by_end.get(end, (0.0, 1.0, 1.5, 350))
        assert sampling.seed is not None


def test_a_response_cut_short_is_dropped_whole_and_giving_up_says_why(tmp_path):
    pool = CoroutinePool(answer=lambda request: (CoroutinePool.scripted(request), "length"))
    made = drive(tmp_path, pool, SelfInstructConfig(max_empty_requests=5, drop_truncated=True))
    driver = made.driver
    assert (driver.state.num_accepted, driver.committed.num_generated, len(made.rejected)) == (0, 0, 5)
    assert made.reasons == {"truncated_response"}
    assert "no instruction of the last 5 requests was accepted" in made.driver.stopped_because


def test_a_response_cut_short_may_lose_only_its_last_instruction(tmp_path):
    answer = " First of the new instructions.\n10. Second of those that are new.\n11. Third which was cut"
    pool = CoroutinePool(answer=lambda r: (answer, "length") if r.prompt.endswith("9.") else "Output: yes")
    made = drive(tmp_path, pool, SelfInstructConfig(num_instructions=2, max_requests=1))
    kept = [row["instruction"] for row in made.instructions]
    assert kept == ["First of the new instructions.", "Second of those that are new."]


def test_unanswered_requests_are_rejects_with_their_reason(tmp_path):
    def answer(request: GenerationRequest) -> tuple[str, str]:
        text = CoroutinePool.scripted(request)
        return (text, "stop") if request.prompt.endswith("9.") else ("", "prompt_too_long")

    made = drive(tmp_path, CoroutinePool(answer=answer), SelfInstructConfig(num_instructions=5))
    unanswered = [row for row in made.rejected if row["reason"] == "prompt_too_long"]
    assert [row["kind"] for row in unanswered] == ["classification"] * 5
    assert {row["method"] for row in made.rows} == {"seed"}


def test_no_more_requests_than_allowed(tmp_path):
    pool = CoroutinePool(0)
    config = SelfInstructConfig(num_instructions=500, max_requests=3)
    driver = drive(tmp_path, pool, config).driver
    assert sum(request.prompt.endswith("9.") for request in pool.requests) == 3
    assert 0 < driver.state.num_accepted < 500
    assert driver.stopped_because == "max_requests=3 reached"


def test_at_most_so_many_instances_of_an_instruction(tmp_path):
    config = SelfInstructConfig(num_instructions=20, max_instances=1, include_seed_tasks=False)
    made = drive(tmp_path, CoroutinePool(0), config)
    tasks = [row["task"] for row in made.rows]
    assert len(tasks) == len(set(tasks)) > 0
    assert "more_than_max_instances" in made.reasons


# -- seeds


@pytest.mark.skipif(not PUBLISHED_SEEDS.is_file(), reason="the published seeds are not at hand")
def test_the_published_seeds_load():
    tasks = load_seed_tasks(PUBLISHED_SEEDS)
    assert len(tasks) == 175
    assert sum(task.is_classification for task in tasks) == 26
    assert all(len(task.instances) == 1 for task in tasks)


GOOD = '{"id": "a", "name": "n", "instruction": "Do it.", "instances": [], "is_classification": false}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no seed task"),
        ("\n\n[1]\n", r"seeds:3: expected a JSON object"),
        (GOOD + "\n{", r"seeds:2: not JSON"),
        (f"{GOOD}\n\n" + GOOD.replace("name", "title"), r"seeds:3: no key 'name'"),
        (GOOD.replace("false", '"no"'), r"seeds:1: 'is_classification' is str, expected bool"),
        (GOOD.replace("[]", '[{"input": ""}]'), r"seeds:1: 'instances'\[0\] has no text 'output'"),
        (GOOD.replace("Do it.", " "), r"seeds:1: the instruction is empty"),
        (f"{GOOD}\n{GOOD}", r"seeds:2: id 'a' is already used in seeds:1"),
    ],
)
def test_a_bad_seed_file_is_named_with_line_and_key(tmp_path, text, message):
    (tmp_path / "seeds").write_text(text)
    with pytest.raises(InputError, match=message):
        load_seed_tasks(tmp_path / "seeds")


# -- templates


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ instruction", r"classify\.jinja:1: "),
        ("{{ instructoin }}", r"uses instructoin, but the template gets only instruction"),
        ("{{ ''.__class__.__mro__ }}{{ instruction }}", r"cannot be rendered: access to attribute '__class__'"),
        ("{{ instruction.nothing }}", r"cannot be rendered"),
        (None, r"no such prompt.*other\.jinja"),
    ],
)
def test_a_bad_template_is_named_with_its_fault(tmp_path, text, message):
    (tmp_path / "other.jinja").write_text("x")
    if text is not None:
        (tmp_path / "classify.jinja").write_text(text)
    with pytest.raises(InputError, match=message):
        load_prompts(tmp_path, {"classify": ("instruction",)})["classify"].render(instruction="Do it.")


def test_the_packaged_prompts_end_where_the_continuation_begins():
    prompts = load_prompts(PROMPT_FOLDER / "self_instruct", PROMPTS)
    shown = {"demonstrations": ["x"] * 8, "only_classification": False}
    assert prompts["instructions"].render(**shown).endswith("\n8. x\n9.")
    assert prompts["classify"].render(instruction="Do it.").endswith("Task: Do it.\nIs it classification?")
    assert prompts["input_first"].render(instruction="Do it.").endswith("Task: Do it.\n")
    assert prompts["output_first"].render(instruction="Do it.").endswith("Task: Do it.\nClass label:")


def test_a_request_is_the_same_only_if_all_that_decides_it_is(tmp_path):
    prompts = load_prompts(PROMPT_FOLDER / "self_instruct", PROMPTS)
    sampling = CONFIG.classification_sampling
    pool = CoroutinePool(0)
    prompt = prompts["classify"]

    def requester(log: RequestLog, name: str = "m", revision: str = "1", seed: int = 0, form: str = "completion"):
        model = ServedModel(name, ModelConfig(path=name), revision, pool, form)
        return Requester({"writer": model}, log, seed)

    async def ask_all(log: RequestLog) -> None:
        first = requester(log)
        await first.ask("writer", "s", prompt, "text", sampling)
        await requester(log, "elsewhere").ask("writer", "s", prompt, "text", sampling)  # the same weights, moved
        for other in (
            first.ask("writer", "t", prompt, "text", sampling),
            first.ask("writer", "s", prompt, "texts", sampling),
            first.ask("writer", "s", replace(prompt, sha="1"), "text", sampling),
            first.ask("writer", "s", prompt, "text", CONFIG.input_first_sampling),
            first.ask("writer", "s", prompt, "text", sampling, replica=1),
            requester(log, revision="2").ask("writer", "s", prompt, "text", sampling),
            requester(log, seed=1).ask("writer", "s", prompt, "text", sampling),
            requester(log, form="chat").ask("writer", "s", prompt, "text", sampling),
        ):
            await other

    with RequestLog(tmp_path / "log") as log:
        asyncio.run(ask_all(log))
        assert len(log) == len(pool.requests) == 9


def test_equal_requests_at_the_same_time_are_one(tmp_path):
    pool = CoroutinePool(0)
    prompt = load_prompts(PROMPT_FOLDER / "self_instruct", PROMPTS)["classify"]
    model = ServedModel("m", ModelConfig(path="m"), "1", pool, "completion")

    async def ask_twice(log: RequestLog):
        requester = Requester({"writer": model}, log, 0)
        asked = (requester.ask("writer", "s", prompt, "text", CONFIG.classification_sampling) for _ in range(2))
        return await asyncio.gather(*asked)

    with RequestLog(tmp_path / "log") as log:
        first, second = asyncio.run(ask_twice(log))
        assert (len(log), len(pool.requests)) == (1, 1)
    assert first == second
