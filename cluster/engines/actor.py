"""The Ray actor of one engine: requests come in by `submit`, and completions leave by `collect`.

Under load one `collect` returns many completions, which is cheaper than a call per request, and none waits for another.
"""

import asyncio
import importlib
import os
import re
from pathlib import Path

import ray

from cluster.config import ModelConfig
from cluster.engines.config import Completion, EngineConfig, EngineReport, GenerationRequest
from cluster.errors import TunesmithError
from cluster.processes.descendants import start_reaper
from cluster.ray.folder import use_ray_folder_for_temporary_files

Answer = Completion | str  # a string is the engine's error for this request
Finished = list[tuple[int, Answer]]

CAUSE = re.compile(r"\b(\w*(?:Error|Exception): .+)")
LINGER_SECONDS = 0.01
MAX_LOG_CHARS = 50_000
MAX_CAUSE_CHARS = 400


class EngineStartError(Exception):
    """An engine did not start. The message is the cause in one line."""


class EngineActor:
    """One engine, and the completions that were not collected yet."""

    def __init__(self, config: EngineConfig, model: ModelConfig, num_gpus: int, adapters: tuple[str, ...]) -> None:
        start_reaper()
        use_ray_folder_for_temporary_files()
        module, _, name = config.backend.partition(":")
        try:
            self._backend = getattr(importlib.import_module(module), name)(config, model, num_gpus, adapters)
        except Exception as error:  # noqa: BLE001 - a backend may raise what the pool's process cannot unpickle
            raise EngineStartError(_root_cause(error)) from None
        self._finished: asyncio.Queue[tuple[int, Answer]] = asyncio.Queue()
        self._running: set[asyncio.Task] = set()

    async def node(self) -> tuple[str, str]:
        """Ray's id and the address of this node."""
        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    async def submit(self, chunk: list[tuple[int, GenerationRequest]]) -> None:
        """Begin some requests. The pool's keys come back with the completions."""
        for key, request in chunk:
            task = asyncio.create_task(self._run(key, request))
            self._running.add(task)  # the event loop itself keeps only a weak reference
            task.add_done_callback(self._running.discard)

    async def collect(self, wait_seconds: float) -> tuple[Finished, EngineReport]:
        """All completions since the last call, and the engine's report. Waits up to `wait_seconds` for a completion.

        After the first it waits briefly for more, because a call costs both sides more than a completion. The engine
        meanwhile has as many requests waiting as it decodes at once.
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
        except Exception as error:  # noqa: BLE001 - whatever the engine raises, the caller must get it
            answer = f"{type(error).__name__}: {error}"
        self._finished.put_nowait((key, answer))


def _root_cause(error: Exception) -> str:
    """The error in one line. That of vLLM's core process only refers to the log, which has the cause."""
    if "Engine core initialization failed" in str(error):
        for descriptor in (1, 2):
            log = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            text = log.read_text(errors="replace")[-MAX_LOG_CHARS:] if log.is_file() else ""
            causes = [cause for cause in CAUSE.findall(text) if "initialization failed" not in cause]
            if causes:
                return causes[-1].strip()
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}"[:MAX_CAUSE_CHARS]
