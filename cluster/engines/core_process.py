"""A faster start of an engine of one CPU: vLLM's core process is forked from one that has imported vLLM already.

vLLM starts its core, the process that computes, with "spawn" on CPUs and in Ray's actors. There the core imports all of
vLLM again, after its parent. Forked from a process that imports vLLM while the parent does, an engine of a small model
is up in less than half the time (docs/measurements.md). Engines on GPUs do not use it. The tests and the demo start
dozens of engines of one CPU, so it saves minutes, and it costs a patch of one name in vLLM 0.32.

    begin_import()     # first, with the environment set
    import vllm ...
    with forked_core():
        AsyncLLM.from_engine_args(...)
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from cluster.processes.descendants import die_with_parent

IMPORTS = ["vllm.v1.engine.core", "vllm.v1.executor.uniproc_executor", "vllm.v1.worker.cpu_worker"]


class CoreContext(ForkServerContext):
    """A context whose processes have the environment of this moment, as spawned ones have."""

    def Process(self, *, target: Callable, kwargs: dict, name: str) -> multiprocessing.Process:
        return super().Process(target=_call, args=(dict(os.environ), target), kwargs=kwargs, name=name)


def _call(environment: dict[str, str], target: Callable, **kwargs: object) -> None:
    die_with_parent()  # Ray kills the children of a process that it ends, but not their children
    os.environ.clear()
    os.environ.update(environment)
    target(**kwargs)


def begin_import() -> None:
    """Start the process that imports vLLM. It ends with this one."""
    multiprocessing.set_forkserver_preload(IMPORTS)
    forkserver.ensure_running()


@contextmanager
def forked_core() -> Iterator[None]:
    """A block in which vLLM's core process is forked from the process of `begin_import`."""
    from vllm.v1.engine import utils  # CoreEngineProcManager looks the name up there, as of 0.32

    original, utils.get_mp_context = utils.get_mp_context, CoreContext
    try:
        yield
    finally:
        utils.get_mp_context = original
