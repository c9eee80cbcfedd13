"""Where an engine runs: the resources of the cluster, the placement group, and the actor inside it.

Every engine gets a placement group, so that the pool knows whether an engine waits for resources or loads its model. An
engine of several GPUs gets a bundle per GPU, packed onto as few nodes as possible, and vLLM's own Ray workers take the
GPUs from there: vllm/v1/executor/ray_executor_v2.py asks for one GPU of each bundle, and finds the group because the
actor that starts vLLM is in it (vllm/engine/arg_utils.py). vLLM needs an IP address per node. Engines on CPUs have been
run on one node and on two; engines over several GPUs or nodes have not been run.
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ModelConfig
from cluster.engines.actor import EngineActor
from cluster.engines.config import EngineConfig
from cluster.errors import InputError
from cluster.model_source import is_toy

POLL_SECONDS = 0.5
ROUNDING = 1e-6  # error of a quotient of fractions of a CPU


async def wait_for_cluster(config: EngineConfig) -> int:
    """Wait until the cluster could hold `min_replicas` engines. Returns GPUs per engine, 0 if the cluster has none.

    If the recipe sets min_replicas, nodes may still join the cluster. Raises InputError if it is too small: at once, or
    with min_replicas after start_timeout_seconds.
    """
    deadline = time.monotonic() + (config.start_timeout_seconds if config.min_replicas else 0)
    while True:
        try:
            return require_resources(config)
        except InputError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(POLL_SECONDS)


def require_resources(config: EngineConfig) -> int:
    """GPUs per engine, 0 if the cluster has none. Raises InputError if the cluster is too small for the engines."""
    available = ray.cluster_resources()
    num_gpus = config.gpus_per_engine if available.get("GPU", 0) else 0
    name = "num_replicas" if config.min_replicas is None else "min_replicas"
    num_engines = config.min_replicas or config.num_replicas
    for resource, per_engine, key in (
        ("GPU", num_gpus, "engine.tensor_parallel_size"),
        ("CPU", config.min_cpus, "engine.cpus_per_engine"),
    ):
        need = per_engine * num_engines
        if need > available.get(resource, 0):
            raise InputError(
                f"engine.{name}={num_engines} with {per_engine:g} {resource} each needs {need:g} "
                f"{resource}s, but this Ray has {available.get(resource, 0):g}. Lower engine.{name} or {key}."
            )
    return num_gpus


def fit_to_cluster(config: EngineConfig) -> EngineConfig:
    """The engines that this Ray has room for: fewer than the recipe's if need be, and at least one."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    num_gpus = config.gpus_per_engine if any(node.get("GPU") for node in nodes) else 0
    if num_gpus > 1:  # such an engine may span nodes
        room = int(sum(node.get("GPU", 0) for node in nodes) // num_gpus)
    else:
        needs = {"CPU": config.min_cpus} | ({"GPU": num_gpus} if num_gpus else {})
        room = sum(min(int(node.get(name, 0) / each + ROUNDING) for name, each in needs.items()) for node in nodes)
    num_replicas = min(config.num_replicas, max(1, room))
    min_replicas = None if config.min_replicas is None else min(config.min_replicas, num_replicas)
    return config.model_copy(update={"num_replicas": num_replicas, "min_replicas": min_replicas})


def share_cpus(pools: Sequence[tuple[EngineConfig, ModelConfig]]) -> list[EngineConfig]:
    """The settings of pools that are up at once, each with `cpus_per_engine`.

    Without GPUs the engines that do not say how many CPUs they take get the same number, as large as the nodes allow.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    shares = [config.cpus_per_engine is None and not has_gpus and not is_toy(model) for config, model in pools]
    free = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    for config in (config for (config, _), does in zip(pools, shares, strict=True) if not does):
        for _ in range(config.num_replicas):
            free[free.index(max(free))] -= config.min_cpus
    num_sharing = sum(config.num_replicas for (config, _), does in zip(pools, shares, strict=True) if does)
    share = int(max(free))
    while share > 1 and sum(cpus // share for cpus in free) < num_sharing:
        share -= 1
    return [
        config.model_copy(update={"cpus_per_engine": max(1, share) if does else config.min_cpus})
        for (config, _), does in zip(pools, shares, strict=True)
    ]


@contextmanager
def reservation(config: EngineConfig, num_gpus: int) -> Iterator[PlacementGroup]:
    """Request the resources of one engine until the block ends. `is_reserved` says when Ray has granted them."""
    if num_gpus > 1:
        bundles = [{"GPU": 1, "CPU": max(1, config.min_cpus / num_gpus)}] * num_gpus
    else:
        bundles = [{"CPU": config.min_cpus, **({"GPU": num_gpus} if num_gpus else {})}]
    group = placement_group(bundles, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def is_reserved(group: PlacementGroup) -> bool:
    return placement_group_table(group).get("state") == "CREATED"  # the group's own `wait` would block the event loop


def free_resources() -> str:
    """The CPUs and GPUs that are free, for a message."""
    free = ray.available_resources()
    return ", ".join(f"{free[name]:g} {name}" for name in ("CPU", "GPU") if free.get(name)) or "nothing"


def node_is_gone(node_id: str) -> bool:
    """Whether a node has left the cluster. False for an empty id, which an engine has before it is up."""
    return any(node["NodeID"] == node_id and not node["Alive"] for node in ray.nodes())


@contextmanager
def running_actor(
    config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...], group: PlacementGroup
) -> Iterator["ray.actor.ActorHandle"]:
    """Start an engine's actor in its placement group, and kill it at the end."""
    is_spread = num_gpus > 1  # then vLLM's workers take the GPUs, and the actor takes nothing
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=is_spread)
    actor = (
        ray.remote(EngineActor)
        .options(
            max_restarts=0,
            num_cpus=0 if is_spread else config.min_cpus,
            num_gpus=0 if is_spread else num_gpus,
            scheduling_strategy=strategy,
        )
        .remote(config, model, num_gpus, adapters)
    )
    try:
        yield actor
    finally:
        ray.kill(actor)
