"""Self-Instruct (Wang et al., 2023): grow instructions from seed tasks, then write instances of each.

    request r -> new instructions -> for each that is kept: classification? -> instances -> rows

All three steps share the engines and overlap. Yet the data does not depend on timing: instructions are admitted in the
order of r, the demonstrations of a request are drawn when an earlier one is admitted and from what is kept by then,
and rows leave in the order of their instructions. So one engine or many, interrupted or not, make the same data as
long as the engines answer the same.
"""

import asyncio
import math
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Protocol

from cluster.engine_config import Completion, Sampling
from generation.config import SynthesizeConfig
from generation.filters import Instance, InstructionRules, Rejection, check_instances
from generation.methods.parsing import parse_input_first, parse_instructions, parse_output_first, parse_yes
from generation.novelty import Neighbor, NoveltyIndex
from generation.records import Origin, Production, Record, RejectedRecord, human_record, machine_record
from generation.requester import UNANSWERED, Requester
from generation.seed_tasks import SeedTask
from generation.templates import Prompt

METHOD = "self_instruct"
PROMPTS = {
    "instructions": ("demonstrations",),
    "classify": ("instruction",),
    "input_first": ("instruction",),
    "output_first": ("instruction",),
}


@dataclass(frozen=True, slots=True)
class Candidates:
    """What one request for instructions brought."""

    made_by: Production
    parent_ids: tuple[str, ...]
    seed_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction of the machine that was kept."""

    id: str
    text: str
    request_id: str
    parent_ids: tuple[str, ...]
    seed_ids: tuple[str, ...]
    nearest: tuple[Neighbor, ...]


@dataclass(frozen=True, slots=True)
class Instances:
    """What became of one instruction."""

    instruction: Instruction
    is_classification: bool | None  # none: the question was not answered
    made_by: tuple[Production, ...]
    rows: list[Record] = field(default_factory=list)
    rejected: list[RejectedRecord] = field(default_factory=list)


class Sink(Protocol):
    """Where the results go, in their final order."""

    def add_row(self, record: Record) -> None: ...
    def add_rejected(self, record: RejectedRecord) -> None: ...
    def add_instruction(self, instances: Instances) -> None: ...


class SelfInstruct:
    """One run of the method.

    `num_kept` and `num_generated` count instructions of the machine; requests and tokens are counted where their result
    is committed, so that requests in flight at the end, which no one needs, do not make two equal runs differ.
    """

    def __init__(
        self,
        config: SynthesizeConfig,
        seeds: list[SeedTask],
        prompts: dict[str, Prompt],
        requester: Requester,
        sink: Sink,
        seed: int,
    ) -> None:
        self.num_kept = 0
        self.num_generated = 0
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.stopped_because = ""
        self._config = config
        self._seeds = seeds
        self._prompts = prompts
        self._requester = requester
        self._sink = sink
        self._seed = seed
        self._rules = InstructionRules(config.min_instruction_words, config.max_instruction_words, config.blacklist)
        self._kept: list[Instruction] = []
        self._novelty = NoveltyIndex()
        for task in seeds:
            self._novelty.add(task.id, task.instruction)

    async def run(self) -> None:
        """Make the dataset. Returns when enough instructions are kept, or when no more can be had."""
        if self._config.include_seed_tasks:
            for task in self._seeds:
                origin = Origin("seed", task.id, seed_ids=(task.id,), license=self._config.seed_license)
                for position, instance in enumerate(task.instances):
                    self._sink.add_row(human_record(origin, task.instruction, instance, position))
        finished: asyncio.Queue[RejectedRecord | asyncio.Task[Instances] | None] = asyncio.Queue()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._commit(finished))
            await self._grow(group, finished)
            finished.put_nowait(None)

    # -- instructions

    async def _grow(self, group: asyncio.TaskGroup, finished: asyncio.Queue) -> None:
        """Ask for instructions, several requests at a time, and admit them in order."""
        in_flight: deque[asyncio.Task[Candidates]] = deque()
        num_asked = num_admitted = num_fruitless = 0
        max_requests = self._config.max_requests or math.inf
        while self.num_kept < self._config.num_instructions:
            while len(in_flight) < self._num_wanted(num_admitted) and num_asked < max_requests:
                in_flight.append(group.create_task(self._propose(*self._draw(num_asked), num_asked)))
                num_asked += 1
            if not in_flight:
                self.stopped_because = f"max_requests={self._config.max_requests} reached"
                break
            num_kept_before = self.num_kept
            for outcome in self._admit(await in_flight.popleft()):
                if isinstance(outcome, RejectedRecord):
                    finished.put_nowait(outcome)
                else:
                    finished.put_nowait(group.create_task(self._write_instances(outcome)))
            num_admitted += 1
            num_fruitless = 0 if self.num_kept > num_kept_before else num_fruitless + 1
            if num_fruitless >= self._config.max_fruitless_requests:
                self.stopped_because = f"{num_fruitless} requests in a row brought nothing new"
                break
        for task in in_flight:
            task.cancel()

    def _num_wanted(self, num_admitted: int) -> int:
        """Requests to have in flight: `lookahead`, fewer when fewer will do at the yield so far."""
        num_missing = self._config.num_instructions - self.num_kept
        if self.num_kept:
            num_missing = math.ceil(num_missing * num_admitted / self.num_kept)
        return min(self._config.lookahead, num_missing)

    def _draw(self, number: int) -> tuple[list[Instruction], list[SeedTask], list[str]]:
        """Demonstrations of a request: some of the machine's, the rest human, shuffled (§2.2).

        To be called before any waiting: what is kept at this moment decides the draw.
        """
        draw = random.Random(f"{self._seed}:{number}")
        machine = draw.sample(self._kept, min(self._config.num_machine_demonstrations, len(self._kept)))
        num_human = min(self._config.num_demonstrations - len(machine), len(self._seeds))
        human = draw.sample(self._seeds, num_human)
        texts = [instruction.text for instruction in machine] + [task.instruction for task in human]
        draw.shuffle(texts)
        return machine, human, texts

    async def _propose(
        self, machine: list[Instruction], human: list[SeedTask], demonstrations: list[str], number: int
    ) -> Candidates:
        prompt = self._prompts["instructions"]
        text = prompt.render(demonstrations=demonstrations)
        sampling = self._config.instruction_sampling
        made_by = await self._requester.ask("instructions", prompt, text, sampling, replica=number)
        parent_ids = tuple(sorted(instruction.id for instruction in machine))
        return Candidates(made_by, parent_ids, tuple(sorted(task.id for task in human)))

    def _admit(self, candidates: Candidates) -> list[Instruction | RejectedRecord]:
        """Keep what is well-formed and new, in order, until enough is kept. A response cut short is dropped whole."""
        completion, request_id = candidates.made_by.completion, candidates.made_by.request_id
        self._count(candidates.made_by)
        if completion.finish_reason in (*UNANSWERED, "length"):
            rejection = Rejection(_reason(completion, cut="truncated_response"))
            return [RejectedRecord("response", rejection, request_id, 0, completion.text)]
        outcomes: list[Instruction | RejectedRecord] = []
        for position, text in enumerate(parse_instructions(completion.text, self._config.capitalize)):
            if self.num_kept == self._config.num_instructions:
                break
            self.num_generated += 1
            rejection, nearest = self._judge(text)
            if rejection:
                outcomes.append(RejectedRecord("instruction", rejection, request_id, position, text, nearest=nearest))
                continue
            instruction_id = f"{METHOD}-{request_id[:16]}-{position}"
            instruction = Instruction(
                instruction_id, text, request_id, candidates.parent_ids, candidates.seed_ids, nearest
            )
            self._kept.append(instruction)
            self._novelty.add(instruction_id, text)
            self.num_kept += 1
            outcomes.append(instruction)
        return outcomes

    def _judge(self, text: str) -> tuple[Rejection | None, tuple[Neighbor, ...]]:
        if rejection := self._rules.check(text):
            return rejection, ()
        nearest = tuple(self._novelty.nearest(text, self._config.num_nearest))
        if nearest and nearest[0].score > self._config.max_rouge_l:
            return Rejection("not_novel", f"ROUGE-L {nearest[0].score:.3f} to {nearest[0].id}"), nearest
        return None, nearest

    # -- instances

    async def _write_instances(self, instruction: Instruction) -> Instances:
        """Ask whether the task is classification, then for instances in the order that suits it."""
        answer = await self._ask_about(instruction, "classify", self._config.classification_sampling)
        if answer.completion.finish_reason in UNANSWERED:
            rejection = Rejection(answer.completion.finish_reason)
            rejected = RejectedRecord("classification", rejection, answer.request_id, 0, instruction.text)
            return Instances(instruction, None, (answer,), rejected=[rejected])
        is_classification = parse_yes(answer.completion.text)
        name = "output_first" if is_classification else "input_first"
        sampling = self._config.output_first_sampling if is_classification else self._config.input_first_sampling
        made_by = await self._ask_about(instruction, name, sampling)
        parse = parse_output_first if is_classification else parse_input_first
        parsed = parse(made_by.completion.text, made_by.completion.finish_reason == "length")
        result = Instances(instruction, is_classification, (answer, made_by))
        self._choose(parsed, made_by, result)
        return result

    async def _ask_about(self, instruction: Instruction, name: str, sampling: Sampling) -> Production:
        prompt = self._prompts[name]
        return await self._requester.ask(name, prompt, prompt.render(instruction=instruction.text), sampling)

    def _choose(self, parsed: list[Instance], made_by: Production, result: Instances) -> None:
        """Turn parsed instances into rows and rejects: the filters, and at most `max_instances` drawn at random."""
        instruction, completion = result.instruction, made_by.completion
        if completion.finish_reason in UNANSWERED or not parsed:
            rejection = Rejection(_reason(completion, cut="truncated_instance", otherwise="no_instance"))
            instance = Instance("", completion.text)
            result.rejected.append(
                RejectedRecord("instance", rejection, made_by.request_id, 0, instruction.text, instance)
            )
            return
        verdicts = check_instances(parsed)
        good = [position for position, (_, rejection) in enumerate(verdicts) if rejection is None]
        if len(good) > self._config.max_instances:
            draw = random.Random(f"{self._seed}:{instruction.id}")
            good = draw.sample(good, self._config.max_instances)
        origin = Origin(METHOD, instruction.id, 0, instruction.parent_ids, instruction.seed_ids, self._config.license)
        for position, (instance, rejection) in enumerate(verdicts):
            if position in good:
                result.rows.append(machine_record(origin, made_by, instruction.text, instance, position))
                continue
            rejection = rejection or Rejection("more_than_max_instances")
            result.rejected.append(
                RejectedRecord("instance", rejection, made_by.request_id, position, instruction.text, instance)
            )

    async def _commit(self, finished: asyncio.Queue) -> None:
        """Hand results to the sink in the order of their instructions, whichever is ready first."""
        while (outcome := await finished.get()) is not None:
            if isinstance(outcome, RejectedRecord):
                self._sink.add_rejected(outcome)
                continue
            instances: Instances = await outcome
            self._count(*instances.made_by)
            self._sink.add_instruction(instances)
            for record in instances.rows:
                self._sink.add_row(record)
            for rejected in instances.rejected:
                self._sink.add_rejected(rejected)

    def _count(self, *made_by: Production) -> None:
        self.num_requests += len(made_by)
        self.num_prompt_tokens += sum(each.completion.num_prompt_tokens for each in made_by)
        self.num_completion_tokens += sum(each.completion.num_completion_tokens for each in made_by)


def _reason(completion: Completion, cut: str, otherwise: str = "") -> str:
    if completion.finish_reason == "length":
        return cut
    return completion.finish_reason if completion.finish_reason in UNANSWERED else otherwise
