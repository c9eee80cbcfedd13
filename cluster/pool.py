"""A pool of engines behind one coroutine.

    async with EnginePool.start(engine_config, model) as pool:
        completion = await pool.generate(request)

Requests leave one by one as they come, each to the engine with the fewest in flight, and come back one by one: no
batch waits for its slowest member. An engine that dies is replaced, and what it had in flight goes to the others.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import ray

from cluster.config import ModelConfig
from cluster.engine_actor import Answer, require_resources, running_actor
from cluster.engine_config import Completion, EngineConfig, GenerationRequest
from cluster.errors import TunesmithError
from cluster.model_source import locate_model

SHARE_AFTER_DEATH = 8  # each death cuts the company a request may travel in by this factor, until it is alone
MAX_COLLECT_SECONDS = 5.0  # an idle engine answers so often, so that a frozen one is told from an idle one


class EngineDeath(Exception):
    """An engine is gone or does not answer; the message says how."""


@dataclass(slots=True)
class PoolStats:
    """What the pool has done since it started."""

    num_requests: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_quarantined: int = 0
    num_restarts: int = 0
    num_engines: int = 0  # up now
    num_in_flight: int = 0  # of all engines, now
    max_in_flight: int = 0  # of one engine, ever
    last_death: str = ""


@dataclass(slots=True, eq=False)
class _Pending:
    """A request on its way, and the caller that waits for it."""

    request: GenerationRequest
    answer: asyncio.Future[Completion]
    num_deaths: int = 0


@dataclass(slots=True, eq=False)
class _Engine:
    """An engine that is up."""

    actor: "ray.actor.ActorHandle"
    capacity: int  # how many requests it may hold, given which it holds
    in_flight: dict[int, _Pending] = field(default_factory=dict)
    num_finished: int = 0
    last_progress: float = 0.0


class EnginePool:
    """Engines of one model. Make one with `EnginePool.start`."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        self.stats = PoolStats()
        self._config = config
        self._model = locate_model(model)
        self._engines: list[_Engine] = []
        self._queue: deque[_Pending] = deque()
        self._next_key = 0
        self._dispatch_is_due = False
        self._started = asyncio.Event()
        self._failure: TunesmithError | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(cls, config: EngineConfig, model: ModelConfig) -> AsyncIterator["EnginePool"]:
        """Start all engines at once, and go on when the first is up. Needs a Ray session.

        Raises InputError if the cluster is too small or the folder holds no model, and TunesmithError if no engine
        comes up.
        """
        pool = cls(config, model)
        num_gpus = require_resources(config)
        slots = [asyncio.create_task(pool._keep_engine(num_gpus)) for _ in range(config.num_replicas)]
        watch = asyncio.create_task(pool._watch(slots))
        try:
            await pool._started.wait()
            if pool._failure:
                raise pool._failure
            yield pool
        finally:
            for task in (watch, *slots):
                task.cancel()
            await asyncio.gather(watch, *slots, return_exceptions=True)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Complete one request. Any number of callers may wait here; the engines take what they have room for.

        finish_reason says what became of it (see `Completion`). Raises TunesmithError if the engine refuses the
        request, and once no engine is left.
        """
        if self._failure:
            raise self._failure
        pending = _Pending(request, asyncio.get_running_loop().create_future())
        self._queue.append(pending)
        self._plan_dispatch()
        return await pending.answer

    # -- from the queue to the engines

    def _plan_dispatch(self) -> None:
        """Dispatch at the end of this turn of the event loop, so that requests made together travel together."""
        if not self._dispatch_is_due:
            self._dispatch_is_due = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatch_is_due = False
        chunks: dict[_Engine, list[tuple[int, GenerationRequest]]] = {engine: [] for engine in self._engines}
        while self._queue:
            pending = self._queue[0]
            if pending.answer.done():  # its caller gave up
                self._queue.popleft()
                continue
            engine = self._least_loaded(company=self._company(pending))
            if engine is None:
                break
            chunks[engine].append((self._admit(self._queue.popleft(), engine), pending.request))
            if len(chunks[engine]) == self._config.chunk_size:
                engine.actor.submit.remote(chunks[engine])
                chunks[engine] = []
        for engine, chunk in chunks.items():
            if chunk:
                engine.actor.submit.remote(chunk)
        self._count_in_flight()

    def _least_loaded(self, company: int) -> _Engine | None:
        """The engine with the fewest requests that has room for one that may share it with `company - 1` others."""
        free = (engine for engine in self._engines if len(engine.in_flight) < min(company, engine.capacity))
        return min(free, key=lambda engine: len(engine.in_flight), default=None)

    def _admit(self, pending: _Pending, engine: _Engine) -> int:
        self._next_key += 1
        if not engine.in_flight:
            engine.last_progress = time.monotonic()
        engine.in_flight[self._next_key] = pending
        engine.capacity = min(engine.capacity, self._company(pending))
        return self._next_key

    def _company(self, pending: _Pending) -> int:
        """How many requests may be on an engine together with this one, itself included.

        A request that was in flight when an engine died may be the cause. Its company shrinks with each death, so
        that the next one points at fewer, and its last chance is alone: only then is a death surely its doing.
        """
        if pending.num_deaths >= self._config.max_request_deaths - 1:
            return 1
        return max(1, self._config.max_in_flight // SHARE_AFTER_DEATH**pending.num_deaths)

    def _count_in_flight(self) -> None:
        in_flight = [len(engine.in_flight) for engine in self._engines]
        self.stats.num_engines = len(in_flight)
        self.stats.num_in_flight = sum(in_flight)
        self.stats.max_in_flight = max([self.stats.max_in_flight, *in_flight])

    # -- from the engines to the callers

    async def _keep_engine(self, num_gpus: int) -> EngineDeath:
        """Run an engine, and another one when it dies. Returns the death of one too many that finished nothing."""
        num_fruitless = 0
        while True:
            with running_actor(self._config, self._model, num_gpus) as actor:
                engine = _Engine(actor, capacity=self._config.max_in_flight)
                try:
                    await self._wait_until_up(engine)
                    await self._collect(engine)
                except EngineDeath as death:
                    self.stats.last_death = str(death)
                    num_quarantined = self._bury(engine)
                    num_fruitless = 0 if engine.num_finished + num_quarantined else num_fruitless + 1
                    if not self._started.is_set() or num_fruitless > self._config.max_restarts:
                        return death  # no engine has worked yet: it would fail again in the same way
                    self.stats.num_restarts += 1

    async def _wait_until_up(self, engine: _Engine) -> None:
        try:
            async with asyncio.timeout(self._config.start_timeout_seconds):
                await _answer_of(engine.actor.describe.remote())
        except TimeoutError:
            free = ", ".join(f"{value:g} {name}" for name, value in ray.available_resources().items() if len(name) == 3)
            raise EngineDeath(
                f"not up after engine.start_timeout_seconds={self._config.start_timeout_seconds:g} (free on this Ray: "
                f"{free or 'nothing'})"
            ) from None
        self._engines.append(engine)
        self._started.set()
        self._plan_dispatch()

    async def _collect(self, engine: _Engine) -> None:
        """Hand finished requests to their callers until the engine dies."""
        timeout = self._config.stall_timeout_seconds
        while True:
            try:
                async with asyncio.timeout(timeout):  # not wait_for, which loses a cancellation that meets an answer
                    answers = await _answer_of(engine.actor.collect.remote(min(MAX_COLLECT_SECONDS, timeout / 2)))
            except TimeoutError:
                raise EngineDeath(f"frozen for engine.stall_timeout_seconds={timeout:g}") from None
            now = time.monotonic()
            if answers or not engine.in_flight:
                engine.last_progress = now
            elif now - engine.last_progress > timeout:
                raise EngineDeath(f"finished nothing for engine.stall_timeout_seconds={timeout:g}")
            for key, answer in answers:
                self._finish(engine, engine.in_flight.pop(key), answer)
            if engine.capacity < self._config.max_in_flight:
                companies = (self._company(pending) for pending in engine.in_flight.values())
                engine.capacity = min(companies, default=self._config.max_in_flight)
            self._plan_dispatch()

    def _finish(self, engine: _Engine, pending: _Pending, answer: Answer) -> None:
        engine.num_finished += 1
        self.stats.num_requests += 1
        if pending.answer.done():
            return
        if isinstance(answer, str):
            pending.answer.set_exception(
                TunesmithError(f"the engine refused request {pending.request.request_id}: {answer}")
            )
            return
        self.stats.num_prompt_tokens += answer.num_prompt_tokens
        self.stats.num_completion_tokens += answer.num_completion_tokens
        pending.answer.set_result(answer)

    def _bury(self, engine: _Engine) -> int:
        """Put a dead engine's requests back in front of the queue. Returns how many are given up instead."""
        if engine in self._engines:
            self._engines.remove(engine)
        num_quarantined = 0
        for pending in reversed(engine.in_flight.values()):
            pending.num_deaths += 1
            if pending.num_deaths < self._config.max_request_deaths:
                self._queue.appendleft(pending)
            elif not pending.answer.done():
                pending.answer.set_result(Completion.failed(pending.request, "engine_died"))
                num_quarantined += 1
        self.stats.num_quarantined += num_quarantined
        self._plan_dispatch()
        return num_quarantined

    async def _watch(self, slots: list[asyncio.Task[EngineDeath]]) -> None:
        """Fail every caller once the last engine is given up, or at once if the pool itself breaks."""
        try:
            cause: Exception = (await asyncio.gather(*slots))[-1]
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers must not wait forever
            cause = error
        if not isinstance(cause, EngineDeath):
            message = f"the engine pool broke: {type(cause).__name__}: {cause}"
        elif self._started.is_set():
            message = (
                f"no engine is left, the last one died: {cause}. All finished requests are kept: start the same "
                "command again to go on, with a smaller engine.max_num_seqs or engine.max_model_len if memory ran out."
            )
        else:
            message = (
                f"no engine came up: {cause}. Check model.path and the memory that engine.max_model_len, "
                "engine.kv_cache_gib (CPU) or engine.gpu_memory_utilization (GPU) ask for."
            )
        self._failure = TunesmithError(message)
        self._failure.__cause__ = cause
        self._started.set()
        waiting = [*self._queue, *(pending for engine in self._engines for pending in engine.in_flight.values())]
        for pending in waiting:
            if not pending.answer.done():
                pending.answer.set_exception(self._failure)


async def _answer_of(ref: "ray.ObjectRef") -> object:
    """An actor's answer. Raises EngineDeath if it died instead."""
    try:
        return await ref
    except ray.exceptions.RayActorError as error:
        if "EngineStartError" in str(error):
            cause = str(error).strip().splitlines()[-1].partition("EngineStartError: ")[2]
        else:  # Ray's text guesses at reasons for a paragraph
            cause = "its process ended unasked; if the kernel killed it, memory ran out"
        raise EngineDeath(cause) from error
