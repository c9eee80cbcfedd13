"""Importing the large libraries a fifth faster."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """For a block of imports: they make a million objects and throw few away, and every look for garbage is in vain.

    What the block made is never looked through again, so later collections are faster too.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
