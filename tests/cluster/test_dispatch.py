"""Which request goes to which engine: properties of the queue, and the dispatcher on engines that only record."""

import asyncio
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.engines.config import EngineConfig, GenerationRequest, Sampling
from cluster.engines.dispatch import Dispatcher, Engine, GroupedQueue, PendingRequest
from cluster.engines.health import EngineHealth
from cluster.engines.pool_stats import EngineStats, PoolStats

SAMPLING = Sampling()


class Waiting:
    """Stands for the future of a caller that waits."""

    def done(self) -> bool:
        return False


def pending(number: int, group: str = "") -> PendingRequest:
    return PendingRequest(GenerationRequest(str(number), "prompt", SAMPLING, group=group), Waiting(), since=0.0)


def drain(queue: GroupedQueue, chunk_size: int) -> list[list[PendingRequest]]:
    chunks = []
    while len(queue):
        chunks.append(queue.take(chunk_size))
    return chunks


@given(groups=st.lists(st.sampled_from("abcd"), max_size=60), chunk_size=st.integers(1, 8))
def test_each_request_leaves_once_and_in_the_order_of_its_group(groups: list[str], chunk_size: int):
    queue = GroupedQueue()
    for number, group in enumerate(groups):
        queue.append(pending(number, group))
    left = [each for chunk in drain(queue, chunk_size) for each in chunk]
    assert sorted(int(each.request.request_id) for each in left) == list(range(len(groups)))
    for name in set(groups):
        numbers = [int(each.request.request_id) for each in left if each.request.group == name]
        assert numbers == sorted(numbers)


@given(groups=st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), chunk_size=st.integers(1, 8))
def test_a_chunk_holds_a_second_group_only_if_the_first_is_empty(groups: list[str], chunk_size: int):
    queue = GroupedQueue()
    for number, group in enumerate(groups):
        queue.append(pending(number, group))
    while len(queue):
        chunk = queue.take(chunk_size)
        waiting = {each.request.group for each in queue}
        names = [each.request.group for each in chunk]
        assert len(chunk) == chunk_size or not waiting
        assert not waiting.intersection(names[: names.index(names[-1])])


def test_a_small_group_does_not_wait_for_a_large_one():
    queue = GroupedQueue()
    for number in range(1000):
        queue.append(pending(number, "large"))
    queue.append(pending(1000, "small"))
    queue.take(8)
    assert queue.take(8)[0].request.group == "small"


def dispatcher_of(config: EngineConfig) -> tuple[Dispatcher, list[Engine], list[list[list[str]]]]:
    """A dispatcher, its engines, and the chunks that each of them was sent."""
    dispatcher = Dispatcher(config, PoolStats())
    sent: list[list[list[str]]] = []
    for _ in range(config.num_replicas):
        chunks: list[list[str]] = []

        def submit(chunk: list[tuple[int, GenerationRequest]], chunks: list[list[str]] = chunks) -> None:
            chunks.append([request.request_id for _, request in chunk])

        actor = SimpleNamespace(submit=SimpleNamespace(remote=submit))
        limit = config.max_in_flight
        dispatcher.engines.append(Engine(actor, EngineHealth(config), EngineStats(), limit, limit))
        sent.append(chunks)
    return dispatcher, dispatcher.engines, sent


def dispatch(dispatcher: Dispatcher, pendings: list[PendingRequest], retries: list[PendingRequest] = ()) -> None:
    async def main() -> None:
        dispatcher.retry(list(retries))
        for each in pendings:
            dispatcher.add(each)
        dispatcher.schedule()
        await asyncio.sleep(0)

    asyncio.run(main())


@pytest.mark.parametrize("num_requests", [2, 7, 30])
def test_few_requests_are_spread_over_the_engines(num_requests: int):
    dispatcher, engines, _ = dispatcher_of(EngineConfig(num_replicas=2, max_num_seqs=16))
    dispatch(dispatcher, [pending(number) for number in range(num_requests)])
    held = [len(engine.in_flight) for engine in engines]
    assert sum(held) == num_requests and max(held) - min(held) <= 1


def test_an_engine_that_may_hold_half_as_many_requests_gets_half_as_many():
    dispatcher, engines, _ = dispatcher_of(EngineConfig(num_replicas=2, max_num_seqs=64, chunk_size=1))
    engines[1].max_in_flight //= 2
    dispatch(dispatcher, [pending(number) for number in range(90)])
    assert [len(engine.in_flight) for engine in engines] == [60, 30]


def test_a_request_that_must_run_alone_drains_one_engine():
    config = EngineConfig(num_replicas=2, max_num_seqs=2, chunk_size=1)
    dispatcher, engines, _ = dispatcher_of(config)
    dispatch(dispatcher, [pending(number) for number in range(8)])
    suspected = pending(99)
    suspected.num_deaths = config.max_request_deaths - 1
    engines[0].in_flight.popitem()
    engines[1].in_flight.popitem()
    dispatch(dispatcher, [pending(number) for number in range(8, 20)], [suspected])
    assert sorted(len(engine.in_flight) for engine in engines) == [3, 4]
    draining = min(engines, key=lambda engine: len(engine.in_flight))
    draining.in_flight.clear()
    dispatch(dispatcher, [])
    assert list(draining.in_flight.values()) == [suspected]


def test_a_request_whose_caller_has_left_is_not_sent():
    dispatcher, _, sent = dispatcher_of(EngineConfig())
    abandoned = pending(0)
    abandoned.future = SimpleNamespace(done=lambda: True)
    dispatch(dispatcher, [abandoned, pending(1)])
    assert [name for chunk in sent[0] for name in chunk] == ["1"]
