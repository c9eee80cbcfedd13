"""Self-Instruct (Wang et al., 2023): generate instructions from seed tasks, then instances of each instruction.

    8 demonstrations -> one request -> new instructions -> filters -> for each: classification? -> instances -> rows

All three steps share the engines and overlap.
"""

import re
from collections.abc import Coroutine, Iterable, Sequence
from random import Random
from typing import ClassVar, Literal

from cluster.engines.config import Sampling
from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config.common import Role
from generation.config.methods import SelfInstructConfig
from generation.filters.drafts import Draft, Instance, Rejection
from generation.filters.rules import check_instances
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal, rejection_of_piece
from generation.methods.base import GeneratedInstructions, one_line, seed_records
from generation.parsing.chat import TRUNCATED, Dropped
from generation.parsing.labels import parse_input_first, parse_output_first, parse_yes
from generation.records import (
    GenerationResult,
    Record,
    RejectedRecord,
    machine_record,
    user_turn,
    why_unanswered,
)
from generation.seed_tasks import SeedTask

# The released `prepare_for_finetuning.py` draws one of these forms for every instance, also for those of the seeds. So
# a model learns the task rather than one layout of it. The forms differ in their marks and line breaks, as the
# published ones do. {i} is the instruction, {x} the input.
WITH_INPUT = (
    "{i}\nInput: {x}\nOutput:",
    "{i}\n\nInput: {x}\n\nOutput:",
    "Task: {i}\nInput: {x}\nOutput:",
    "{i}\n\n{x}\n\nOutput:",
    "{i}\n\n{x}\n\n",
    "{i}\n{x}\n\n",
    "Task: {i}\n\n{x}\n\n",
)
WITHOUT_INPUT = ("{i} Output:", "{i}\nOutput:", "{i}\n\nOutput:", "{i}\n", "{i}\n\n", "Task: {i}\n\n")
FIELD_LABEL = re.compile(r"(\w+):")


class SelfInstruct(GeneratedInstructions):
    """Three of the four steps of the paper. The driver does the fourth, filtering."""

    NAME = "self_instruct"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "instructions": ("demonstrations", "only_classification"),
        "classify": ("instruction",),
        "input_first": ("instruction",),
        "output_first": ("instruction",),
    }
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion"}

    def __init__(self, config: SelfInstructConfig, inputs: MethodInputs) -> None:
        """Raises InputError if `only_classification_seeds` is set and no seed task is classification."""
        super().__init__(config, inputs)
        self._seeds_to_show = [
            task for task in inputs.seeds if task.is_classification or not config.only_classification_seeds
        ]
        if not self._seeds_to_show:
            raise InputError(
                "synthesize.only_classification_seeds=true, but no seed task has `is_classification`: true."
            )

    def seed_rows(self) -> Sequence[Record]:
        """Rows of the seeds' instances, in the same encodings as the generated ones."""
        if not self._config.include_seed_tasks:
            return ()

        def layout(task: SeedTask, position: int) -> tuple[str, str]:
            draw = self._inputs.draw(task.id, position)
            return self._layout(task.instruction, task.instances[position].input, draw)

        return seed_records(self._inputs.seeds, self._config.seed_license, layout)

    def _layout(self, instruction: str, input_text: str, draw: Random) -> tuple[str, str]:
        """The user's turn, and the input as it stands there."""
        input_text = clean_input(input_text, draw, self._config.clean_input_probability)
        return encode(instruction, input_text, self._config.encoding, draw), input_text

    # -- instructions

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations are some accepted instructions and some seeds, shuffled (§2.2)."""
        config, seeds = self._config, self._seeds_to_show
        draw = self._inputs.draw(number)
        machine = draw.sample(visible, min(config.num_machine_demonstrations, len(visible)))
        human = draw.sample(seeds, min(config.num_demonstrations - len(machine), len(seeds)))
        texts = [one_line(each.instruction) for each in (*machine, *human)]
        draw.shuffle(texts)
        variables = {"demonstrations": texts, "only_classification": config.only_classification_seeds}
        parent_ids, seed_ids = (tuple(sorted(each.id for each in chosen)) for chosen in (machine, human))
        return self._ask_for_instructions(
            number, "instructions", config.instruction_sampling, variables, parent_ids, seed_ids
        )

    def _parse(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        if response.completion.was_cut and self._config.drop_truncated:
            yield Dropped(response.completion.text, TRUNCATED)
            return
        for item in self._parse_list(response, first_number, prompt):
            is_lowered = self._config.capitalize and isinstance(item, Draft)
            yield Draft(item.instruction.capitalize()) if is_lowered else item

    # -- instances

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Ask whether the task is classification, then for instances: label first if it is, else input first."""
        config, text = self._config, accepted.draft.instruction
        answer = await self._ask_about(text, "classify", config.classification_sampling)
        if why := why_unanswered(answer):
            rejected = RejectedRecord("classification", why, answer.request_id, 0, accepted.draft)
            return InstructionResult(rejected=(rejected,), responses=(answer,))
        is_classification = parse_yes(answer.completion.text)
        name = "output_first" if is_classification else "input_first"
        sampling = config.output_first_sampling if is_classification else config.input_first_sampling
        response = await self._ask_about(text, name, sampling)
        with self._inputs.timers.measure("parse"):
            parse = parse_output_first if is_classification else parse_input_first
            parsed = parse(response.completion.text, response.completion.was_cut, text)
            rows, rejected = self._choose(accepted, parsed, response, is_classification)
        return InstructionResult(tuple(rows), tuple(rejected), (answer, response), is_classification)

    async def _ask_about(self, instruction: str, name: str, sampling: Sampling) -> GenerationResult:
        prompt = self._inputs.prompts[name]
        text = prompt.render(instruction=instruction)
        return await self._inputs.requester.ask("writer", name, prompt, text, sampling)

    def _choose(
        self,
        accepted: AcceptedInstruction,
        parsed: list[Instance | Dropped],
        response: GenerationResult,
        is_classification: bool,
    ) -> tuple[list[Record], list[RejectedRecord]]:
        """Turn parsed instances into rows and rejections. At most `max_instances` become rows, drawn at random."""
        config, instruction = self._config, accepted.draft.instruction
        completion = response.completion
        if why := why_unanswered(response):
            draft = Draft(instruction, "", completion.samples[0].reasoning_content)
            return [], [RejectedRecord("instance", why, response.request_id, 0, draft)]
        instances = [each for each in parsed if isinstance(each, Instance)]
        results = check_instances(instances, config.drop_contradictions, is_classification)
        good = [position for position, (_, rejection) in enumerate(results) if rejection is None]
        draw = self._inputs.draw(accepted.id)
        if len(good) > config.max_instances:
            good = draw.sample(good, config.max_instances)
        origin, rows, rejected = self._origin(accepted), [], []
        for position, (instance, rejection) in enumerate(results):
            if position in good:
                user, input_text = self._layout(instruction, instance.input, draw)
                rows.append(machine_record(origin, response, user, instance.output, position, input_text=input_text))
                continue
            why = rejection or Rejection("more_than_max_instances")
            draft = Draft(instruction, instance.input, instance.output)
            rejected.append(RejectedRecord("instance", why, response.request_id, position, draft))
        for position, piece in enumerate((each for each in parsed if isinstance(each, Dropped)), len(results)):
            draft, why = Draft(instruction, "", piece.text), rejection_of_piece(piece, response)
            rejected.append(RejectedRecord("instance", why, response.request_id, position, draft))
        return rows, rejected


def encode(instruction: str, input_text: str, encoding: Literal["plain", "published"], draw: Random) -> str:
    """The user turn. plain: instruction, empty line, input. published: one of the forms above, drawn at random."""
    if encoding == "plain":
        return user_turn(instruction, input_text)
    form = draw.choice(WITH_INPUT if input_text else WITHOUT_INPUT)
    return form.format(i=instruction, x=input_text)


def clean_input(input_text: str, draw: Random, probability: float) -> str:
    """With this probability, remove the only label of an input ("Sentence: ...") and its empty lines.

    The published probability is 0.5, so inputs occur in both forms. Here a label must begin the input. The released
    code takes any word before a colon for a label and loses the text before it ("at 10:30" becomes "30").
    """
    if draw.random() >= probability:
        return input_text
    label = FIELD_LABEL.match(input_text)
    if label and set(FIELD_LABEL.findall(input_text)) == {label[1]}:
        input_text = input_text[label.end() :]
    return input_text.strip().replace("\n\n", "\n")
