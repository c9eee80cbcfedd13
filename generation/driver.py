"""The main loop of synthesis: propose, filter, finish, commit.

    proposal n -> drafts -> filters -> accepted instructions -> finished in parallel -> rows, in order -> files

Everything that decides the data happens in the order of n, whatever order the answers come in: proposal n may draw
only on what was accepted up to proposal n - max_concurrent_proposals, drafts are filtered in the order of n, and rows
are written in the order of their instructions. So one engine or many, interrupted or not, make the same data as long as
the engines answer the same.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Coroutine, Iterable
from dataclasses import asdict, dataclass, replace

from generation.accepted import AcceptedList, Demonstration
from generation.config.common import SynthesisConfig
from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Rejection
from generation.judge import Judge
from generation.method import AcceptedInstruction, InstructionResult, Method, Proposal
from generation.records import GenerationResult, Record, RejectedRecord, draft_of, instruction_and_output
from generation.requester import BudgetReached
from generation.sink import DataSink
from generation.state import Counts, LoopState, Snapshot, Timers, from_json, to_json

MAX_PENDING = 20_000  # accepted instructions whose rows are not committed; bounds memory while the oldest is slow


@dataclass(frozen=True, slots=True)
class _Pending:
    """An accepted instruction whose rows are being made."""

    accepted: AcceptedInstruction
    task: asyncio.Task[InstructionResult | BudgetReached]


# What the proposing side hands to the committing side, in order. For each proposal: the response that it was parsed
# from, its rejected drafts and accepted instructions, and the state of the loop after it. None ends the queue.
_CommitItem = GenerationResult | RejectedRecord | _Pending | LoopState | None


class Driver:
    """Runs a method to its end."""

    def __init__(
        self, method: Method, config: SynthesisConfig, sink: DataSink, judge: Judge | None, timers: Timers
    ) -> None:
        self.stopped_because = ""  # empty means that the method reached its goal
        self.spent_budget: str | None = None  # the limit that stopped the run, as the recipe names it
        self.state = LoopState()  # after the last filtered proposal, ahead of what is committed
        self.committed = Counts()
        self.num_committed_proposals = 0
        self.num_unfinished = 0  # accepted instructions without rows, because a budget was spent
        self._method = method
        self._config = config
        self._sink = sink
        self._judge = judge
        self._timers = timers
        self._accepted = AcceptedList(config.max_concurrent_proposals)
        self._instruction_filters = FilterChain(config.instruction_filters)
        self._row_filters = FilterChain(config.row_filters)
        self._tasks: set[asyncio.Task] = set()
        self._pending_slots = asyncio.Semaphore(MAX_PENDING)
        self._commit_queue: asyncio.Queue[_CommitItem] = asyncio.Queue()
        self._start = self._last_checkpoint = time.monotonic()

    async def run(self, checkpoint: dict | None) -> None:
        """Make the dataset, from the beginning or from the state of a checkpoint.

        Returns when the method has enough instructions or no more proposals, or when a budget is spent;
        `stopped_because` holds the reason.
        """
        for seed_id, draft in self._method.remembered():
            self._instruction_filters.remember(seed_id, draft)
        if checkpoint is not None:
            self._restore(checkpoint)
        elif not self._commit_rows(self._method.seed_rows()):
            return
        async with asyncio.TaskGroup() as group:
            proposing = group.create_task(self._propose_and_filter(group))
            await self._commit()
            proposing.cancel()  # if max_rows is reached, later proposals are still in flight
            for task in self._tasks:
                task.cancel()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            time.monotonic() - self._start,
            self.state.num_accepted,
            self.num_committed_proposals,
            self._sink.num_instructions,
            self._sink.num_rows,
            self.committed.num_completion_tokens,
            self._sink.rejected,
        )

    def _restore(self, checkpoint: dict) -> None:
        """Continue from a checkpoint: the counts are in it, and the filters read the committed columns."""
        self.state, self.committed = from_json(checkpoint)
        self.num_committed_proposals = self.state.num_proposals
        accepted: list[Demonstration] = []
        for batch in self._sink.iter_columns("instructions", ["id", "instruction", "input"]):
            ids, instructions, inputs = batch.to_pydict().values()
            accepted += map(Demonstration, ids, instructions)
            self._instruction_filters.remember_many(ids, instructions, inputs)
        self._accepted.restore(accepted, self.state.num_proposals, self.state.num_accepted_after)
        if self._config.row_filters:
            for batch in self._sink.iter_columns("synthesized", ["id", "messages", "input"]):
                ids, messages, inputs = batch.to_pydict().values()
                texts = list(map(instruction_and_output, messages, inputs))
                instructions, outputs = zip(*texts, strict=True) if texts else ((), ())
                self._row_filters.remember_many(ids, instructions, inputs, outputs)

    # -- propose and filter

    async def _propose_and_filter(self, group: asyncio.TaskGroup) -> None:
        """Keep several proposals in flight, and filter them in order."""
        in_flight: deque[asyncio.Task[Proposal | BudgetReached]] = deque()
        num_started = self.state.num_proposals
        max_proposals = math.inf if self._method.max_proposals is None else self._method.max_proposals
        while not self._has_enough() and not self.spent_budget:
            while len(in_flight) < self._num_concurrent() and num_started < max_proposals:
                work = self._method.propose(num_started, self._accepted.visible_to(num_started))
                in_flight.append(self._start_task(group, work))
                num_started += 1
            if not in_flight:
                self._record_reason(self._method.exhausted)
                break
            proposal = await in_flight.popleft()
            if isinstance(proposal, BudgetReached):
                self._stop_for_budget(proposal)
                break
            await self._filter(group, proposal)
            has_goal = self._method.num_wanted is not None  # otherwise the instructions are given, and run out
            if has_goal and self.state.num_empty >= self._config.max_empty_requests:
                self._record_reason(f"no instruction of the last {self.state.num_empty} requests was accepted")
                break
        if self.spent_budget and in_flight:
            await asyncio.wait(in_flight)  # their tokens are spent, so their answers go into the log
        for task in in_flight:
            task.cancel()
        self._commit_queue.put_nowait(None)

    def _has_enough(self) -> bool:
        return self._method.num_wanted is not None and self.state.num_accepted >= self._method.num_wanted

    def _num_concurrent(self) -> int:
        """Proposals to have in flight: `max_concurrent_proposals`.

        Fewer if the acceptance rate so far predicts that fewer are enough.
        """
        if self._method.num_wanted is None:
            return self._config.max_concurrent_proposals
        num_missing = self._method.num_wanted - self.state.num_accepted
        if self.state.num_accepted:
            num_missing = math.ceil(num_missing * self.state.num_proposals / self.state.num_accepted)
        return min(self._config.max_concurrent_proposals, num_missing)

    async def _filter(self, group: asyncio.TaskGroup, proposal: Proposal) -> None:
        """Filter the drafts of the next proposal in order, and start to finish those that are accepted."""
        if proposal.response:
            self._commit_queue.put_nowait(proposal.response)
        num_accepted_before = self.state.num_accepted
        for position, item in enumerate(proposal.items):
            result = self._filter_draft(proposal, position, item) if isinstance(item, Draft) else item
            if isinstance(result, AcceptedInstruction):
                self.state = replace(self.state, num_accepted=self.state.num_accepted + 1)
                await self._pending_slots.acquire()
                pending = _Pending(result, self._start_task(group, self._finish(result)))
                self._commit_queue.put_nowait(pending)
            else:
                self._commit_queue.put_nowait(result)
        accepted_any = self.state.num_accepted > num_accepted_before
        self.state = replace(
            self.state,
            num_proposals=self.state.num_proposals + 1,
            num_empty=0 if accepted_any else self.state.num_empty + 1,
            num_accepted_after=self._accepted.end_proposal(),
        )
        self._commit_queue.put_nowait(self.state)

    def _filter_draft(self, proposal: Proposal, position: int, draft: Draft) -> AcceptedInstruction | RejectedRecord:
        source = proposal.response.request_id if proposal.response else proposal.id_prefix
        if self._has_enough():
            return RejectedRecord("instruction", Rejection("more_than_num_instructions"), source, position, draft)
        with self._timers.measure("filter"):
            decision = self._instruction_filters.decide(draft)
            if decision.rejection:
                return RejectedRecord("instruction", decision.rejection, source, position, draft, decision.nearest)
            accepted_id = f"{proposal.id_prefix}-{position}"
            self._instruction_filters.remember(accepted_id, draft)
        self._accepted.append(Demonstration(accepted_id, draft.instruction))
        return AcceptedInstruction(accepted_id, draft, position, proposal, decision.nearest)

    # -- finish

    async def _finish(self, accepted: AcceptedInstruction) -> InstructionResult:
        result = await self._method.finish(accepted)
        return await self._judge.score(result) if self._judge else result

    def _start_task(self, group: asyncio.TaskGroup, work: Coroutine) -> asyncio.Task:
        """Start `work`. BudgetReached is returned and not raised: an error would cancel all tasks of the group."""

        async def guarded() -> object:
            try:
                return await work
            except BudgetReached as reached:
                return reached

        task = group.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: work.close())  # if the task is cancelled before its first step
        return task

    def _record_reason(self, reason: str) -> None:
        self.stopped_because = self.stopped_because or reason

    def _stop_for_budget(self, reached: BudgetReached) -> None:
        """A spent budget replaces an earlier reason, because it limits what is committed."""
        self.stopped_because, self.spent_budget = str(reached), reached.name

    # -- commit

    async def _commit(self) -> None:
        """Write results in order, whichever is ready first, until the queue ends or max_rows is reached."""
        while (item := await self._commit_queue.get()) is not None:
            match item:
                case GenerationResult():
                    self.committed.add((item,))
                case RejectedRecord():
                    self.committed.num_generated += item.kind == "instruction"
                    with self._timers.measure("write"):
                        self._sink.add_rejected(item)
                case _Pending():
                    self.committed.num_generated += 1
                    if not self._commit_result(item.accepted, await item.task):
                        return
                case LoopState():
                    self.num_committed_proposals = item.num_proposals
                    self._maybe_checkpoint(item)

    def _commit_result(self, accepted: AcceptedInstruction, result: InstructionResult | BudgetReached) -> bool:
        """Write what came of an accepted instruction. Returns False if max_rows is reached."""
        self._pending_slots.release()
        if isinstance(result, BudgetReached):
            self._stop_for_budget(result)
            self.num_unfinished += 1
            return True
        self.committed.add(result.responses)
        with self._timers.measure("write"):
            self._sink.add_instruction(instruction_row(accepted, result))
            for rejected in result.rejected:
                self._sink.add_rejected(replace(rejected, task=accepted.id))
        return self._commit_rows(result.rows, accepted.id)

    def _commit_rows(self, records: Iterable[Record], accepted_id: str = "") -> bool:
        """Filter and write the rows of an accepted instruction, or of the seeds if `accepted_id` is empty.

        Returns False if max_rows is reached.
        """
        limit = self._config.budget.max_rows
        for record in records:
            if self._config.row_filters and not self._filter_row(record, accepted_id):
                continue
            with self._timers.measure("write"):
                self._sink.add_row(record)
            if limit is not None and self._sink.num_rows >= limit:
                self._stop_for_budget(BudgetReached("max_rows", limit))
                return False
        return True

    def _filter_row(self, record: Record, accepted_id: str) -> bool:
        """True if the row passes the row filters. Otherwise it is written to the rejected rows."""
        draft = draft_of(record)
        with self._timers.measure("filter"):
            decision = self._row_filters.decide(draft)
            if decision.rejection is None:
                self._row_filters.remember(record.id, draft)
                return True
        nearest = decision.nearest
        self._sink.add_rejected(
            RejectedRecord("row", decision.rejection, record.id, 0, draft, nearest, task=accepted_id)
        )
        return False

    def _maybe_checkpoint(self, state: LoopState) -> None:
        """Save a checkpoint every `checkpoint_seconds`, between proposals, unless something before is unfinished."""
        is_due = time.monotonic() - self._last_checkpoint >= self._config.checkpoint_seconds
        if is_due and not self.num_unfinished:
            with self._timers.measure("write"):
                self._sink.checkpoint(to_json(state, self.committed))
            self._last_checkpoint = time.monotonic()


def instruction_row(accepted: AcceptedInstruction, result: InstructionResult) -> dict:
    """An accepted instruction as a row of `data/instructions`."""
    response = accepted.proposal.response
    return {
        "id": accepted.id,
        "instruction": accepted.draft.instruction,
        "input": accepted.draft.input,
        "is_classification": result.is_classification,
        "request_id": response.request_id if response else None,
        "round": 0,  # an accepted instruction is not evolved yet; only rows have later rounds
        "parent_ids": list(accepted.proposal.parent_ids),
        "seed_ids": list(accepted.proposal.seed_ids),
        "nearest": [asdict(neighbor) for neighbor in accepted.nearest],
    }
