"""The main loop of synthesis: propose, filter, finish, commit.

    proposal r -> drafts -> filters -> kept instructions -> finished in parallel -> rows, in order -> files

Everything that decides the data happens in the order of r, whatever order the answers come in: a proposal may draw only
on what was accepted up to proposal r - max_concurrent_proposals, drafts are filtered in the order of r, and rows are
written in the order of their instructions. So one engine or many, interrupted or not, make the same data as long as the
engines answer the same.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import asdict, dataclass, replace

from generation.accepted import AcceptedList, Demonstration
from generation.config import SynthesisConfig
from generation.filters import Draft, FilterChain
from generation.forecast import Pilot
from generation.judge import Judge
from generation.method import AcceptedInstruction, InstructionResult, Method, Proposal
from generation.records import GenerationResult, Record, RejectedRecord, draft_of
from generation.requester import BudgetReached
from generation.sink import DataSink
from generation.state import Counts, LoopState, Timers, from_json, to_json

MAX_OPEN = 20_000  # kept instructions whose rows are not yet committed; bounds memory, and slack behind a slow one


@dataclass(frozen=True, slots=True)
class _Finishing:
    """A kept instruction whose rows are being made."""

    kept: AcceptedInstruction
    task: asyncio.Task[InstructionResult | BudgetReached]


# What goes from judging to the files, in order: of each proposal the request that wrote it, what became of its drafts,
# and where judging stood after it. None: there is no more.
_Admitted = GenerationResult | RejectedRecord | _Finishing | LoopState | None


class Driver:
    """One run of a method to its end."""

    def __init__(
        self, method: Method, config: SynthesisConfig, sink: DataSink, judge: Judge | None, timers: Timers
    ) -> None:
        self.stopped_because = ""  # empty: the method reached its goal
        self.spent_budget: str | None = None  # the limit that stopped it, if it was one
        self.state = LoopState()  # ahead of what is committed
        self.committed = Counts()
        self.num_unfinished = 0  # kept instructions that a spent budget left without rows
        self.pilot = Pilot(config.pilot_rows)
        self._method = method
        self._config = config
        self._sink = sink
        self._judge = judge
        self._timers = timers
        self._kept = AcceptedList(config.max_concurrent_proposals)
        self._instruction_filters = FilterChain(config.instruction_filters)
        self._row_filters = FilterChain(config.row_filters)
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._tasks: set[asyncio.Task] = set()
        self._admitted: asyncio.Queue[_Admitted] = asyncio.Queue()
        self._last_checkpoint = time.monotonic()

    async def run(self, checkpoint: dict | None) -> None:
        """Make the dataset, from the beginning or from the state of a checkpoint.

        Returns when there is enough, when no more can be had, or when a budget is spent; `stopped_because` tells.
        """
        for seed_id, draft in self._method.remembered():
            self._instruction_filters.remember(seed_id, draft)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif not all(self._commit_row(record) for record in self._method.seed_rows()):
            return
        self._end_step(self.state)
        async with asyncio.TaskGroup() as group:
            growing = group.create_task(self._grow(group))
            await self._commit()
            growing.cancel()  # more than the budget has room for may be under way
            for task in self._tasks:
                task.cancel()

    def _restore(self, checkpoint: dict) -> None:
        """Take up where a checkpoint left off: the counts, and the filters' memory from the committed columns."""
        self.state, self.committed = from_json(checkpoint)
        kept = list(self._sink.iter_columns("instructions", ["id", "instruction", "input"]))
        self._kept.restore(kept, self.state.num_proposals, self.state.num_accepted_after)
        for batch in kept:
            columns = batch.to_pydict()
            self._instruction_filters.remember_many(columns["id"], columns["instruction"], columns["input"])
        if self._config.row_filters:
            for batch in self._sink.iter_columns("synthesized", ["id", "messages"]):
                turns = [[message["content"] for message in row[-2:]] for row in batch["messages"].to_pylist()]
                users, assistants = zip(*turns, strict=True) if turns else ((), ())
                self._row_filters.remember_many(batch["id"].to_pylist(), users, None, assistants)

    # -- propose and filter

    async def _grow(self, group: asyncio.TaskGroup) -> None:
        """Begin proposals, several at a time, and admit them in order."""
        under_way: deque[asyncio.Task[Proposal | BudgetReached]] = deque()
        num_begun = self.state.num_proposals
        last = math.inf if self._method.max_proposals is None else self._method.max_proposals
        while not self._has_enough() and not self.spent_budget:
            while len(under_way) < self._num_wanted() and num_begun < last:
                work = self._method.propose(num_begun, self._kept.visible_to(num_begun))
                under_way.append(self._start(group, work))
                num_begun += 1
            if not under_way:
                self._stop(self._method.exhausted)
                break
            proposal = await under_way.popleft()
            if isinstance(proposal, BudgetReached):
                self._spent(proposal)
                break
            await self._admit(group, proposal)
            is_searching = self._method.num_wanted is not None  # else the proposals are given, and end by themselves
            if is_searching and self.state.num_empty >= self._config.max_empty_requests:
                self._stop(f"{self.state.num_empty} requests in a row brought nothing new")
                break
        if self.spent_budget and under_way:
            await asyncio.wait(under_way)  # they cannot be admitted, but what is paid for goes into the log
        for task in under_way:
            task.cancel()
        self._admitted.put_nowait(None)

    def _has_enough(self) -> bool:
        return self._method.num_wanted is not None and self.state.num_accepted >= self._method.num_wanted

    def _num_wanted(self) -> int:
        """Proposals to have under way: `max_concurrent_proposals`, fewer when fewer will do at the yield so far."""
        if self._method.num_wanted is None:
            return self._config.max_concurrent_proposals
        num_missing = self._method.num_wanted - self.state.num_accepted
        if self.state.num_accepted:
            num_missing = math.ceil(num_missing * self.state.num_proposals / self.state.num_accepted)
        return min(self._config.max_concurrent_proposals, num_missing)

    async def _admit(self, group: asyncio.TaskGroup, proposal: Proposal) -> None:
        """Judge the drafts of the next proposal in order, and begin to finish those that are kept."""
        state = self.state = self.state.copy()
        if proposal.response:
            self._admitted.put_nowait(proposal.response)
        num_accepted_before = state.num_accepted
        for position, item in enumerate(proposal.items):
            if self._has_enough():
                break
            judged = self._filter_draft(proposal, position, item) if isinstance(item, Draft) else item
            if isinstance(judged, AcceptedInstruction):
                await self._room.acquire()
                judged = _Finishing(judged, self._start(group, self._finish(judged)))
            self._admitted.put_nowait(judged)
        state.num_proposals += 1
        state.num_empty = 0 if state.num_accepted > num_accepted_before else state.num_empty + 1
        state.num_accepted_after = self._kept.end_proposal()
        self._admitted.put_nowait(state)

    def _filter_draft(self, proposal: Proposal, position: int, draft: Draft) -> AcceptedInstruction | RejectedRecord:
        with self._timers.measure("filter"):
            decision = self._instruction_filters.decide(draft)
            if decision.rejection:
                source = proposal.response.request_id if proposal.response else proposal.id_prefix
                return RejectedRecord("instruction", decision.rejection, source, position, draft, decision.nearest)
            kept = AcceptedInstruction(f"{proposal.id_prefix}-{position}", draft, position, proposal, decision.nearest)
            self._instruction_filters.remember(kept.id, draft)
        self._kept.append(Demonstration(kept.id, draft.instruction))
        self.state.num_accepted += 1
        return kept

    # -- finish

    def _start(self, group: asyncio.TaskGroup, work: Coroutine) -> asyncio.Task:
        """Run `work`. A spent budget is a result and no failure: what others are doing must go on."""

        async def guarded() -> object:
            try:
                return await work
            except BudgetReached as reached:
                return reached

        task = group.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step, it would never be awaited
        return task

    async def _finish(self, kept: AcceptedInstruction) -> InstructionResult:
        outcome = await self._method.finish(kept)
        return await self._judge.score(outcome) if self._judge else outcome

    def _stop(self, why: str) -> None:
        self.stopped_because = self.stopped_because or why

    def _spent(self, reached: BudgetReached) -> None:
        """A budget cut something off that would have been in the data: the reason, however far ahead judging is."""
        self.stopped_because, self.spent_budget = str(reached), reached.name

    # -- commit

    async def _commit(self) -> None:
        """Hand results to the files in order, whichever is ready first, until all are or the rows are enough."""
        while (item := await self._admitted.get()) is not None:
            match item:
                case GenerationResult():
                    self.committed.add((item,))
                case RejectedRecord():
                    self.committed.num_generated += item.stage == "instruction"
                    with self._timers.measure("write"):
                        self._sink.add_rejected(item)
                case _Finishing():
                    self.committed.num_generated += 1
                    if not await self._commit_outcome(item.kept, item.task):
                        return
                case LoopState():
                    self._end_step(item)
                    self._maybe_checkpoint(item)

    async def _commit_outcome(
        self, kept: AcceptedInstruction, task: asyncio.Task[InstructionResult | BudgetReached]
    ) -> bool:
        """Returns False once the dataset has all the rows that the budget allows."""
        outcome = await task
        self._room.release()
        if isinstance(outcome, BudgetReached):
            self._spent(outcome)
            self.num_unfinished += 1
            return True
        self.committed.add(outcome.responses)
        with self._timers.measure("write"):
            self._sink.add_instruction(instruction_row(kept, outcome))
            for rejected in outcome.rejected:
                self._sink.add_rejected(replace(rejected, task=kept.id))
        return all(self._commit_row(record, kept.id) for record in outcome.rows)

    def _commit_row(self, record: Record, kept_id: str = "") -> bool:
        """Filter and write a row of a kept instruction or of a seed. Returns False once the budget allows no more."""
        if self._config.row_filters:
            draft = draft_of(record)
            with self._timers.measure("filter"):
                decision = self._row_filters.decide(draft)
                if decision.rejection is None:
                    self._row_filters.remember(record.id, draft)
            if decision.rejection:
                nearest = decision.nearest
                rejected = RejectedRecord("row", decision.rejection, record.id, 0, draft, nearest, kept_id)
                self._sink.add_rejected(rejected)
                return True
        with self._timers.measure("write"):
            self._sink.add_row(record)
        limit = self._config.budget.max_rows
        if limit is not None and self._sink.num_rows >= limit:
            self._spent(BudgetReached("max_rows", limit))
            return False
        return True

    def _end_step(self, state: LoopState) -> None:
        """All of a proposal is committed: one more measurement for the forecast."""
        tokens = self.committed.num_completion_tokens
        self.pilot.add(state.num_proposals, self._sink.num_instructions, self._sink.num_rows, tokens)

    def _maybe_checkpoint(self, state: LoopState) -> None:
        """Save progress now and then, between proposals, as long as nothing before was left unfinished."""
        is_due = time.monotonic() - self._last_checkpoint >= self._config.checkpoint_seconds
        if is_due and not self.num_unfinished:
            with self._timers.measure("write"):
                self._sink.checkpoint(to_json(state, self.committed))
            self._last_checkpoint = time.monotonic()


def instruction_row(kept: AcceptedInstruction, outcome: InstructionResult) -> dict:
    """A kept instruction as a row of `data/instructions`."""
    response = kept.proposal.response
    return {
        "id": kept.id,
        "instruction": kept.draft.instruction,
        "input": kept.draft.input,
        "is_classification": outcome.is_classification,
        "request_id": response.request_id if response else None,
        "round": 0,
        "parent_ids": list(kept.proposal.parent_ids),
        "seed_ids": list(kept.proposal.seed_ids),
        "nearest": [asdict(neighbor) for neighbor in kept.nearest],
    }
