"""Typed errors and the exit code each one ends a command with.

TunesmithError            1   anything that went wrong while running
├── InputError            2   the user's recipe, data or machine; the message names the place and the fix
└── Preempted            75   stopped on request with everything saved; start the same command again to go on
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h


class TunesmithError(Exception):
    """A failure with a message meant for the user."""

    exit_code = EXIT_FAILED


class InputError(TunesmithError):
    """Bad input: the message names the place (file, line, key) and the fix."""

    exit_code = EXIT_BAD_INPUT


class Preempted(TunesmithError):
    """A signal asked the stage to stop; its progress is on disk."""

    exit_code = EXIT_PREEMPTED
