"""Parsing as published, and a method whose data depends on no timing. No Ray here: the pool is a coroutine."""

import asyncio
import random
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.engine_config import Completion, GenerationRequest, Sample
from cluster.errors import InputError
from generation.config import SynthesizeConfig
from generation.filters import Instance
from generation.methods.parsing import parse_input_first, parse_instructions, parse_output_first, parse_yes
from generation.methods.self_instruct import PROMPTS, SelfInstruct
from generation.request_log import RequestLog
from generation.requester import Requester
from generation.seed_tasks import SeedTask, load_seed_tasks
from generation.templates import load_prompts
from tests.fakes import continue_prompt

ROOT = Path(__file__).parents[2]
PUBLISHED_SEEDS = ROOT.parent / "shared" / "data" / "self_instruct" / "seed_tasks.jsonl"
SEEDS = [
    SeedTask(f"seed-{i}", f"seed {i}", f"Seed instruction number {i} is about {word}.", (Instance("", word),), False)
    for i, word in enumerate("apples boats clouds drums eagles ferns goats hills inks jars".split())  # noqa: SIM905
]


# -- parsing


def test_a_continued_list_is_split_at_its_numbers():
    text = " Sort   the words.\n10. Add 2. and 3.\n11 . Name a\tGREAT city.\n12."
    assert parse_instructions(text, capitalize=False) == [
        "Sort the words.",
        "Add 2. and 3.",
        "Name a GREAT city.",
        "",
    ]
    assert parse_instructions(text, capitalize=True)[2] == "Name a great city."


@pytest.mark.parametrize(
    ("text", "is_yes"), [(" Yes\n", True), ("yes", True), ("YES ", True), ("No", False), ("Yes.", False), ("", False)]
)
def test_only_a_plain_yes_is_a_yes(text, is_yes):
    assert parse_yes(text) is is_yes


def test_instances_with_the_input_first():
    text = "Example 1\nInput: pear\nfig\nOutput: fig\nExample 2\nOutput: none\nTask: another"
    assert parse_input_first(text, False) == [Instance("pear\nfig", "fig"), Instance("", "none")]
    assert parse_input_first(text, True) == [Instance("pear\nfig", "fig")]
    assert parse_input_first("Output: alone", False) == [Instance("", "alone")]
    assert parse_input_first("Output: alone", True) == []
    assert parse_input_first("no marker at all", False) == []


def test_instances_with_the_label_first():
    text = " warm\nInput: soup\nClass label: cold\nSentence: ice\nmore ice\nClass label: mild"
    expected = [Instance("soup", "warm"), Instance("Sentence: ice\nmore ice", "cold"), Instance("", "mild")]
    assert parse_output_first(text, False) == expected
    assert parse_output_first(text, True) == expected[:2]


# -- the method


class CoroutinePool:
    """Answers like the scripted engine, each after a random number of turns of the event loop."""

    def __init__(self, timing: int, max_requests: int | None = None) -> None:
        self.requests: list[GenerationRequest] = []
        self._timing = random.Random(timing)
        self._max_requests = max_requests

    async def generate(self, request: GenerationRequest) -> Completion:
        for _ in range(self._timing.randrange(40)):
            await asyncio.sleep(0)
        if len(self.requests) == self._max_requests:
            raise ConnectionResetError("the process is killed here")
        self.requests.append(request)
        text = self.answer(request)
        return Completion(request.request_id, (Sample(text, self.finish_reason(request), 2, (1, 2)),), 3)

    def answer(self, request: GenerationRequest) -> str:
        return continue_prompt(request.prompt, request.sampling.model_dump_json())

    def finish_reason(self, request: GenerationRequest) -> str:
        return "stop"


class Result:
    """A sink that keeps everything in order."""

    def __init__(self) -> None:
        self.rows, self.rejected, self.instructions = [], [], []
        self.add_row, self.add_rejected = self.rows.append, self.rejected.append

    def add_instruction(self, instances) -> None:
        self.instructions.append((instances.instruction, instances.is_classification))

    def reasons(self) -> set[str]:
        return {record.rejection.reason for record in self.rejected}


def run_method(log_path: Path, pool: CoroutinePool, config: SynthesizeConfig, seed: int = 0):
    """Run to the end or to the pool's error; returns the sink, the method and the requester."""
    result = Result()
    prompts = load_prompts(ROOT / "generation" / "prompts" / "self_instruct", PROMPTS)
    with RequestLog(log_path) as log:
        requester = Requester(pool, log, "model", "revision", seed)
        method = SelfInstruct(config, SEEDS, prompts, requester, result, seed)
        asyncio.run(method.run())
    return result, method, requester


CONFIG = SynthesizeConfig(num_instructions=60, lookahead=8)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    result, _, _ = run_method(tmp_path_factory.mktemp("undisturbed") / "log", CoroutinePool(0), CONFIG)
    return result


@pytest.mark.parametrize("timing", [1, 2, 3])
def test_the_order_in_which_answers_come_changes_nothing(tmp_path, undisturbed, timing):
    result, method, _ = run_method(tmp_path / "log", CoroutinePool(timing), CONFIG)
    assert result.rows == undisturbed.rows
    assert result.rejected == undisturbed.rejected
    assert result.instructions == undisturbed.instructions
    assert method.num_kept == len(result.instructions) == 60


@pytest.mark.parametrize("num_before_kill", [1, 25, 90])
def test_after_a_kill_the_same_data_is_made_and_nothing_logged_is_asked_again(tmp_path, undisturbed, num_before_kill):
    with pytest.raises(ExceptionGroup):
        run_method(tmp_path / "log", CoroutinePool(5, max_requests=num_before_kill), CONFIG)
    with RequestLog(tmp_path / "log") as log:
        logged = log.ids()
    assert logged
    pool = CoroutinePool(6)
    result, _, requester = run_method(tmp_path / "log", pool, CONFIG)
    assert result.rows == undisturbed.rows
    assert result.rejected == undisturbed.rejected
    assert logged.isdisjoint(request.request_id for request in pool.requests)
    assert 0 < requester.num_resumed <= len(logged)


def test_a_finished_run_asks_nothing_again(tmp_path, undisturbed):
    run_method(tmp_path / "log", CoroutinePool(1), CONFIG)
    with RequestLog(tmp_path / "log") as log:
        first_ids = log.ids()
    pool = CoroutinePool(2)
    result, _, _ = run_method(tmp_path / "log", pool, CONFIG)
    assert result.rows == undisturbed.rows
    assert first_ids.isdisjoint(request.request_id for request in pool.requests)


def test_another_seed_makes_other_data(tmp_path, undisturbed):
    result, _, _ = run_method(tmp_path / "log", CoroutinePool(0), CONFIG, seed=1)
    assert {row.id for row in result.rows if row.method != "seed"}.isdisjoint(row.id for row in undisturbed.rows)


def test_no_id_is_given_twice(undisturbed):
    ids = [row.id for row in undisturbed.rows] + [record.to_row()["id"] for record in undisturbed.rejected]
    assert len(ids) == len(set(ids))


def test_demonstrations_are_six_seeds_and_two_of_the_machine_once_it_has_some(tmp_path):
    pool = CoroutinePool(0)
    config = SynthesizeConfig(num_instructions=30, lookahead=1, capitalize=False)
    result, _, _ = run_method(tmp_path / "log", pool, config)
    prompts = [request.prompt for request in pool.requests if request.prompt.endswith("9.")]
    seeds = {task.instruction for task in SEEDS}
    machine = {instruction.text for instruction, _ in result.instructions}
    numbers = []
    for prompt in prompts:
        shown = [line.partition(". ")[2] for line in prompt.splitlines()[1:-1]]
        numbers.append((sum(text in seeds for text in shown), sum(text in machine for text in shown)))
    assert numbers == [(8, 0)] + [(6, 2)] * (len(prompts) - 1)
    texts = {instruction.id: instruction.text for instruction, _ in result.instructions}
    for row in result.rows:
        assert all(parent in texts for parent in row.parent_ids)
        assert set(row.seed_ids) <= {task.id for task in SEEDS}


def test_equal_prompts_are_different_requests(tmp_path):
    pool = CoroutinePool(0)
    config = SynthesizeConfig(num_instructions=30, num_demonstrations=len(SEEDS), num_machine_demonstrations=0)
    prompts = load_prompts(ROOT / "generation" / "prompts" / "self_instruct", PROMPTS)
    with RequestLog(tmp_path / "log") as log:
        requester = Requester(pool, log, "model", "revision", 0)
        method = SelfInstruct(config, SEEDS[:1], prompts, requester, Result(), 0)
        asyncio.run(method.run())
    texts = [request.prompt for request in pool.requests if request.prompt.endswith("\n2.")]
    assert len(texts) > len(set(texts)) == 1
    assert method.num_kept == 30


def test_any_earlier_instruction_may_be_shown_again(tmp_path):
    config = SynthesizeConfig(num_instructions=60, lookahead=1)
    result, _, _ = run_method(tmp_path / "log", CoroutinePool(0), config)
    order = [instruction.id for instruction, _ in result.instructions]
    distances = [
        position - order.index(parent)
        for position, (instruction, _) in enumerate(result.instructions)
        for parent in instruction.parent_ids
    ]
    assert max(distances) > 30  # not only the latest


def test_kept_instructions_are_all_novel_and_rejects_say_to_what(undisturbed):
    assert undisturbed.reasons() >= {"not_novel", "too_short", "blacklisted_word", "empty_output"}
    for record in undisturbed.rejected:
        if record.rejection.reason == "not_novel":
            assert record.nearest[0].score > CONFIG.max_rouge_l
            assert record.nearest[0].id in record.rejection.detail
    nearest = [neighbor for instruction, _ in undisturbed.instructions for neighbor in instruction.nearest]
    assert nearest and all(neighbor.score <= CONFIG.max_rouge_l for neighbor in nearest)


def test_published_sampling_reaches_the_engines(tmp_path):
    pool = CoroutinePool(0)
    run_method(tmp_path / "log", pool, CONFIG)
    by_end = {"9.": (0.7, 0.5, 2.0, 1024), "classification?": (0.0, 1.0, 0.0, 3), "label:": (0.0, 1.0, 1.5, 300)}
    for request in pool.requests:
        sampling = request.sampling
        end = next((end for end in by_end if request.prompt.endswith(end)), None)
        found = (sampling.temperature, sampling.top_p, sampling.presence_penalty, sampling.max_tokens)
        assert found == by_end.get(end, (0.0, 1.0, 1.5, 350))
        assert sampling.seed is not None


def test_a_response_cut_short_is_dropped_whole_and_giving_up_says_why(tmp_path):
    class Cut(CoroutinePool):
        def finish_reason(self, request: GenerationRequest) -> str:
            return "length"

    result, method, _ = run_method(tmp_path / "log", Cut(0), SynthesizeConfig(max_fruitless_requests=5))
    assert (method.num_kept, method.num_generated, len(result.rejected)) == (0, 0, 5)
    assert result.reasons() == {"truncated_response"}
    assert "5 requests in a row" in method.stopped_because


def test_unanswered_requests_are_rejects_with_their_reason(tmp_path):
    class TooLong(CoroutinePool):
        def finish_reason(self, request: GenerationRequest) -> str:
            return "stop" if request.prompt.endswith("9.") else "prompt_too_long"

    result, _, _ = run_method(tmp_path / "log", TooLong(0), SynthesizeConfig(num_instructions=5))
    unanswered = [record for record in result.rejected if record.rejection.reason == "prompt_too_long"]
    assert [record.stage for record in unanswered] == ["classification"] * 5
    assert {row.method for row in result.rows} == {"seed"}


def test_no_more_requests_than_allowed(tmp_path):
    pool = CoroutinePool(0)
    config = SynthesizeConfig(num_instructions=500, max_requests=3)
    _, method, _ = run_method(tmp_path / "log", pool, config)
    assert sum(request.prompt.endswith("9.") for request in pool.requests) == 3
    assert 0 < method.num_kept < 500
    assert method.stopped_because == "max_requests=3 reached"


def test_at_most_so_many_instances_of_an_instruction(tmp_path):
    config = SynthesizeConfig(num_instructions=20, max_instances=1, include_seed_tasks=False)
    result, _, _ = run_method(tmp_path / "log", CoroutinePool(0), config)
    tasks = [row.task for row in result.rows]
    assert len(tasks) == len(set(tasks)) > 0
    assert "more_than_max_instances" in result.reasons()


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
        (GOOD.replace("[]", '[{"input": ""}]'), r"seeds:1: 'instances'\[0\] needs the text 'output'"),
        (GOOD.replace("Do it.", " "), r"seeds:1: 'instruction' is empty"),
        (f"{GOOD}\n{GOOD}", r"seeds:2: id 'a' is also that of line 1"),
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
        ("{{ instructoin }}", r"uses instructoin, but it gets only instruction"),
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
    prompts = load_prompts(ROOT / "generation" / "prompts" / "self_instruct", PROMPTS)
    assert prompts["instructions"].render(demonstrations=["x"] * 8).endswith("\n8. x\n9.")
    assert prompts["classify"].render(instruction="Do it.").endswith("Task: Do it.\nIs it classification?")
    assert prompts["input_first"].render(instruction="Do it.").endswith("Task: Do it.\n")
    assert prompts["output_first"].render(instruction="Do it.").endswith("Task: Do it.\nClass label:")


def test_a_request_is_the_same_only_if_all_that_decides_it_is(tmp_path):
    prompts = load_prompts(ROOT / "generation" / "prompts" / "self_instruct", PROMPTS)
    sampling = CONFIG.classification_sampling
    pool = CoroutinePool(0)
    prompt = prompts["classify"]

    async def ask_all(log: RequestLog) -> None:
        first, moved = Requester(pool, log, "m", "1", 0), Requester(pool, log, "elsewhere", "1", 0)
        await first.ask("s", prompt, "text", sampling)
        await moved.ask("s", prompt, "text", sampling)  # the same weights in another folder
        for other in (
            first.ask("t", prompt, "text", sampling),
            first.ask("s", prompt, "texts", sampling),
            first.ask("s", replace(prompt, sha="1"), "text", sampling),
            first.ask("s", prompt, "text", CONFIG.input_first_sampling),
            first.ask("s", prompt, "text", sampling, replica=1),
            Requester(pool, log, "m", "2", 0).ask("s", prompt, "text", sampling),
            Requester(pool, log, "m", "1", 1).ask("s", prompt, "text", sampling),
        ):
            await other

    with RequestLog(tmp_path / "log") as log:
        asyncio.run(ask_all(log))
        assert len(log) == len(pool.requests) == 8
