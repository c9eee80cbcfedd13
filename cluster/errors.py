"""Errors, and the exit codes of commands that end with them.

TunesmithError            1   something went wrong while running
├── InputError            2   the user's recipe, data or machine is wrong; the message names the place and the fix
└── Preempted            75   stopped on request with everything saved; the same command continues
"""

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_LIVE = 3  # of a question about a run that has not ended
EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h: ended early, by a request or a crash, and the same command continues


class TunesmithError(Exception):
    """A failure with a message for the user."""

    exit_code = EXIT_FAILED


class InputError(TunesmithError):
    """Bad input: the message names the place (file, line, key) and the fix."""

    exit_code = EXIT_BAD_INPUT


class Preempted(TunesmithError):
    """A signal asked the stage to stop; its progress is on disk."""

    exit_code = EXIT_RETRY
