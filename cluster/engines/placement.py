"""Where an engine runs: whether the cluster has room, the placement group, and the actor inside it.

Every engine gets a placement group, so that waiting for room is told from loading a model. One of several GPUs gets a
bundle per GPU, packed onto as few nodes as hold them; vLLM's own Ray workers take the GPUs from there
(vllm/v1/executor/ray_executor_v2.py asks for one GPU of each bundle, and finds the group because the actor that starts
vLLM is in it: vllm/engine/arg_utils.py). It wants nodes with an IP address each. What has been run of this are engines
on CPUs, on one node and on two; engines over several GPUs or nodes have not been.
"""

import asyncio
import time
from collections.abc import Iterator
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

POLL_SECONDS = 0.5


async def wait_for_cluster(config: EngineConfig) -> int:
    """GPUs of each engine (0 on a cluster without any), once the cluster could hold `min_replicas`.

    Where the recipe names min_replicas, nodes may still be on their way: they are waited for. Raises InputError if the
    cluster is too small: at once, or after start_timeout_seconds of waiting.
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
    """GPUs of each engine (0 on a cluster without any). Raises InputError if the cluster can never hold enough."""
    have = ray.cluster_resources()
    num_gpus = config.gpus_per_engine if have.get("GPU", 0) else 0
    name = "num_replicas" if config.min_replicas is None else "min_replicas"
    num_engines = config.min_replicas or config.num_replicas
    for resource, per_engine, key in (
        ("GPU", num_gpus, "engine.tensor_parallel_size"),
        ("CPU", config.cpus_per_engine, "engine.cpus_per_engine"),
    ):
        need = per_engine * num_engines
        if need > have.get(resource, 0):
            raise InputError(
                f"engine.{name}={num_engines} with {per_engine:g} {resource} each needs {need:g} "
                f"{resource}s, and this Ray has {have.get(resource, 0):g}. Lower engine.{name} or {key}."
            )
    return num_gpus


@contextmanager
def reserved(config: EngineConfig, num_gpus: int) -> Iterator[PlacementGroup]:
    """Ask for the resources of one engine; `has_room` says when they are there. Given back at the end."""
    if num_gpus > 1:
        bundles = [{"GPU": 1, "CPU": max(1, config.cpus_per_engine / num_gpus)}] * num_gpus
    else:
        bundles = [{"CPU": config.cpus_per_engine, **({"GPU": num_gpus} if num_gpus else {})}]
    group = placement_group(bundles, strategy="PACK")
    try:
        yield group
    finally:
        remove_placement_group(group)


def has_room(group: PlacementGroup) -> bool:
    """Whether the group's resources are reserved by now."""
    return placement_group_table(group).get("state") == "CREATED"  # its own `wait` would hold up the event loop


def free_resources() -> str:
    """CPUs and GPUs that Ray has free, for a message."""
    free = ray.available_resources()
    return ", ".join(f"{free[name]:g} {name}" for name in ("CPU", "GPU") if free.get(name)) or "nothing"


def node_is_gone(node_id: str) -> bool:
    """Whether a node that was part of the cluster no longer is. An empty id is of none."""
    return any(node["NodeID"] == node_id and not node["Alive"] for node in ray.nodes())


@contextmanager
def running_actor(
    config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...], group: PlacementGroup
) -> Iterator["ray.actor.ActorHandle"]:
    """Start an engine's actor in its place, and kill it at the end."""
    is_spread = num_gpus > 1  # vLLM's workers take the GPUs, and the actor nothing
    strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=is_spread)
    actor = (
        ray.remote(EngineActor)
        .options(
            max_restarts=0,
            num_cpus=0 if is_spread else config.cpus_per_engine,
            num_gpus=0 if is_spread else num_gpus,
            scheduling_strategy=strategy,
        )
        .remote(config, model, num_gpus, adapters)
    )
    try:
        yield actor
    finally:
        ray.kill(actor)
