"""The wish to stop, as a signal brings it: noted at once, heeded by all ranks at the same step boundary."""

import os
import signal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Set by a signal, read at step boundaries. A second signal changes nothing, and children of ours do not react.

    A system call that a signal meets is taken up again, so that one during a save does not spoil the file at hand.
    """

    def __init__(self) -> None:
        self.requested = False
        owner = os.getpid()

        def note(signum: int, frame: object) -> None:
            if os.getpid() == owner:
                self.requested = True

        for signum in STOP_SIGNALS:
            signal.signal(signum, note)
            signal.siginterrupt(signum, False)

    def done(self) -> None:
        """Nothing is left to stop: ignore signals, while the interpreter ends too, so that the exit code stays."""
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)
