"""The signals that ask a process to stop: finish what it is doing, save, and exit as preempted.

with StopRequest() as stop:
    while not stop.is_set:
        ...
"""

import os
import signal
from collections import deque
from collections.abc import Callable
from functools import partial

from cluster.errors import Preempted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Notes the stop signals that this process gets. May be read from any thread.

    A forked child inherits the handler, but its signals are not noted. A system call that a signal interrupts is
    restarted, so that a library which does not do that itself saves a whole file.
    """

    def __init__(self, interrupts: bool = False) -> None:
        """`interrupts`: as long as it is set, a signal raises Preempted at once, because there is nothing to save."""
        self.interrupts = interrupts
        self.names: list[str] = []  # of all signals so far
        self.pending: deque[int] = deque()  # signals that were not passed on to another process yet
        self._owner = os.getpid()
        self._wake: Callable[[], object] | None = None
        self._previous: dict[int, object] = {}

    @property
    def is_set(self) -> bool:
        return bool(self.names)

    def install(self) -> "StopRequest":
        """Take the signals. Call it again after `ray.init`, which takes SIGTERM."""
        for number in STOP_SIGNALS:
            previous = signal.signal(number, self._on_signal)
            self._previous.setdefault(number, previous)
            signal.siginterrupt(number, False)
        return self

    def __enter__(self) -> "StopRequest":
        return self.install()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    async def wait(self) -> None:
        """Wait until a signal comes."""
        import asyncio  # takes a while, and a process whose handlers are not there yet dies of a signal

        event = asyncio.Event()
        self._wake = partial(asyncio.get_running_loop().call_soon_threadsafe, event.set)
        try:
            if not self.is_set:
                await event.wait()
        finally:
            self._wake = None

    def _on_signal(self, number: int, _frame: object) -> None:
        if os.getpid() != self._owner:
            return
        self.names.append(signal.Signals(number).name)
        self.pending.append(number)
        if self._wake:
            self._wake()
        if self.interrupts:
            raise Preempted(f"{self.names[-1]} came before the stage began. The same command starts it.")


def ignore_stop_signals() -> None:
    """Ignore them from now on. There is nothing left to stop, and a signal would replace the exit code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def interrupt_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does. Call it after `ray.init`, which takes SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
