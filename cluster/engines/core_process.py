"""vLLM's core, the process that computes, forked from one that imported vLLM while its parent did so too.

vLLM starts it anew on CPUs and in Ray's actors ("spawn"), and there it imports everything once more, after its parent:
half of what an engine of a small model takes to start.

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

IMPORTS = "cluster.engines.core_imports"


class CoreContext(ForkServerContext):
    """Gives what is forked the environment of this moment, as a process started anew would have it."""

    def Process(self, *, target: Callable, kwargs: dict, name: str) -> multiprocessing.Process:
        return super().Process(target=_call, args=(dict(os.environ), target), kwargs=kwargs, name=name)


def _call(environment: dict[str, str], target: Callable, **kwargs: object) -> None:
    die_with_parent()  # Ray, when it ends a process, kills that one's children and not theirs
    os.environ.clear()
    os.environ.update(environment)
    target(**kwargs)


def begin_import() -> None:
    """Start the process that imports vLLM. It ends with this one."""
    multiprocessing.set_forkserver_preload([IMPORTS])
    forkserver.ensure_running()


@contextmanager
def forked_core() -> Iterator[None]:
    """A block in which vLLM's core process is forked from the one that `begin_import` has started."""
    from vllm.v1.engine import utils  # CoreEngineProcManager looks the name up there, as of 0.32

    original, utils.get_mp_context = utils.get_mp_context, CoreContext
    try:
        yield
    finally:
        utils.get_mp_context = original
