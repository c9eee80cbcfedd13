"""Stop signals are noted by the process that they are sent to, and by no other."""

import asyncio
import signal
import subprocess
import sys

import pytest

from cluster.errors import EXIT_RETRY, Preempted
from cluster.processes.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_every_stop_signal_is_noted_and_the_old_handlers_come_back(number: int) -> None:
    before = {each: signal.getsignal(each) for each in STOP_SIGNALS}
    with StopRequest() as stop:
        stop.install()
        assert not stop.is_set
        signal.raise_signal(number)
        assert stop.is_set and list(stop.pending) == [number]
    assert {each: signal.getsignal(each) for each in STOP_SIGNALS} == before


def test_a_task_waits_for_a_signal() -> None:
    async def main() -> list[str]:
        asyncio.get_running_loop().call_later(0.01, signal.raise_signal, signal.SIGUSR2)
        await stop.wait()
        await stop.wait()
        return stop.names

    with StopRequest() as stop:
        assert asyncio.run(main()) == ["SIGUSR2"]
        signal.raise_signal(signal.SIGTERM)  # with no loop left to wake
        assert stop.names == ["SIGUSR2", "SIGTERM"]


def test_a_signal_interrupts_while_there_is_nothing_to_save() -> None:
    with StopRequest(interrupts=True) as stop:
        with pytest.raises(Preempted, match="SIGTERM came before the stage began"):
            signal.raise_signal(signal.SIGTERM)
        stop.interrupts = False
        signal.raise_signal(signal.SIGTERM)


def test_children_note_nothing_and_more_signals_change_nothing() -> None:
    script = """if True:
        import os, signal, time
        from cluster.processes.signals import STOP_SIGNALS, StopRequest, ignore_stop_signals
        stop = StopRequest().install()
        go_on, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.read(go_on, 1)
            os._exit(40 + stop.is_set)
        for signum in STOP_SIGNALS * 3:
            os.kill(child, signum)
            time.sleep(0.01)
        os.write(tell, b".")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40
        assert not stop.is_set
        for signum in STOP_SIGNALS * 3:
            signal.raise_signal(signum)
        assert stop.is_set
        ignore_stop_signals()
        signal.raise_signal(signal.SIGTERM)
        raise SystemExit(75)
    """
    assert subprocess.run([sys.executable, "-c", script]).returncode == EXIT_RETRY
