"""A pool of engines behind one coroutine.

    async with EnginePool.start(engine_config, model) as pool:
        completion = await pool.generate(request)

Requests come back one by one as they finish: no batch waits for its slowest member. An engine that dies or hangs is
replaced, and its requests go to the other engines. Engines come and go with the nodes that they run on.

dispatch.py decides which request goes to which engine, health.py which engine is dead, hung or slow, and placement.py
where an engine runs.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

import ray
from ray.util.placement_group import PlacementGroup

from cluster.config import ModelConfig
from cluster.engines.actor import Answer
from cluster.engines.config import Completion, EngineConfig, GenerationRequest
from cluster.engines.dispatch import Dispatcher, Engine, PendingRequest
from cluster.engines.engine import check_adapters
from cluster.engines.health import EngineDeath, EngineHealth, EngineHung, relative_speed
from cluster.engines.placement import (
    free_resources,
    is_reserved,
    node_is_gone,
    reservation,
    running_actor,
    share_cpus,
    wait_for_cluster,
)
from cluster.engines.pool_stats import EngineStats, PoolStats
from cluster.errors import InputError, TunesmithError
from cluster.model_source import locate_model
from cluster.processes.awake import AwakeClock, within

MIN_POLL_SECONDS = 0.02
MAX_POLL_SECONDS = 1.0
MAX_COLLECT_SECONDS = 5.0  # an engine reports at least this often: a frozen one does not, an idle one does
FIRST_BACKOFF_SECONDS = 1.0  # before the second restart in a row without a finished request; doubles from there
MAX_BACKOFF_SECONDS = 60.0


class RequestRefused(TunesmithError):
    """An engine refused a request. error: what the engine raised."""

    def __init__(self, request_id: str, error: str) -> None:
        super().__init__(f"the engine refused request {request_id}: {error}")
        self.error = error


class EnginePool:
    """Engines of one model. `EnginePool.start` makes one."""

    def __init__(self, config: EngineConfig, model: ModelConfig, adapters: tuple[str, ...] = ()) -> None:
        self.stats = PoolStats(engines=[EngineStats() for _ in range(config.num_replicas)])
        self._config = config
        self._model = locate_model(model)
        self._adapters = adapters
        self._dispatcher = Dispatcher(config, self.stats)
        self._num_starting = 0  # engines that have their resources and are not up yet
        self._clock = AwakeClock()
        self._last_alive = 0.0  # by this clock: when an engine was last up or starting
        self._started = asyncio.Event()
        self._failure: TunesmithError | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def start(
        cls, config: EngineConfig, model: ModelConfig, adapters: tuple[str, ...] = ()
    ) -> AsyncIterator["EnginePool"]:
        """Start as many engines as the cluster has room for, and enter the block when the first is up.

        Needs a Ray session. `adapters` are folders of LoRA adapters that requests may name. Raises InputError if the
        cluster is too small, the folder holds no model or an adapter cannot be served, and TunesmithError if no engine
        comes up.
        """
        model = locate_model(model)
        check_adapters(config, adapters)
        num_gpus = await wait_for_cluster(config)
        pool = cls(share_cpus([(config, model)])[0], model, adapters)
        pool._last_alive = pool._clock()
        engines = [asyncio.create_task(pool._run_engine(num_gpus, stats)) for stats in pool.stats.engines]
        watch = asyncio.create_task(pool._watch(engines))
        try:
            await pool._started.wait()
            if pool._failure:
                raise pool._failure
            yield pool
        finally:
            for task in (watch, *engines):
                task.cancel()
            await asyncio.gather(watch, *engines, return_exceptions=True)

    async def generate(self, request: GenerationRequest) -> Completion:
        """Complete one request. Any number of callers may wait here.

        `Sample.finish_reason` says how it ended. Raises InputError for an adapter that the pool was not started with,
        RequestRefused if the engine refuses the request, and TunesmithError if no engine is left.
        """
        if self._failure:
            raise self._failure
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InputError(
                f"request {request.request_id} names the adapter {request.adapter}, but the engines were started with "
                f"{', '.join(self._adapters) or 'none'}."
            )
        pending = PendingRequest(request, asyncio.get_running_loop().create_future(), time.monotonic())
        self._dispatcher.add(pending)
        return await pending.future

    # -- the life of an engine

    async def _run_engine(self, num_gpus: int, stats: EngineStats) -> EngineDeath:
        """Run an engine, and start it again when it dies. Returns its last death after too many useless restarts."""
        num_useless = 0  # deaths in a row without a finished request
        while True:
            with reservation(self._config, num_gpus) as group:
                try:
                    await self._wait_for_resources(group)
                except EngineDeath as death:
                    return death
                with running_actor(self._config, self._model, num_gpus, self._adapters, group) as actor:
                    limit = self._config.max_in_flight
                    engine = Engine(actor, EngineHealth(self._config, self._clock), stats, limit, limit)
                    try:
                        await self._wait_until_up(engine)
                        await self._collect(engine)
                    except EngineDeath as death:
                        num_quarantined = self._retire(engine, death)
                        num_useless = 0 if engine.num_finished + num_quarantined else num_useless + 1
                        # Before any engine was up, another start would fail in the same way.
                        if not self._started.is_set() or num_useless > self._config.max_restarts:
                            return death
                        for counts in (self.stats, stats):
                            counts.add_restart(death.is_hung)
            if num_useless > 1:
                await asyncio.sleep(min(FIRST_BACKOFF_SECONDS * 2 ** (num_useless - 2), MAX_BACKOFF_SECONDS))

    async def _wait_for_resources(self, group: PlacementGroup) -> None:
        """Wait for the resources of one engine as long as another engine is up or starting.

        Raises EngineDeath if no engine was up or starting for start_timeout_seconds.
        """
        wait_seconds = MIN_POLL_SECONDS
        while not is_reserved(group):
            now = self._clock()
            if self._dispatcher.engines or self._num_starting:
                self._last_alive = now
            elif now - self._last_alive > self._config.start_timeout_seconds:
                raise EngineDeath(
                    f"the cluster had no resources for it in engine.start_timeout_seconds="
                    f"{self._config.start_timeout_seconds:g} (free on this Ray: {free_resources()})"
                )
            await asyncio.sleep(wait_seconds)
            wait_seconds = min(2 * wait_seconds, MAX_POLL_SECONDS)

    async def _wait_until_up(self, engine: Engine) -> None:
        timeout = self._config.start_timeout_seconds
        self._num_starting += 1
        try:
            found = await within(timeout, _result_of(engine.actor.node.remote()), self._clock)
        except TimeoutError:
            raise EngineDeath(f"it was not up after engine.start_timeout_seconds={timeout:g}") from None
        finally:
            self._num_starting -= 1
            self._last_alive = self._clock()
        engine.node_id, engine.stats.node = found
        engine.stats.is_up = True
        self._dispatcher.engines.append(engine)
        self._started.set()
        self._dispatcher.schedule()

    async def _collect(self, engine: Engine) -> None:
        """Give finished requests to their callers until the engine dies."""
        timeout = self._config.stall_timeout_seconds
        wait_seconds = min(MAX_COLLECT_SECONDS, timeout / 2, self._config.slow_window_seconds / 2)
        while True:
            try:
                answer = _result_of(engine.actor.collect.remote(wait_seconds))
                finished, report = await within(timeout, answer, self._clock)
            except TimeoutError:
                raise EngineHung(f"it did not answer for engine.stall_timeout_seconds={timeout:g}") from None
            num_held = len(engine.in_flight)
            now = time.monotonic()
            for key, answer in finished:
                self._finish(engine, engine.in_flight.pop(key), answer, now)
            for counts in (self.stats, engine.stats):
                counts.add_report(engine.health.last_report, report)
            engine.stats.num_running, engine.stats.num_waiting = report.num_running, report.num_waiting
            if engine.health.observe(report, bool(finished), num_held):
                self._compare_speed(engine)
            self._dispatcher.restore_concurrency(engine)
            self._dispatcher.schedule()

    def _finish(self, engine: Engine, pending: PendingRequest, answer: Answer, now: float) -> None:
        engine.num_finished += 1
        completion = None if isinstance(answer, str) else answer
        for counts in (self.stats, engine.stats):
            counts.add_answer(completion, pending.seconds_queued, now - pending.since)
        if pending.future.done():
            return
        if completion is None:
            pending.future.set_exception(RequestRefused(pending.request.request_id, answer))
        else:
            pending.future.set_result(completion)

    def _compare_speed(self, engine: Engine) -> None:
        """Let an engine that is far slower than the others hold fewer requests, in proportion to its speed."""
        engines = self._dispatcher.engines
        speed = relative_speed(engine.health.speed, [peer.health.speed for peer in engines if peer is not engine])
        engine.stats.is_slow = speed < self._config.slow_fraction
        engine.max_in_flight = max(1, int(self._config.max_in_flight * (speed if engine.stats.is_slow else 1)))
        engine.stats.num_slow_windows += engine.stats.is_slow
        engine.stats.tokens_per_second = round(engine.health.tokens_per_second, 1)
        self.stats.num_slow = sum(engine.stats.is_slow for engine in engines)

    def _retire(self, engine: Engine, death: EngineDeath) -> int:
        """Put a dead engine's requests in front of the queue. Returns how many are quarantined instead."""
        if engine in self._dispatcher.engines:
            self._dispatcher.engines.remove(engine)
        engine.stats.is_up = engine.stats.is_slow = False
        engine.stats.num_running = engine.stats.num_waiting = 0
        self.stats.last_death = str(death)
        self.stats.num_slow = sum(engine.stats.is_slow for engine in self._dispatcher.engines)
        may_be_their_fault = not node_is_gone(engine.node_id)
        now, retries, num_quarantined = time.monotonic(), [], 0
        for pending in engine.in_flight.values():
            self.stats.seconds_lost += now - pending.since
            engine.stats.seconds_lost += now - pending.since
            pending.since = now
            pending.num_deaths += may_be_their_fault
            if pending.num_deaths < self._config.max_request_deaths:
                retries.append(pending)
            elif not pending.future.done():
                pending.future.set_result(Completion.failed(pending.request, "engine_died"))
                self.stats.quarantined[pending.request.request_id] = str(death)
                num_quarantined += 1
        self.stats.num_quarantined += num_quarantined
        self._dispatcher.retry(retries)
        self._dispatcher.schedule()
        return num_quarantined

    async def _watch(self, engines: list[asyncio.Task[EngineDeath]]) -> None:
        """Fail every caller when the last engine has ended for good, or at once if the pool itself breaks."""
        try:
            cause: Exception = (await asyncio.gather(*engines))[-1]
        except Exception as error:  # noqa: BLE001 - whatever it is, the callers must not wait forever
            cause = error
        if not isinstance(cause, EngineDeath):
            message = f"the engine pool broke: {type(cause).__name__}: {cause}"
        elif self._started.is_set():
            message = (
                f"no engine is left. The last one died: {cause}. All finished requests are kept. Start the "
                "same command again to continue. If memory ran out, lower engine.max_num_seqs or engine.max_model_len."
            )
        else:
            message = (
                f"no engine came up: {cause}. Check model.path and the memory that engine.max_model_len and "
                "engine.kv_cache_gib (CPU) or engine.gpu_memory_utilization (GPU) need."
            )
        self._failure = TunesmithError(message)
        self._failure.__cause__ = cause
        self._started.set()
        for pending in self._dispatcher.unfinished():
            if not pending.future.done():
                pending.future.set_exception(self._failure)


async def _result_of(ref: "ray.ObjectRef") -> object:
    """The result of a call of an actor. Raises EngineDeath if the actor died."""
    try:
        return await ref
    except ray.exceptions.RayActorError as error:
        if "EngineStartError" in str(error):
            cause = str(error).strip().splitlines()[-1].partition("EngineStartError: ")[2]
        else:  # Ray's text guesses at reasons for a paragraph
            cause = "its process ended by itself; if the kernel killed it, memory ran out"
        raise EngineDeath(cause) from error
