"""What methods share: those that generate instructions, and those that start from existing instructions."""

import re
from collections.abc import Callable, Iterable, Sequence

from cluster.engines.config import Sampling
from generation.accepted import Demonstration
from generation.config.common import SynthesisConfig
from generation.filters.drafts import Draft
from generation.method import Method, MethodInputs, Proposal, rejection_of_piece
from generation.parsing.chat import Dropped
from generation.parsing.lists import parse_list
from generation.records import GenerationResult, Origin, Record, RejectedRecord, human_record, why_unanswered
from generation.seed_tasks import SeedTask


class GeneratedInstructions(Method):
    """A method whose instructions a model writes, one request a proposal. The filters know the seeds from the start."""

    def __init__(self, config: SynthesisConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.num_wanted = config.num_instructions
        self.max_proposals = config.max_requests
        self.exhausted = f"max_requests={config.max_requests} reached"

    def remembered(self) -> Sequence[tuple[str, Draft]]:
        return [
            (task.id, Draft(task.instruction, task.instances[0].input if task.instances else ""))
            for task in self._inputs.seeds
        ]

    def _parse(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        """The instructions of an answered request, and what is none. `first_number`: of the first item of its list."""
        raise NotImplementedError

    def _parse_list(self, response: GenerationResult, first_number: int, prompt: str) -> Iterable[Draft | Dropped]:
        """The items of a list of instructions that continues `prompt`."""
        completion, is_continued = response.completion, self._inputs.requester.model("writer").form == "completion"
        items = parse_list(completion.text, first_number, completion.was_cut, is_continued, prompt)
        return (Draft(item) if isinstance(item, str) else item for item in items)

    async def _ask_for_instructions(
        self,
        number: int,
        prompt_name: str,
        sampling: Sampling,
        variables: dict,
        parent_ids: tuple[str, ...] = (),
        seed_ids: tuple[str, ...] = (),
    ) -> Proposal:
        """Ask the writer to continue the list of `demonstrations` among the prompt's variables."""
        prompt = self._inputs.prompts[prompt_name]
        text = prompt.render(**variables)
        response = await self._inputs.requester.ask("writer", prompt_name, prompt, text, sampling, replica=number)
        return self._proposal(response, len(variables["demonstrations"]) + 1, text, parent_ids, seed_ids)

    def _proposal(
        self,
        response: GenerationResult,
        first_number: int = 1,
        prompt: str = "",
        parent_ids: tuple[str, ...] = (),
        seed_ids: tuple[str, ...] = (),
    ) -> Proposal:
        items: tuple[Draft | RejectedRecord, ...]
        if why := why_unanswered(response):
            text = response.completion.samples[0].reasoning_content
            items = (RejectedRecord("response", why, response.request_id, 0, Draft("", "", text)),)
        else:
            with self._inputs.timers.measure("parse"):
                parsed = self._parse(response, first_number, prompt)
                items = tuple(
                    _rejected(item, response, position) if isinstance(item, Dropped) else item
                    for position, item in enumerate(parsed)
                )
        return Proposal(f"{self.NAME}-{response.request_id[:16]}", items, response, parent_ids, seed_ids)


class ExistingInstructions(Method):
    """A method whose instructions are the seeds, one seed a proposal, in their order."""

    def __init__(self, config: SynthesisConfig, inputs: MethodInputs) -> None:
        super().__init__(config, inputs)
        self.num_wanted = None
        self.max_proposals = min(len(inputs.seeds), config.max_instructions or len(inputs.seeds))
        self.exhausted = ""

    async def propose(self, number: int, visible: Sequence[Demonstration]) -> Proposal:
        """Ask no model. The items are the instruction with each of its inputs."""
        task = self._inputs.seeds[number]
        return Proposal(task.id, tuple(self._drafts(task)) or (Draft(task.instruction),), seed_ids=(task.id,))

    def _drafts(self, task: SeedTask) -> Iterable[Draft]:
        return (Draft(task.instruction, instance.input, instance.output or None) for instance in task.instances)


def _rejected(piece: Dropped, response: GenerationResult, position: int = 0) -> RejectedRecord:
    why = rejection_of_piece(piece, response)
    return RejectedRecord("response", why, response.request_id, position, Draft("", "", piece.text))


def one_line(instruction: str) -> str:
    """An instruction as a prompt shows it: on one line, and without a colon at its end.

    So `encode_prompt` of Self-Instruct's and of Alpaca's released code has it.
    """
    return re.sub(r"\s+", " ", instruction).strip().rstrip(":")


def seed_records(
    seeds: Sequence[SeedTask],
    license_name: str | None,
    layout: Callable[[SeedTask, int], tuple[str, str]] | None = None,
) -> list[Record]:
    """Rows of the seeds' instances whose output is known.

    `layout` makes the user's turn of a task's instance, and returns the input as it stands there too.
    """
    return [
        human_record(
            Origin("seed", task.id, seed_ids=(task.id,), license=license_name),
            task.instruction,
            instance,
            position,
            *(layout(task, position) if layout else ()),
        )
        for task in seeds
        for position, instance in enumerate(task.instances)
        if instance.output
    ]
