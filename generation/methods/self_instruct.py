"""Self-Instruct (Wang et al., 2023): grow instructions from seed tasks, then write instances of each.

    request r -> new instructions -> for each that is kept: classification? -> instances -> rows

All three steps share the engines and overlap.
"""

from collections.abc import Coroutine, Sequence
from random import Random
from typing import ClassVar

from cluster.engines.config import Sampling
from cluster.errors import InputError
from generation.accepted import Demonstration
from generation.config import Role, SelfInstructConfig
from generation.filters import Draft, Instance, Rejection, check_instances
from generation.method import AcceptedInstruction, InstructionResult, MethodInputs, Proposal
from generation.methods.encodings import clean_input, encode
from generation.methods.parsing import parse_input_first, parse_instructions, parse_output_first, parse_yes
from generation.methods.seeds import one_line, seed_drafts, seed_records
from generation.records import GenerationResult, Origin, Record, RejectedRecord, machine_record
from generation.requester import UNANSWERED
from generation.seed_tasks import SeedTask


class SelfInstruct:
    """The four stages; the fourth, filtering, is shared with the driver's filters."""

    NAME = "self_instruct"
    PROMPTS: ClassVar[dict[str, tuple[str, ...]]] = {
        "instructions": ("demonstrations", "only_classification"),
        "classify": ("instruction",),
        "input_first": ("instruction",),
        "output_first": ("instruction",),
    }
    FORMS: ClassVar[dict[Role, str]] = {"writer": "completion"}

    def __init__(self, config: SelfInstructConfig, inputs: MethodInputs) -> None:
        """Raises InputError if only classification is to be shown, and no seed task is that."""
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"
        self._config = config
        self._inputs = inputs
        seeds = [task for task in inputs.seeds if task.is_classification or not config.only_classification_seeds]
        self._seeds_to_show: list[SeedTask] = seeds
        if not seeds:
            raise InputError(
                "synthesize.only_classification_seeds=true, but none of the seed tasks has `is_classification`: true."
            )

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return seed_drafts(self._inputs.seeds)

    def seed_rows(self) -> Sequence[Record]:
        """The seeds' own instances, laid out as the machine's are."""
        if not self._config.include_seed_tasks:
            return ()

        def layout(task: SeedTask, position: int) -> str:
            draw = self._inputs.draw(task.id, position)
            return self._layout(task.instruction, task.instances[position].input, draw)

        return seed_records(self._inputs.seeds, self._config.seed_license, layout)

    def _layout(self, instruction: str, given: str, draw: Random) -> str:
        given = clean_input(given, draw, self._config.clean_input_probability)
        return encode(instruction, given, self._config.encoding, draw)

    # -- instructions

    def propose(self, number: int, visible: Sequence[Demonstration]) -> Coroutine[None, None, Proposal]:
        """Demonstrations: some of the machine's, the rest human, shuffled (§2.2)."""
        config = self._config
        draw = self._inputs.draw(number)
        machine = draw.sample(visible, min(config.num_machine_demonstrations, len(visible)))
        human = draw.sample(
            self._seeds_to_show, min(config.num_demonstrations - len(machine), len(self._seeds_to_show))
        )
        texts = [each.instruction for each in machine] + [task.instruction for task in human]
        draw.shuffle(texts)
        parents, seeds = sorted(each.id for each in machine), sorted(task.id for task in human)
        return self._propose(number, texts, tuple(parents), tuple(seeds))

    async def _propose(
        self, number: int, demonstrations: list[str], parent_ids: tuple[str, ...], seed_ids: tuple[str, ...]
    ) -> Proposal:
        prompt, sampling = self._inputs.prompts["instructions"], self._config.instruction_sampling
        text = prompt.render(
            demonstrations=[one_line(text) for text in demonstrations],
            only_classification=self._config.only_classification_seeds,
        )
        response = await self._inputs.requester.ask("writer", "instructions", prompt, text, sampling, replica=number)
        prefix = f"{self.NAME}-{response.request_id[:16]}"
        items = self._items(response, first_number=len(demonstrations) + 1)
        return Proposal(prefix, items, response, parent_ids, seed_ids)

    def _items(self, response: GenerationResult, first_number: int) -> tuple[Draft | RejectedRecord, ...]:
        """A response cut short is dropped whole: its last instruction is broken, and the engine may have run wild."""
        completion = response.completion
        was_cut = completion.finish_reason == "length"
        if completion.finish_reason in UNANSWERED or (was_cut and self._config.drop_truncated):
            why = Rejection("truncated_response" if was_cut else completion.finish_reason)
            return (RejectedRecord("response", why, response.request_id, 0, Draft("", "", completion.text)),)
        with self._inputs.timers.measure("parse"):
            texts = parse_instructions(completion.text, first_number, self._config.capitalize)
        return tuple(Draft(text) for text in (texts[:-1] if was_cut else texts))

    # -- instances

    async def finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        """Ask whether the task is classification, then for instances in the order that suits it."""
        config, text = self._config, accepted.draft.instruction
        answer = await self._ask_about(text, "classify", config.classification_sampling)
        if answer.completion.finish_reason in UNANSWERED:
            why = Rejection(answer.completion.finish_reason)
            rejected = RejectedRecord("classification", why, answer.request_id, 0, accepted.draft)
            return InstructionResult(rejected=(rejected,), responses=(answer,))
        is_classification = parse_yes(answer.completion.text)
        name = "output_first" if is_classification else "input_first"
        sampling = config.output_first_sampling if is_classification else config.input_first_sampling
        response = await self._ask_about(text, name, sampling)
        with self._inputs.timers.measure("parse"):
            parse = parse_output_first if is_classification else parse_input_first
            parsed = parse(response.completion.text, response.completion.finish_reason == "length")
            rows, rejected = self._choose(accepted, parsed, response)
        return InstructionResult(tuple(rows), tuple(rejected), (answer, response), is_classification)

    async def _ask_about(self, instruction: str, name: str, sampling: Sampling) -> GenerationResult:
        prompt = self._inputs.prompts[name]
        text = prompt.render(instruction=instruction)
        return await self._inputs.requester.ask("writer", name, prompt, text, sampling)

    def _choose(
        self, accepted: AcceptedInstruction, parsed: list[Instance], response: GenerationResult
    ) -> tuple[list[Record], list[RejectedRecord]]:
        """Turn parsed instances into rows and rejects: the filters, and at most `max_instances` drawn at random."""
        config, instruction = self._config, accepted.draft.instruction
        completion = response.completion
        if completion.finish_reason in UNANSWERED or not parsed:
            was_cut = completion.finish_reason == "length"
            unanswered = completion.finish_reason if completion.finish_reason in UNANSWERED else "no_instance"
            why = Rejection("truncated_instance" if was_cut else unanswered)
            draft = Draft(instruction, "", completion.text)
            return [], [RejectedRecord("instance", why, response.request_id, 0, draft)]
        results = check_instances(parsed, config.drop_contradictions)
        good = [position for position, (_, rejection) in enumerate(results) if rejection is None]
        draw = self._inputs.draw(accepted.id)
        if len(good) > config.max_instances:
            good = draw.sample(good, config.max_instances)
        origin = Origin(
            self.NAME, accepted.id, 0, accepted.proposal.parent_ids, accepted.proposal.seed_ids, config.license
        )
        rows, rejected = [], []
        for position, (instance, rejection) in enumerate(results):
            if position in good:
                user = self._layout(instruction, instance.input, draw)
                rows.append(machine_record(origin, response, user, instance.output, position))
                continue
            why = rejection or Rejection("more_than_max_instances")
            draft = Draft(instruction, instance.input, instance.output)
            rejected.append(RejectedRecord("instance", why, response.request_id, position, draft))
        return rows, rejected
