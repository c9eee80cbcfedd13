"""A function of the user's that scores answers, named in the recipe as `module:function`.

The module is an installed one or one in the working directory.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable

from cluster.errors import InputError

# instruction, input, output, reference (the given output; empty: not known) -> score, of which more is better
Verifier = Callable[[str, str, str, str], float]


def load_verifier(path: str) -> Verifier:
    """The function that `module:function` names, with its answers checked.

    Raises InputError if it cannot be had, and when it is called, if it raises or gives no number.
    """
    module, _, name = path.partition(":")
    if (working_dir := os.getcwd()) not in sys.path:
        sys.path.append(working_dir)  # last, so that no folder there hides an installed package
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the module raises when it is loaded
        raise InputError(
            f"synthesize.verifier: cannot load {path}: {type(error).__name__}: {error}. Give module:function, of "
            "an installed module or of one in the working directory."
        ) from error
    if not callable(function):
        raise InputError(f"synthesize.verifier: {path} is {type(function).__name__}, not a function.")

    def verify(instruction: str, input_text: str, output: str, reference: str) -> float:
        try:
            score = float(function(instruction, input_text, output, reference))
        except Exception as error:  # it is the user's code
            why = f"{type(error).__name__}: {error}"
            raise InputError(_failed(path, why, instruction, input_text, output)) from error
        if math.isnan(score):
            raise InputError(_failed(path, "its score is not a number", instruction, input_text, output))
        return score

    return verify


def _failed(path: str, why: str, instruction: str, input_text: str, output: str) -> str:
    return (
        f"synthesize.verifier: {path} failed: {why}; instruction {instruction[:200]!r}, input {input_text[:200]!r}, "
        f"output {output[:200]!r}. Mend it and start again: the answers are in the log."
    )
