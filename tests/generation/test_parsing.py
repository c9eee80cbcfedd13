"""What models write is read in whatever style it is written, and nothing of it is lost."""

import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.filters.drafts import Draft, Instance
from generation.parsing.chat import REFUSAL, TRUNCATED, Dropped, is_refusal, unframe
from generation.parsing.labels import parse_input_first, parse_output_first, parse_tasks
from generation.parsing.lists import parse_list

OPENERS = (
    *("", "Sure! Here are ten more tasks:\n\n", "Certainly, here's the rest of the list:\n\n", "Of course!\n\n"),
    *("Here are some more:\n", "Below are eight additional tasks.\n\n", "### Tasks\n\n", "**Tasks**\n\n---\n\n"),
)
CLOSERS = (
    *("", "\n\nI hope this helps!", "\n\nLet me know if you'd like more.", "\n\n---\nFeel free to ask for others."),
    *("\nHope these are useful!", "\n\nWould you like me to add some?"),
)
NUMBERED: dict[str, Callable[[int, str], str]] = {
    "1.": lambda n, item: f"{n}. {item}",
    "1)": lambda n, item: f"{n}) {item}",
    "(1)": lambda n, item: f"({n}) {item}",
    "[1]": lambda n, item: f"[{n}] {item}",
    "1:": lambda n, item: f"{n}: {item}",
    "1、": lambda n, item: f"{n}、{item}",
    "1 -": lambda n, item: f"{n} - {item}",
    "1\\\\.": lambda n, item: f"{n}\\\\. {item}",
    "> 1.": lambda n, item: f"> {n}. {item}",
    "①": lambda n, item: f"{'①②③④⑤⑥⑦⑧⑨⑩⑪⑫⑬⑭⑮⑯⑰⑱⑲⑳'[n - 1]} {item}",
    "**1.**": lambda n, item: f"**{n}.** {item}",
    "**1. item**": lambda n, item: f"**{n}. {item}**",
    "1. **item**": lambda n, item: f"{n}. **{item}**",
    '1. "item"': lambda n, item: f'{n}. "{item}"',
    "#1": lambda n, item: f"#{n} {item}",
    "#1:": lambda n, item: f"#{n}: {item}",
    "### 1.": lambda n, item: f"### {n}. {item}",
    "Task 1:": lambda n, item: f"Task {n}: {item}",
    "**Task 1:**": lambda n, item: f"**Task {n}:** {item}",
    "**Task 1**": lambda n, item: f"**Task {n}**\n{item}",
    "### Task 1": lambda n, item: f"### Task {n}\n{item}",
    "Instruction 1 -": lambda n, item: f"Instruction {n} - {item}",
    "1. Instruction:": lambda n, item: f"{n}. Instruction: {item}",
    " 1.": lambda n, item: f"  {n}. {item}",
    "1.\\n": lambda n, item: f"{n}.\n{item}",
}
BULLETS: dict[str, Callable[[int, str], str]] = {
    **{mark: lambda _, item, mark=mark: f"{mark} {item}" for mark in ("-", "*", "•", "+", "–", "●")},
    "1. 1. 1.": lambda _, item: f"1. {item}",
    "Instruction:": lambda _, item: f"Instruction: {item}",
    "Request:": lambda _, item: f"Request: {item}",
    "- [ ]": lambda _, item: f"- [ ] {item}",
}
STYLES = NUMBERED | BULLETS
WORDS = st.lists(st.sampled_from("amber basil candle dune ember fjord 3.5 16 2016. x-ray NASA's".split()), min_size=2)  # noqa: SIM905
SENTENCE = WORDS.map(lambda words: f"Sort {' '.join(words)}.")
NESTED = st.tuples(
    SENTENCE, st.lists(SENTENCE.map(str.lower), min_size=2, max_size=5), st.sampled_from(("1", "-", " -"))
)
ITEM = st.one_of(SENTENCE, NESTED.map(lambda parts: with_list(*parts)))


def with_list(sentence: str, items: list[str], mark: str) -> str:
    marked = (f"{number}. {item}" if mark == "1" else f"{mark} {item}" for number, item in enumerate(items, 1))
    return "\n".join((f"{sentence[:-1]}:", *marked))


def flat(text: str) -> str:
    return " ".join(text.split())


def kept(parsed: list) -> list:
    return [each for each in parsed if not isinstance(each, Dropped)]


def letters(*texts: str) -> str:
    """All letters of texts, in order. Marks have none but those of their labels."""
    return "".join(
        re.findall(r"[^\W\d_]", re.sub(r"\b(task|instruction|input|output|example)\b", "", " ".join(texts), flags=re.I))
    )


# -- lists


@settings(deadline=None, max_examples=40)
@given(
    items=st.lists(ITEM, min_size=2, max_size=12),
    style=st.sampled_from(sorted(NUMBERED)),
    separator=st.sampled_from(("\n", "\n\n")),
    first=st.sampled_from((1, 4, 9)),
    opener=st.sampled_from(OPENERS),
    closer=st.sampled_from(CLOSERS),
    is_continued=st.booleans(),
)
def test_a_numbered_list_gives_its_items_back(items, style, separator, first, opener, closer, is_continued):
    if "\n" in "".join(items):
        style = "1."  # an item that is a list has the marks outside
    text = opener + separator.join(STYLES[style](number, item) for number, item in enumerate(items, first)) + closer
    parsed = parse_list(text, 9, is_continued=is_continued)
    assert kept(parsed) == [flat(item) for item in items]
    assert letters(*(each.text if isinstance(each, Dropped) else each for each in parsed)) == letters(text)


@settings(deadline=None, max_examples=40)
@given(
    items=st.lists(ITEM, min_size=1, max_size=8),
    separator=st.sampled_from(("\n", "\n\n")),
    closer=st.sampled_from(CLOSERS),
    is_continued=st.booleans(),
)
def test_a_list_that_goes_on_without_its_first_number_does_too(items, separator, closer, is_continued):
    numbered = separator.join(f"{number}. {item}" for number, item in enumerate(items, 9))
    parsed = parse_list(f" {numbered.removeprefix('9. ')}{closer}", 9, is_continued=is_continued or len(items) == 1)
    assert kept(parsed) == [flat(item) for item in items]


@settings(deadline=None, max_examples=40)
@given(
    items=st.lists(SENTENCE, min_size=2, max_size=8),
    style=st.sampled_from(sorted(BULLETS)),
    separator=st.sampled_from(("\n", "\n\n")),
    opener=st.sampled_from(OPENERS),
    closer=st.sampled_from(CLOSERS),
)
def test_a_list_without_numbers_does_too(items, style, separator, opener, closer):
    text = opener + separator.join(BULLETS[style](0, item) for item in items) + closer
    assert kept(parse_list(text, 9)) == items


@settings(deadline=None, max_examples=40)
@given(st.text(alphabet="ab1.)-*#: \n", max_size=80), st.booleans(), st.booleans())
def test_no_letter_of_a_list_is_lost(text, was_cut, is_continued):
    parsed = parse_list(text, 9, was_cut, is_continued)
    assert letters(*(each.text if isinstance(each, Dropped) else each for each in parsed)) == letters(text)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        (" Weigh it:\n3.5 kg\n10. Say when: 10:30", ["Weigh it: 3.5 kg", "Say when: 10:30"]),
        (" Say it in November 2016.\n10. And in 2020. Why?", ["Say it in November 2016.", "And in 2020. Why?"]),
        (" 给出三个建议。\n10、解释天空。\n11．写信。", ["给出三个建议。", "解释天空。", "写信。"]),
        (" Name one.\n10. Name two.\n12. Name four.", ["Name one.", "Name two.", "Name four."]),
        ("1. Name one.\n\n### Music\n2. Name two.\n**Art**\n3. Name three.", ["Name one.", "Name two.", "Name three."]),
        ("9. Name one.\n10. Name two.\n\nHere are more:\n\n1. Name three.", ["Name one.", "Name two.", "Name three."]),
        ("```\n1. Name one.\n2. Name two.\n```\nThat is all.", ["Name one.", "Name two."]),
        ("Sure!\n```text\n- Name one.\n- Name two.\n```", ["Name one.", "Name two."]),
        (" Mend it:\n```python\n1. x = 2\n```\n10. Next.", ["Mend it:\n```python\n1. x = 2\n```", "Next."]),
        (" Read this.\n\nIt is short.\n10. Next one.", ["Read this. It is short.", "Next one."]),
        ("1. **Music**: Name one.\n2. **Name two.**", ["Music: Name one.", "Name two."]),
        ("- Order:\n  1. a\n  2. b\n- Next.", ["Order: 1. a 2. b", "Next."]),
        (" Name one.\n10. Name two.\n\nThat was the list. It was long.", ["Name one.", "Name two."]),
        (" Name one.\n10. Name two.\n11.", ["Name one.", "Name two.", ""]),
        ("", [""]),
        ("Sure! I'd be happy to help.", []),
    ],
)
def test_what_is_an_item_and_what_is_not(text, items):
    assert kept(parse_list(text, 9)) == items


def test_a_list_inside_an_item_may_have_the_numbers_of_the_list():
    text = "1. Name one.\n2. Order:\n1. a\n2. b\n3. c\n4. d\n3. Name three.\n4. Name four."
    assert parse_list(text, 9) == ["Name one.", "Order: 1. a 2. b 3. c 4. d", "Name three.", "Name four."]


def test_text_before_a_list_is_an_item_only_where_the_list_goes_on():
    text = "Ten ways to be kind\n1. Hold a door.\n2. Say thanks."
    assert kept(parse_list(text, 9)) == [flat(text)]
    assert kept(parse_list(text, 9, is_continued=False)) == ["Hold a door.", "Say thanks."]
    assert kept(parse_list(text, 9, prompt="Ten ways to be kind\n1. Smile.\n9.")) == ["Hold a door.", "Say thanks."]


def test_a_list_after_an_unknown_header_is_a_list_if_its_items_are_sentences():
    items = ["Hold a door.", "Say thanks.", "Call a friend.", "Write a card.", "Plant a tree."]
    text = "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1))
    assert kept(parse_list(f"I have thought of five tasks for you.\n{text}", 9)) == items
    assert kept(parse_list(f" Number these steps:\n{text.lower()}\n10. Next one.", 9))[1:] == ["Next one."]


def test_a_chat_may_write_a_sentence_a_line_without_any_mark():
    text = "Sure! Here they are:\n\nName one.\n\nWhat is two?\nName three!\n\nI hope this helps!"
    assert kept(parse_list(text, 9, is_continued=False)) == ["Name one.", "What is two?", "Name three!"]
    letter = "Mend this:\nDear Bob,\nsee you.\nAnn"
    assert kept(parse_list(letter, 9, is_continued=False)) == [flat(letter)]


def test_the_last_item_of_a_cut_list_is_dropped():
    assert parse_list(" Name one.\n10. Name tw", 9, was_cut=True) == ["Name one.", Dropped("Name tw", TRUNCATED)]
    assert parse_list(" Name", 9, was_cut=True) == [Dropped("Name", TRUNCATED)]


# -- whole tasks

TEXT = st.one_of(SENTENCE, st.tuples(SENTENCE, SENTENCE).map("\n\n### A heading\n".join), st.just("Say: Example 6."))
TASK = st.builds(Draft, SENTENCE, st.one_of(st.just(""), TEXT), TEXT)
LABELS = {
    "1. Input:": "{n}. {name}:{end}",
    "**1. Input:**": "**{n}. {name}:**{end}",
    "1. **Input**:": "{n}. **{name}**:{end}",
    "### 1. Input:": "### {n}. {name}:{end}",
    "1) input：": "{n}) {lower}：{end}",
    "Input 1:": "{name} {n}:{end}",
    "### Input 1": "### {name} {n}\n",
    "Input:": "{name}:{end}",
    "**Input:**": "**{name}:**{end}",
    "### Input:": "### {name}:{end}",
    "### Input": "### {name}\n",
}


def label(style: str, n: int, name: str, end: str) -> str:
    return LABELS[style].format(n=n, name=name, lower=name.lower(), end=end)


@settings(deadline=None, max_examples=40)
@given(
    tasks=st.lists(TASK, min_size=1, max_size=5),
    style=st.sampled_from(sorted(LABELS)),
    end=st.sampled_from((" ", "\n")),
    separator=st.sampled_from(("\n###\n", "\n\n###\n\n", "\n---\n", "\n", "\n\n")),
    none=st.sampled_from(("<noinput>", "N/A", "(none)", "No input required.", "None", "")),
    opener=st.sampled_from(OPENERS),
    closer=st.sampled_from(CLOSERS),
    first=st.sampled_from((1, 4)),
)
def test_tasks_in_any_style_are_given_back(tasks, style, end, separator, none, opener, closer, first):
    written = [
        f"{label(style, n, 'Instruction', ' ')}{task.instruction}\n"
        f"{label(style, n, 'Input', end)}{task.input or none}\n{label(style, n, 'Output', end)}{task.output}"
        for n, task in enumerate(tasks, first)
    ]
    assert kept(parse_tasks(opener + separator.join(written) + closer, 4)) == tasks
    if not opener and first == 4 and style == "1. Input:":
        assert kept(parse_tasks(separator.join(written).removeprefix("4. Instruction:") + closer, 4)) == tasks


def test_tasks_that_share_their_labels_are_malformed_rather_than_one():
    text = " Name a river.\nInput: none\nOutput: The Elbe.\n5. Name a lake.\nInput: none\nOutput: Como."
    assert [each.reason for each in parse_tasks(text, 4)] == ["malformed_task"]
    named = text.replace(" Name a river", "Task 4: Name a river").replace("5. ", "Task 5: ")
    assert [each.instruction for each in parse_tasks(named, 4)] == ["Name a river.", "Name a lake."]


# -- instances

INSTANCE = st.builds(Instance, st.one_of(st.just(""), SENTENCE), TEXT)
LABELLED = st.builds(Instance, SENTENCE, st.sampled_from(("warm", "cold", "It is mild")))


@settings(deadline=None, max_examples=40)
@given(
    instances=st.lists(INSTANCE, min_size=1, max_size=4),
    example=st.sampled_from(
        ("Example {n}\n", "Example {n}:\n", "**Example {n}**\n", "### Example {n}:\n", "Example {n}: ")
    ),
    style=st.sampled_from(("{name}: ", "{name}:\n", "**{name}:** ", "**{name}**: ", "{name}： ", "### {name}\n")),
    separator=st.sampled_from(("\n", "\n\n")),
    opener=st.sampled_from(OPENERS),
    closer=st.sampled_from(CLOSERS),
)
def test_instances_in_any_style_are_given_back(instances, example, style, separator, opener, closer):
    def write(n: int, instance: Instance) -> str:
        given = f"{style.format(name='Input')}{instance.input}\n" if instance.input else ""
        return f"{example.format(n=n)}{given}{style.format(name='Output')}{instance.output}"

    text = opener + separator.join(write(n, instance) for n, instance in enumerate(instances, 1)) + closer
    assert kept(parse_input_first(text)) == instances


@settings(deadline=None, max_examples=40)
@given(
    instances=st.lists(
        st.builds(Instance, SENTENCE, st.sampled_from(("warm", "cold", "It is mild"))), min_size=1, max_size=4
    ),
    style=st.sampled_from(("{name}: ", "**{name}:** ", "### {name}\n")),
    separator=st.sampled_from(("\n", "\n\n")),
    is_label_first=st.booleans(),
    opener=st.sampled_from(("", "Sure! Here are some inputs:\n\n")),
    closer=st.sampled_from(CLOSERS),
)
def test_labels_before_or_after_their_inputs_are_given_back(
    instances, style, separator, is_label_first, opener, closer
):
    def write(instance: Instance) -> str:
        fields = [
            f"{style.format(name='Class label')}{instance.output}",
            f"{style.format(name='Input')}{instance.input}",
        ]
        return "\n".join(fields if is_label_first else reversed(fields))

    assert kept(parse_output_first(opener + separator.join(map(write, instances)) + closer)) == instances


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        (
            "Output: This is an Example of tact. Input: none.",
            [Instance("", "This is an Example of tact. Input: none.")],
        ),
        (
            "Output: Two:\nExample 1: a rose\nExample 2: a sea",
            [Instance("", "Two:\nExample 1: a rose\nExample 2: a sea")],
        ),
        ("Output: My Task: rest.", [Instance("", "My Task: rest.")]),
        (
            "Output: It has\n- Input: keys\n- Output: a screen",
            [Instance("", "It has\n- Input: keys\n- Output: a screen")],
        ),
        ("Input: a Output: b", [Instance("a", "b")]),
        ("Output: a\nOutput: b", [Dropped("Output: a\nOutput: b", "malformed_instance")]),
        ("Input: a", [Dropped("Input: a", "malformed_instance")]),
        ("I cannot.", [Dropped("I cannot.", "no_instance")]),
    ],
)
def test_what_is_an_instance_and_what_is_not(text, parsed):
    assert parse_input_first(text) == parsed


def test_an_output_beside_a_class_label_is_no_part_of_the_input():
    text = " warm\nInput: soup\nOutput: warm\nClass label: cold\nInput: ice\nOutput: hot"
    broken = Dropped("Class label: cold\nInput: ice\nOutput: hot", "malformed_instance")
    assert parse_output_first(text) == [Instance("soup", "warm"), broken]


# -- rewritten instructions

RIVER = "Name a river that flows north, and say in one sentence why it does."


@pytest.mark.parametrize(
    "text",
    [
        RIVER,
        f" {RIVER}\n",
        f'"{RIVER}"',
        f"“{RIVER}”",
        f"**{RIVER}**",
        f"```\n{RIVER}\n```",
        f"Sure! Here is a harder version of it:\n\n{RIVER}\n\nI hope this helps!",
        f"Sure! Here's a more challenging version of the prompt: {RIVER}",
        f'Certainly! Below is the rewritten prompt:\n\n"{RIVER}"\n\nLet me know if you\'d like another.',
        f"Here is a new prompt in the same field:\n---\n{RIVER}\n---\nThis version adds a constraint.",
        f"Of course.\n\n**Rewritten Prompt:**\n{RIVER}",
        f"#Rewritten Prompt#:\n{RIVER}",
        f"#Created Prompt#: {RIVER}",
        f"### New Prompt\n{RIVER}".replace("### New Prompt", "### New Prompt:"),
        f"#Given Prompt#:\nName a river.\n\n#Rewritten Prompt#:\n{RIVER}",
        f"Okay! {RIVER}",
        f"Sure thing! Try this one: {RIVER}",
        f"I've rewritten the prompt to be harder: {RIVER}",
        f"Rewritten: {RIVER}",
        f"New task: {RIVER}",
        f"The rewritten version: {RIVER}\n\n---\n\n**Note:** I added a limit.",
        f"{RIVER}\n\n**Explanation:**\n- It asks for a reason.\n- It sets a limit.",
        f"{RIVER}\n\nThis version adds a reason:\n1. why\n2. how",
        f"I'd be happy to help.\n{RIVER}\nFeel free to ask for more.",
    ],
)
def test_what_a_chat_writes_around_a_rewrite_is_taken_off(text):
    assert unframe(text)[0] == RIVER


@pytest.mark.parametrize(
    "text",
    [
        "Here is a list of numbers: 3, 5, 8. Add them.",
        "Here are two sentences:\nIt rains.\nIt pours.\nJoin them.",
        '"It rains" and "it pours": what is the difference?',
        "Let me know how a tide works.\nUse one example.",
        "Sort this list:\n- pear\n- fig\n\nNote: the shortest comes first.",
        "Explain `x` and `y`",
        "Name new prompt designs, and say what a prompt is.",
        "This is a riddle. Solve it.",
    ],
)
def test_an_instruction_stays_as_it_is(text):
    assert unframe(text) == (text, [])


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't do that.", "I cannot write tasks.", "As an AI language model, I have no tasks."]
)
def test_a_refusal_is_no_instruction(text):
    assert is_refusal(text) and not is_refusal(RIVER)
    assert parse_list(text, 9) == [Dropped(text, REFUSAL)]
    assert parse_list(f"9. {text}", 9) == [text]  # somebody's text in a list


def test_nothing_is_left_of_a_text_that_is_only_chat():
    assert unframe("Sure! I can help you with that.")[0] == ""


LOOPS = ("Here is a new prompt ", "1. a\n", "Example 1\n", "Output: ", "- a\n\n", "**#((")
COUNTING = "".join(f"{number % 400}. a\n" for number in range(1000))


@pytest.mark.parametrize("text", [COUNTING, *(loop * 1000 for loop in LOOPS)], ids=lambda text: text[:9])
def test_a_text_that_goes_round_in_circles_is_read_in_a_moment(text):
    for parse in (unframe, parse_input_first, parse_output_first):
        parse(text)
    parse_tasks(text, 4)
    parse_list(text, 9)
