"""The Ray actor around one engine: requests come in by `submit`, whatever has finished leaves by `collect`.

Two calls instead of one per request: under load a single `collect` brings many completions, and none waits for another.
"""

import asyncio
import contextlib
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.config import ModelConfig
from cluster.engine import EngineInfo
from cluster.engine_config import Completion, EngineConfig, GenerationRequest
from cluster.errors import InputError

Answer = Completion | str  # a string is the engine's own error for this one request

CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+)")
MAX_LOG_CHARS = 50_000
MAX_CAUSE_CHARS = 400


class EngineStartError(Exception):
    """An engine did not start; the message is the cause in one line."""


class EngineActor:
    """One engine and the completions that wait to be collected."""

    def __init__(self, config: EngineConfig, model: ModelConfig, num_gpus: int) -> None:
        module, _, name = config.backend.partition(":")
        try:
            self._backend = getattr(importlib.import_module(module), name)(config, model, num_gpus)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything, and only its message travels well
            raise EngineStartError(_root_cause(error)) from None
        self._finished: asyncio.Queue[tuple[int, Answer]] = asyncio.Queue()
        self._running: set[asyncio.Task] = set()

    async def describe(self) -> EngineInfo:
        return self._backend.describe()

    async def submit(self, chunk: list[tuple[int, GenerationRequest]]) -> None:
        """Begin some requests. The keys are the pool's and come back with the completions."""
        for key, request in chunk:
            task = asyncio.create_task(self._run(key, request))
            self._running.add(task)  # the event loop itself keeps only a weak reference
            task.add_done_callback(self._running.discard)

    async def collect(self, wait_seconds: float) -> list[tuple[int, Answer]]:
        """All completions since the last call, at least one, or none after `wait_seconds`."""
        try:
            async with asyncio.timeout(wait_seconds):
                answers = [await self._finished.get()]
        except TimeoutError:
            return []
        while not self._finished.empty():
            answers.append(self._finished.get_nowait())
        return answers

    async def _run(self, key: int, request: GenerationRequest) -> None:
        try:
            answer: Answer = await self._backend.generate(request)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything, and its caller must hear of it
            answer = f"{type(error).__name__}: {error}"
        self._finished.put_nowait((key, answer))


@contextlib.contextmanager
def running_actor(config: EngineConfig, model: ModelConfig, num_gpus: int) -> Iterator["ray.actor.ActorHandle"]:
    """Ask Ray for an engine's actor, and kill it at the end. An engine of several GPUs gets a placement group."""
    group = None
    if num_gpus > 1:
        cpus = max(1, config.cpus_per_engine / num_gpus)
        group = placement_group([{"GPU": 1, "CPU": cpus}] * num_gpus, strategy="PACK")
        strategy = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
        options = {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": strategy}  # vLLM's own workers take the GPUs
    else:
        options = {"num_cpus": config.cpus_per_engine, "num_gpus": num_gpus}
    actor = ray.remote(EngineActor).options(max_restarts=0, **options).remote(config, model, num_gpus)
    try:
        yield actor
    finally:
        ray.kill(actor)
        if group is not None:
            remove_placement_group(group)


def require_resources(config: EngineConfig) -> int:
    """GPUs of each engine (0 on a cluster without any). Raises InputError if the cluster can never hold them all."""
    have = ray.cluster_resources()
    num_gpus = config.gpus_per_engine if have.get("GPU", 0) else 0
    for resource, per_engine, key in (
        ("GPU", num_gpus, "engine.tensor_parallel_size"),
        ("CPU", config.cpus_per_engine, "engine.cpus_per_engine"),
    ):
        need = per_engine * config.num_replicas
        if need > have.get(resource, 0):
            raise InputError(
                f"engine.num_replicas={config.num_replicas} with {per_engine:g} {resource} each needs {need:g} "
                f"{resource}s, and this Ray has {have.get(resource, 0):g}. Lower engine.num_replicas or {key}."
            )
    return num_gpus


def _root_cause(error: Exception) -> str:
    """The error in one line. vLLM's core process leaves the cause in this worker's log and raises only "see above"."""
    if "Engine core initialization failed" in str(error):
        for descriptor in (1, 2):
            log = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            text = log.read_text(errors="replace")[-MAX_LOG_CHARS:] if log.is_file() else ""
            causes = [cause for cause in CAUSE.findall(text) if "initialization failed" not in cause]
            if causes:
                return causes[-1].strip()
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:MAX_CAUSE_CHARS]
