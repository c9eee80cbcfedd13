"""The Ray actor around one engine: requests come in by `submit`, whatever has finished leaves by `collect`.

Two calls instead of one per request: under load a single `collect` brings many completions, and none waits for another.
"""

import asyncio
import importlib
import os
import re
from pathlib import Path

import ray

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, EngineReport, GenerationRequest
from cluster.engines.engine import EngineInfo
from cluster.errors import TunesmithError
from cluster.processes.reaper import start_reaper
from cluster.ray.folder import keep_temporary_files_there

Answer = Completion | str  # a string is the engine's own error for this one request
Finished = list[tuple[int, Answer]]

CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+)")
LINGER_SECONDS = 0.01
MAX_LOG_CHARS = 50_000
MAX_CAUSE_CHARS = 400


class EngineStartError(Exception):
    """An engine did not start; the message is the cause in one line."""


class EngineActor:
    """One engine and the completions that wait to be collected."""

    def __init__(self, config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...]) -> None:
        start_reaper()
        keep_temporary_files_there()
        module, _, name = config.backend.partition(":")
        try:
            self._backend = getattr(importlib.import_module(module), name)(config, model, num_gpus, adapters)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything, and only its message travels well
            raise EngineStartError(_root_cause(error)) from None
        self._finished: asyncio.Queue[tuple[int, Answer]] = asyncio.Queue()
        self._running: set[asyncio.Task] = set()

    async def describe(self) -> EngineInfo:
        return self._backend.describe()

    async def node(self) -> tuple[str, str]:
        """Ray's id and the address of the node this runs on."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    async def submit(self, chunk: list[tuple[int, GenerationRequest]]) -> None:
        """Begin some requests. The keys are the pool's and come back with the completions."""
        for key, request in chunk:
            task = asyncio.create_task(self._run(key, request))
            self._running.add(task)  # the event loop itself keeps only a weak reference
            task.add_done_callback(self._running.discard)

    async def collect(self, wait_seconds: float) -> tuple[Finished, EngineReport]:
        """All completions since the last call, at least one, or none after `wait_seconds`; and how far the engine is.

        After the first it lingers for others: each call costs both sides more than a completion does, and the
        engine has as much waiting as it decodes at once.
        """
        finished: Finished = []
        try:
            async with asyncio.timeout(wait_seconds):
                finished.append(await self._finished.get())
        except TimeoutError:
            return finished, self._backend.report()
        await asyncio.sleep(LINGER_SECONDS)
        while not self._finished.empty():
            finished.append(self._finished.get_nowait())
        return finished, self._backend.report()

    async def _run(self, key: int, request: GenerationRequest) -> None:
        try:
            answer: Answer = await self._backend.generate(request)
        except TunesmithError as error:
            answer = str(error)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything, and its caller must hear of it
            answer = f"{type(error).__name__}: {error}"
        self._finished.put_nowait((key, answer))


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
