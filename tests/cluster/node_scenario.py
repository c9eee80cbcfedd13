"""Engines on two Ray nodes of which one is killed: run by test_pool_nodes.py in a process of its own, prints JSON.

python -m tests.cluster.node_scenario MODEL_FOLDER
"""

import asyncio
import json
import sys
import time
from collections import Counter
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from cluster.config import ModelConfig
from cluster.engines.config import GenerationRequest, Sampling
from cluster.engines.pool import EnginePool
from cluster.errors import TunesmithError
from tests.fakes import continue_prompt, scripted

SAMPLING = Sampling()
TEST_SECONDS = 120.0


class Stream:
    """Requests sent again and again, so that some are in flight at any time; each answer is checked."""

    def __init__(self, pool: EnginePool) -> None:
        self._pool = pool
        self._calls: list[asyncio.Task] = []
        self.answers: Counter[str] = Counter()
        self.num_wrong = 0

    def send(self, num: int) -> None:
        for _ in range(num):
            self._calls.append(asyncio.create_task(self._ask(len(self._calls))))

    async def _ask(self, number: int) -> None:
        prompt = f"prompt {number} "
        completion = await self._pool.generate(GenerationRequest(f"request-{number}", prompt, SAMPLING))
        self.answers[completion.request_id] += 1
        self.num_wrong += completion.text != continue_prompt(prompt, SAMPLING.model_dump_json())

    async def all_answered(self) -> bool:
        await asyncio.gather(*self._calls)
        return self.num_wrong == 0 and len(self.answers) == len(self._calls) == self.answers.total()


async def until(condition) -> None:
    deadline = time.monotonic() + TEST_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the cluster did not come to the state that is waited for")
        await asyncio.sleep(0.1)


async def live(cluster: Cluster, model: ModelConfig) -> dict:
    """A pool of one engine gets a second node, loses the first with requests in flight, and then the other."""
    first = cluster.add_node(num_cpus=1)
    config = scripted(
        num_replicas=2, min_replicas=1, cpus_per_engine=1, max_num_seqs=8, start_timeout_seconds=60, max_restarts=5
    )
    async with EnginePool.start(config, model) as pool:
        await until(lambda: pool.stats.num_engines)
        seen = {"engines_at_start": pool.stats.num_engines}
        stream = Stream(pool)
        stream.send(20)
        second = cluster.add_node(num_cpus=1)
        await until(lambda: pool.stats.num_engines == 2)
        stream.send(60)
        await until(lambda: all(engine.num_requests for engine in pool.stats.engines))
        seen["both_take_part"] = True
        stream.send(200)
        await until(lambda: all(engine.is_up for engine in pool.stats.engines) and pool.stats.num_in_flight > 16)
        cluster.remove_node(first, allow_graceful=False)
        seen["answered_once_each"] = await stream.all_answered()
        seen["restarts"] = pool.stats.num_restarts
        seen["quarantined"] = pool.stats.num_quarantined
        await until(lambda: pool.stats.num_engines == 1)
        third = cluster.add_node(num_cpus=1)
        await until(lambda: pool.stats.num_engines == 2)
        stream.send(50)
        seen["answered_with_a_new_node"] = await stream.all_answered()
    pool_config = config.model_copy(update={"num_replicas": 1, "start_timeout_seconds": 30.0})
    async with EnginePool.start(pool_config, model) as pool:
        stream = Stream(pool)
        stream.send(10)
        await stream.all_answered()
        cluster.remove_node(second, allow_graceful=False)
        cluster.remove_node(third, allow_graceful=False)
        await until(lambda: not pool.stats.num_engines)  # its process may outlive its node for a moment
        stream.send(10)
        try:
            await stream.all_answered()
        except TunesmithError as error:
            seen["without_nodes"] = str(error)
    return seen


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        seen = asyncio.run(live(cluster, ModelConfig(path=sys.argv[1])))
        Path(sys.argv[2]).write_text(json.dumps(seen))
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
