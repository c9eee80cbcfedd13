"""Which request goes to which engine.

Requests wait in groups and leave in chunks of one group, so that an engine computes the text that they begin with once.
Groups take turns by chunks, so no group waits for another to end, and each keeps its order. A chunk goes to the engine
with the lowest load. Requests that were on an engine when it died go first, together with few others.
"""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import ray

from cluster.engines.config import Completion, EngineConfig, GenerationRequest
from cluster.engines.health import EngineHealth
from cluster.engines.pool_stats import EngineStats, PoolStats

CONCURRENCY_DIVISOR = 8  # each death divides by it how many requests may run beside a request


@dataclass(slots=True, eq=False)
class PendingRequest:
    """A request without an answer, and the caller that waits for it."""

    request: GenerationRequest
    future: asyncio.Future[Completion]
    since: float  # monotonic seconds: when it came into the queue, or to its engine
    seconds_queued: float = 0.0
    num_deaths: int = 0  # of engines that had it


@dataclass(slots=True, eq=False)
class Engine:
    """An engine that is up."""

    actor: "ray.actor.ActorHandle"
    health: EngineHealth
    stats: EngineStats
    max_in_flight: int  # requests that it may hold; a slow engine holds fewer
    max_concurrency: int  # the lowest `Dispatcher.max_concurrency` of the requests that it holds
    in_flight: dict[int, PendingRequest] = field(default_factory=dict)
    num_finished: int = 0
    node_id: str = ""  # Ray's; empty until the engine is up

    def free_slots(self, max_concurrency: float = math.inf) -> int:
        """How many more requests it may hold, if it may hold at most `max_concurrency`."""
        return min(max_concurrency, self.max_concurrency, self.max_in_flight) - len(self.in_flight)

    @property
    def load(self) -> float:
        return len(self.in_flight) / self.max_in_flight


class GroupedQueue:
    """Requests that wait: first in, first out within a group, and the groups take turns."""

    def __init__(self) -> None:
        self._groups: OrderedDict[str, deque[PendingRequest]] = OrderedDict()
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[PendingRequest]:
        return (pending for group in self._groups.values() for pending in group)

    def append(self, pending: PendingRequest) -> None:
        self._groups.setdefault(pending.request.group, deque()).append(pending)
        self._num_waiting += 1

    def take(self, max_requests: int) -> list[PendingRequest]:
        """Up to `max_requests` requests: of the group whose turn it is, then of the next groups if it has too few."""
        taken: list[PendingRequest] = []
        while self._groups and len(taken) < max_requests:
            name, group = next(iter(self._groups.items()))
            while group and len(taken) < max_requests:
                self._num_waiting -= 1
                pending = group.popleft()
                if not pending.future.done():  # else its caller does not wait any more
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
        self._retry_queue: deque[PendingRequest] = deque()  # requests of dead engines
        self._next_key = 0
        self._is_scheduled = False

    def add(self, pending: PendingRequest) -> None:
        self._queue.append(pending)
        self.schedule()

    def retry(self, requests: list[PendingRequest]) -> None:
        """Put requests of a dead engine in front of all others."""
        self._retry_queue.extendleft(reversed(requests))

    def unfinished(self) -> list[PendingRequest]:
        """All requests without an answer, in a queue or on an engine that is up."""
        on_engines = (pending for engine in self.engines for pending in engine.in_flight.values())
        return [*self._retry_queue, *self._queue, *on_engines]

    def schedule(self) -> None:
        """Dispatch at the end of this turn of the event loop, so that requests made together are sent together."""
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def max_concurrency(self, pending: PendingRequest) -> int:
        """How many requests may be on an engine together with this one, itself included.

        A request that was on an engine when it died may be the cause. Each death divides the number, so that the next
        death points at fewer requests. The last attempt is alone: only then is a death surely caused by the request.
        """
        if pending.num_deaths >= self._config.max_request_deaths - 1:
            return 1
        return max(1, self._config.max_in_flight // CONCURRENCY_DIVISOR**pending.num_deaths)

    def restore_concurrency(self, engine: Engine) -> None:
        """Let an engine hold more requests again once the suspected ones have left it."""
        if engine.max_concurrency < self._config.max_in_flight:
            limits = (self.max_concurrency(pending) for pending in engine.in_flight.values())
            engine.max_concurrency = min(limits, default=self._config.max_in_flight)

    def _dispatch(self) -> None:
        self._is_scheduled = False
        draining = self._dispatch_retries()
        while len(self._queue):
            free = [engine for engine in self.engines if engine is not draining and engine.free_slots() > 0]
            if not free:
                break
            engine = min(free, key=lambda engine: engine.load)
            fair_share = -(-len(self._queue) // len(free))
            self._send(engine, self._queue.take(min(self._config.chunk_size, engine.free_slots(), fair_share)))
        self._count_in_flight()

    def _dispatch_retries(self) -> Engine | None:
        """Send the requests of dead engines. Returns the engine that must drain before the next can be sent, if any."""
        while self._retry_queue:
            pending = self._retry_queue[0]
            engine = min(self.engines, key=lambda engine: engine.load, default=None)
            limit = self.max_concurrency(pending)
            if pending.future.done():
                self._retry_queue.popleft()
            elif engine is None or engine.free_slots(limit) <= 0:
                return engine
            else:
                engine.max_concurrency = min(engine.max_concurrency, limit)
                self._send(engine, [self._retry_queue.popleft()])
        return None

    def _send(self, engine: Engine, requests: list[PendingRequest]) -> None:
        if not engine.in_flight:
            engine.health.end_idleness()
        now = time.monotonic()
        chunk = []
        for pending in requests:
            self._next_key += 1
            engine.in_flight[self._next_key] = pending
            pending.seconds_queued += now - pending.since
            pending.since = now
            chunk.append((self._next_key, pending.request))
        if chunk:
            engine.actor.submit.remote(chunk)

    def _count_in_flight(self) -> None:
        in_flight = [len(engine.in_flight) for engine in self.engines]
        self._stats.num_engines = len(in_flight)
        self._stats.num_in_flight = sum(in_flight)
        self._stats.max_in_flight = max(self._stats.max_in_flight, *in_flight, 0)
