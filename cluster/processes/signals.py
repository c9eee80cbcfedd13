"""SIGTERM, SIGINT and SIGUSR2 as a request: finish what is at hand, save, exit as preempted."""

import asyncio
import contextlib
import signal
from collections.abc import Iterator

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


class StopRequest:
    """Whether a signal has asked this process to stop. More signals change nothing."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None

    @property
    def is_set(self) -> bool:
        return self.signal_name is not None

    def install(self) -> None:
        """Take the signals. To be repeated after `ray.init`, which takes SIGTERM for itself."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    async def wait(self) -> None:
        """Wait until a signal comes."""
        event = asyncio.Event()
        self._waiter = (asyncio.get_running_loop(), event)
        if not self.is_set:
            await event.wait()

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.is_set:
            return
        self.signal_name = signal.Signals(number).name
        if self._waiter:
            loop, event = self._waiter
            loop.call_soon_threadsafe(event.set)


@contextlib.contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Take these signals for the length of the block; the old handlers come back after it."""
    old = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    stop = StopRequest()
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
