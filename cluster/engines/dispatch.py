"""Which request goes to which engine.

Requests wait in groups and leave in chunks of one group, so that an engine computes a shared beginning once. Groups
take turns by chunks, so none waits for another to end, and each keeps its own order. A chunk goes to the engine with
the fewest requests for its window. Requests that were in flight when an engine died go first, in small company.
"""

import asyncio
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field

import ray

from cluster.engines.config import Completion, EngineConfig, GenerationRequest
from cluster.engines.pool_stats import EngineStats, PoolStats
from cluster.engines.supervision import Pulse

SHARE_AFTER_DEATH = 8  # each death cuts the company a request may travel in by this factor, until it is alone


@dataclass(slots=True, eq=False)
class Pending:
    """A request on its way, and the caller that waits for it."""

    request: GenerationRequest
    answer: asyncio.Future[Completion]
    since: float  # monotonic seconds: in the queue, or on its engine
    seconds_queued: float = 0.0
    num_deaths: int = 0


@dataclass(slots=True, eq=False)
class Engine:
    """An engine that is up."""

    actor: "ray.actor.ActorHandle"
    pulse: Pulse
    stats: EngineStats
    window: int  # requests it may hold by its speed
    capacity: int  # requests it may hold, given which it holds
    in_flight: dict[int, Pending] = field(default_factory=dict)
    num_finished: int = 0
    node_id: str = ""  # Ray's, known once it is up

    def room(self, company: int) -> int:
        """How many more requests it takes if one among them may share it with `company - 1` others."""
        return min(company, self.capacity, self.window) - len(self.in_flight)

    @property
    def load(self) -> float:
        return len(self.in_flight) / self.window


class GroupedQueue:
    """Requests that wait, first in first out within a group; groups take turns."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, deque[Pending]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self):
        return (pending for group in self._groups.values() for pending in group)

    def append(self, pending: Pending) -> None:
        group = pending.request.group
        if group not in self._groups:
            self._groups[group] = deque()
        self._groups[group].append(pending)
        self._num_waiting += 1

    def take(self, num_wanted: int) -> list[Pending]:
        """Up to so many requests: of the group whose turn it is, and of the next ones once it has no more."""
        taken: list[Pending] = []
        while self._groups and len(taken) < num_wanted:
            name, group = next(iter(self._groups.items()))
            while group and len(taken) < num_wanted:
                self._num_waiting -= 1
                pending = group.popleft()
                if not pending.answer.done():  # else its caller gave up
                    taken.append(pending)
            if group:
                self._groups.move_to_end(name)
            else:
                del self._groups[name]
        return taken


class Dispatcher:
    """The queue and the engines that are up."""

    def __init__(self, config: EngineConfig, stats: PoolStats) -> None:
        self.engines: list[Engine] = []
        self._config = config
        self._stats = stats
        self._queue = GroupedQueue()
        self._suspects: deque[Pending] = deque()  # in flight when an engine died
        self._next_key = 0
        self._is_due = False

    def add(self, pending: Pending) -> None:
        self._queue.append(pending)
        self.plan()

    def give_back(self, pendings: list[Pending]) -> None:
        """Put requests of a dead engine in front of the queue."""
        self._suspects.extendleft(reversed(pendings))

    def unanswered(self) -> list[Pending]:
        """All requests that wait, here or on an engine that is up."""
        on_engines = (pending for engine in self.engines for pending in engine.in_flight.values())
        return [*self._suspects, *self._queue, *on_engines]

    def plan(self) -> None:
        """Dispatch at the end of this turn of the event loop, so that requests made together travel together."""
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def restore_capacity(self, engine: Engine) -> None:
        """Let an engine hold more again once those that need small company have left it."""
        if engine.capacity < self._config.max_in_flight:
            companies = (self._company(pending) for pending in engine.in_flight.values())
            engine.capacity = min(companies, default=self._config.max_in_flight)

    def _dispatch(self) -> None:
        self._is_due = False
        draining = self._send_suspects()
        while len(self._queue):
            free = [engine for engine in self.engines if engine is not draining and engine.room(engine.window) > 0]
            if not free:
                break
            engine = min(free, key=lambda engine: engine.load)
            fair_share = -(-len(self._queue) // len(free))
            chunk = self._queue.take(min(self._config.chunk_size, engine.room(engine.window), fair_share))
            self._send(engine, chunk)
        self._count_in_flight()

    def _send_suspects(self) -> Engine | None:
        """Send what can go of the suspects; returns the engine that must run emptier for the next one, if any."""
        while self._suspects:
            pending = self._suspects[0]
            engine = min(self.engines, key=lambda engine: engine.load, default=None)
            company = self._company(pending)
            if pending.answer.done():
                self._suspects.popleft()
            elif engine is None or engine.room(company) <= 0:
                return engine
            else:
                engine.capacity = min(engine.capacity, company)
                self._send(engine, [self._suspects.popleft()])
        return None

    def _send(self, engine: Engine, pendings: list[Pending]) -> None:
        if not engine.in_flight:
            engine.pulse.note_work()
        now = time.monotonic()
        chunk = []
        for pending in pendings:
            self._next_key += 1
            engine.in_flight[self._next_key] = pending
            pending.seconds_queued += now - pending.since
            pending.since = now
            chunk.append((self._next_key, pending.request))
        if chunk:
            engine.actor.submit.remote(chunk)

    def _company(self, pending: Pending) -> int:
        """How many requests may be on an engine together with this one, itself included.

        A request that was in flight when an engine died may be the cause. Its company shrinks with each death, so
        that the next one points at fewer, and its last chance is alone: only then is a death surely its doing.
        """
        if pending.num_deaths >= self._config.max_request_deaths - 1:
            return 1
        return max(1, self._config.max_in_flight // SHARE_AFTER_DEATH**pending.num_deaths)

    def _count_in_flight(self) -> None:
        in_flight = [len(engine.in_flight) for engine in self.engines]
        self._stats.num_engines = len(in_flight)
        self._stats.num_in_flight = sum(in_flight)
        self._stats.max_in_flight = max(self._stats.max_in_flight, *in_flight, 0)
