"""Evol-Instruct: the operations, the rounds, the four rules of elimination, and what becomes of what fails."""

from collections import Counter
from collections.abc import Callable

import pytest

from cluster.engines.config import GenerationRequest
from generation.config.methods import OPERATIONS, EvolInstructConfig
from generation.filters.drafts import Instance
from generation.seed_tasks import SeedTask
from tests.generation.harness import SEEDS, CoroutinePool, Made, drive, prompt_text

GIVEN = "Name a river."
ONE = [SeedTask("one", "", GIVEN, (Instance("", "Nile"),), False)]
ANSWER = "The Elbe is one that flows north."
# A phrase of each template that no other has.
SIGNS = {
    "add_constraints": "one more constraint",
    "deepen": "in more depth and breadth",
    "concretize": "more specific ones",
    "add_reasoning": "reasoning in several steps",
    "complicate_input": "input data in the form of",
    "breadth": "brand-new",
    "equal": "Equal / Not equal",
}


def kind_of(request: GenerationRequest) -> str:
    """The template that a request was made by."""
    return next((name for name, sign in SIGNS.items() if sign in prompt_text(request)), "answer")


def evolving(request: GenerationRequest) -> str:
    """The instruction that a request asks to rewrite."""
    return prompt_text(request).partition("#Given Prompt#:\n")[2].partition("\n\n#")[0]


def model(
    evolve: Callable[[GenerationRequest], str | tuple[str, str]] = lambda request: f"{evolving(request)} And why?",
    equal: Callable[[GenerationRequest], str | tuple[str, str]] = lambda _: "Not equal",
    answer: Callable[[GenerationRequest], str | tuple[str, str]] = lambda _: ANSWER,
) -> CoroutinePool:
    """A model that does its three jobs as told."""

    def reply(request: GenerationRequest) -> str | tuple[str, str]:
        kind = kind_of(request)
        return equal(request) if kind == "equal" else answer(request) if kind == "answer" else evolve(request)

    return CoroutinePool(answer=reply)


def evolve(folder, pool: CoroutinePool, seeds: list[SeedTask] = ONE, **fields: object) -> Made:
    return drive(folder, pool, EvolInstructConfig(**fields), seeds=seeds)


def kinds(pool: CoroutinePool) -> list[str]:
    return [kind_of(request) for request in pool.requests]


# -- rounds and operations


def test_four_rounds_each_go_on_from_the_one_before(tmp_path):
    pool = model()
    made = evolve(tmp_path, pool)
    texts = [GIVEN + " And why?" * number for number in range(5)]
    assert made.turns() == [(text, ANSWER) for text in texts]
    assert [row["round"] for row in made.rows] == [0, 1, 2, 3, 4]
    ids = [row["id"] for row in made.rows]
    assert [row["parent_ids"] for row in made.rows] == [ids[:number] for number in range(5)]
    assert {tuple(row["seed_ids"]) for row in made.rows} == {("one",)}
    assert [row["task"] for row in made.rows] == [made.instructions[0]["id"]] * 5
    assert Counter(kinds(pool))["equal"] == 4 and made.rejected == []
    judged = [prompt_text(request) for request in pool.requests if kind_of(request) == "equal"]
    assert all(
        f"First: {a}\n" in text and f"Second: {b}\n" in text
        for a, b, text in zip(texts[:-1], texts[1:], judged, strict=True)
    )


def test_operations_are_drawn_with_equal_chance_and_anew_each_round(tmp_path):
    seeds = [SeedTask(f"s{number}", "", f"Name river {number}.", (), False) for number in range(300)]
    pool = model(equal=lambda _: pytest.fail("not to be asked"))
    evolve(tmp_path, pool, seeds, include_originals=False, judge_equality=False)
    counts = Counter(kinds(pool))
    assert counts.pop("answer") == 1200
    assert set(counts) == set(OPERATIONS) and sum(counts.values()) == 1200
    assert all(160 < count < 240 for count in counts.values())  # 200 each, three standard deviations: 39
    deepened = {evolving(request).partition(" And")[0] for request in pool.requests if kind_of(request) == "deepen"}
    assert len(deepened) > 120  # of 300 chains 155 come by it in four draws; were it one draw a chain, 50


def test_another_seed_draws_other_operations(tmp_path):
    drawn = []
    for seed in (0, 0, 1):
        pool = model()
        drive(tmp_path / f"{len(drawn)}", pool, EvolInstructConfig(num_rounds=6), seed=seed, seeds=ONE)
        drawn.append([kind for kind in kinds(pool) if kind in OPERATIONS])
    assert drawn[0] == drawn[1] != drawn[2]


def test_only_the_operations_of_the_recipe_are_drawn(tmp_path):
    pool = model()
    evolve(tmp_path, pool, operations=("breadth",))
    assert set(kinds(pool)) == {"breadth", "equal", "answer"}


FORMAT_MARKS = {
    "XML": "<catalog>",
    "SQL": "GROUP BY",
    "Python": "def collect",
    "HTML": "<ul>",
    "shell": "cd /var",
    "JSON": '{"id":',
}


def test_complicate_input_names_a_data_format_and_shows_an_example_of_it(tmp_path):
    pool = model()
    evolve(tmp_path, pool, SEEDS, operations=("complicate_input",))
    prompts = [prompt_text(request) for request in pool.requests if kind_of(request) == "complicate_input"]
    named = Counter()
    for prompt in prompts:
        (data_format,) = [name for name in FORMAT_MARKS if f"in the form of {name}," in prompt]
        assert [name for name, mark in FORMAT_MARKS.items() if mark in prompt] == [data_format]
        named[data_format] += 1
    assert set(named) == {"XML", "SQL", "Python", "HTML", "shell", "JSON"} and len(prompts) == 40


def test_a_data_format_without_an_example_is_named_alone(tmp_path):
    pool = model()
    evolve(tmp_path, pool, operations=("complicate_input",), data_formats=("TOML",))
    prompt = next(prompt_text(request) for request in pool.requests if kind_of(request) == "complicate_input")
    assert "in the form of TOML," in prompt and "to show the form" not in prompt


def test_published_sampling_and_the_form_of_the_judges_answer_reach_the_engines(tmp_path):
    pool = model()
    evolve(tmp_path, pool)
    for request in pool.requests:
        sampling = request.sampling
        if kind_of(request) == "equal":
            assert sampling.structured.choice == ("Equal", "Not equal") and sampling.temperature == 0
        else:
            assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (1.0, 0.95, 2048)
            assert sampling.structured is None
        assert [message["role"] for message in request.prompt] == ["user"]


def test_original_instructions_need_not_be_in_the_dataset(tmp_path):
    made = evolve(tmp_path, model(), include_originals=False)
    assert [row["round"] for row in made.rows] == [1, 2, 3, 4]
    assert made.rows[0]["parent_ids"] == []


# -- elimination


@pytest.mark.parametrize(
    ("result", "reason", "detail"),
    [
        ("Equal", "equal", ""),
        ("Not equal", None, ""),
        (" Not equal\n", None, ""),
        ("not equal", "not_judged", "not equal"),
        ("Perhaps", "not_judged", "Perhaps"),
        (("", "engine_died"), "not_judged", "engine_died"),
    ],
)
def test_rule_1_what_the_judge_finds_equal_is_eliminated(tmp_path, result, reason, detail):
    pool = model(equal=lambda _: result)
    made = evolve(tmp_path, pool, num_rounds=1)
    assert_eliminated(made, reason, detail, kind="evolution")
    assert kinds(pool).count("answer") == (1 if reason else 2)  # what is eliminated is not answered


def test_unchanged_text_is_equal_without_asking_the_judge(tmp_path):
    pool = model(evolve=lambda _: f"\n{GIVEN} ")
    made = evolve(tmp_path, pool, num_rounds=1)
    assert_eliminated(made, "equal", "unchanged", kind="evolution")
    assert "equal" not in kinds(pool)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("Sorry" + " this word" * 39, "refusal"),  # 79 words
        ("Sorry" + " ".join(f" {number}" for number in range(79)), None),  # 80
        ("I am sorry, I can't.", "refusal"),
        ("The sorrow of rivers.", None),
        ("", "empty_output"),
        (("The Elbe flows", "length"), "truncated_response"),
        (("", "prompt_too_long"), "prompt_too_long"),
    ],
)
def test_rule_2_short_answers_that_are_sorry_eliminate_the_instruction(tmp_path, answer, reason):
    made = evolve(tmp_path, model(answer=answer_of_evolved(answer)), num_rounds=1)
    assert_eliminated(made, reason, kind="answer")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [("...", "only_stopwords"), ("It is what it is!", "only_stopwords"), ("It is Elbe!", None), ("42.", None)],
)
def test_rule_3_answers_of_stop_words_and_punctuation_eliminate_the_instruction(tmp_path, answer, reason):
    made = evolve(tmp_path, model(answer=answer_of_evolved(answer)), num_rounds=1)
    assert_eliminated(made, reason, kind="answer")


@pytest.mark.parametrize(
    ("evolved", "reason"),
    [
        ("Rewrite the Given Prompt about a river.", "format_leakage"),
        ("Name a long river.\n\n#Given Prompt#:\nName a lake.", "format_leakage"),
        ("Name a river, and be prompt: given by its source.", None),
        ("", "empty"),
        (("Name a river that", "length"), "truncated_response"),
        (("", "prompt_too_long"), "prompt_too_long"),
        (("", "engine_died"), "engine_died"),
    ],
)
def test_rule_4_words_of_the_prompt_and_broken_texts_are_eliminated(tmp_path, evolved, reason):
    pool = model(evolve=lambda _: evolved)
    made = evolve(tmp_path, pool, num_rounds=1)
    assert_eliminated(made, reason, kind="evolution")
    assert kinds(pool).count("equal") == (0 if reason else 1)


def answer_of_evolved(answer: str | tuple[str, str]) -> Callable[[GenerationRequest], str | tuple[str, str]]:
    return lambda request: ANSWER if prompt_text(request) == GIVEN else answer


def assert_eliminated(made: Made, reason: str | None, detail: str = "", kind: str = "") -> None:
    """The one evolution was eliminated for this reason, or for None was kept."""
    assert [row["round"] for row in made.rows] == ([0] if reason else [0, 1])
    assert [(row["kind"], row["reason"]) for row in made.rejected] == ([(kind, reason)] if reason else [])
    if detail:
        assert made.rejected[0]["detail"] == detail
    assert all(row["task"] == made.instructions[0]["id"] for row in made.rejected)


# -- back to the pool


def test_a_failed_evolution_goes_back_and_is_tried_again_from_the_same_parent(tmp_path):
    """Rounds 2 and 3 fail, one before its answer and one by it; round 4 goes on from where round 1 had come to."""
    seen: list[str] = []

    def by_round(request: GenerationRequest) -> str:
        seen.append(evolving(request))
        return ["Name a long river.", "Name a long river.", "Name a dry river.", "Name a long, deep river."][
            len(seen) - 1
        ]

    def answer(request: GenerationRequest) -> str:
        return "Sorry, no." if "dry" in prompt_text(request) else ANSWER

    made = evolve(tmp_path, model(evolve=by_round, answer=answer))
    assert seen == [GIVEN, "Name a long river.", "Name a long river.", "Name a long river."]
    assert [user for user, _ in made.turns()] == [GIVEN, "Name a long river.", "Name a long, deep river."]
    assert [row["round"] for row in made.rows] == [0, 1, 4]
    assert made.rows[2]["parent_ids"] == [made.rows[0]["id"], made.rows[1]["id"]]
    assert [row["reason"] for row in made.rejected] == ["equal", "refusal"]


def test_trying_again_is_a_new_request_even_with_the_same_operation(tmp_path):
    pool = model(equal=lambda _: "Equal")
    made = evolve(tmp_path, pool, operations=("deepen",), include_originals=False)
    rewrites = [request for request in pool.requests if kind_of(request) == "deepen"]
    assert len({prompt_text(request) for request in rewrites}) == 1
    assert len({request.sampling.seed for request in rewrites}) == 4
    assert made.rows == [] and len({row["id"] for row in made.rejected}) == 4


def test_a_given_instruction_that_cannot_be_answered_is_evolved_all_the_same(tmp_path):
    made = evolve(tmp_path, model(answer=lambda r: "Sorry." if prompt_text(r) == GIVEN else ANSWER), num_rounds=1)
    assert [(row["round"], row["parent_ids"]) for row in made.rows] == [(1, [])]
    assert [(row["kind"], row["reason"]) for row in made.rejected] == [("answer", "refusal")]


# -- many chains


def test_an_instruction_is_evolved_with_each_of_its_inputs(tmp_path):
    task = SeedTask("two", "", "Sort the words.", (Instance("b a", "a b"), Instance("d c", "c d")), False)
    made = evolve(tmp_path, model(), [task], num_rounds=1)
    users = ["Sort the words.\n\nb a", "Sort the words.\n\nb a And why?", "Sort the words.\n\nd c"]
    assert [user for user, _ in made.turns()] == [*users, users[2] + " And why?"]
    assert len({row["task"] for row in made.rows}) == 2
    assert {tuple(row["seed_ids"]) for row in made.rows} == {("two",)}


def test_ids_are_unique_though_chains_come_to_the_same_text(tmp_path):
    """Equal instructions under two ids, equal inputs under one, and all evolve to one text, kept or rejected."""
    same = (Instance("", ""), Instance("", ""))
    seeds = [SeedTask("a", "", GIVEN, same, False), SeedTask("b", "", GIVEN, same, False)]
    evolved = {GIVEN: "Name a sea.", "Name a sea.": "Name a lake.", "Name a lake.": "the given prompt"}
    made = evolve(tmp_path, model(evolve=lambda request: evolved[evolving(request)]), seeds, num_rounds=3)
    assert [user for user, _ in made.turns()] == [GIVEN, "Name a sea.", "Name a lake."] * 4
    assert len({row["id"] for row in made.rows}) == 12
    assert len({row["id"] for row in made.rejected}) == len(made.rejected) == 4
    assert len({row["id"] for row in made.instructions}) == 4
    ids = {row["id"]: row["task"] for row in made.rows}
    assert all(ids[parent] == row["task"] for row in made.rows for parent in row["parent_ids"])


def test_no_more_instructions_than_allowed(tmp_path):
    made = evolve(tmp_path, model(), SEEDS, max_instructions=3, num_rounds=1)
    assert len(made.instructions) == 3 and made.driver.stopped_because == ""


@pytest.mark.parametrize("timing", [1, 2])
def test_the_order_in_which_answers_come_changes_nothing(tmp_path, timing):
    pools = [model(), model()]
    pools[1]._timing.seed(timing)
    first, second = (evolve(tmp_path / str(n), pool, SEEDS) for n, pool in enumerate(pools))
    assert first.data == second.data and len(first.rows) == 50
