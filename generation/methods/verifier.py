"""A verifier: a Python function of the user that scores answers, named in the recipe as `module:function`.

The module is installed, or lies in the working directory.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable

from cluster.errors import InputError

# (instruction, input, output, reference) -> score. A higher score is better. The reference is the seed's output,
# and empty if that is not known.
Verifier = Callable[[str, str, str, str], float]


def load_verifier(path: str) -> Verifier:
    """Load the function `module:function` and wrap it in a check of its scores.

    Raises InputError if it cannot be loaded. A call raises InputError if the function raises or returns no number.
    """
    module, _, name = path.partition(":")
    if (working_dir := os.getcwd()) not in sys.path:
        sys.path.append(working_dir)  # at the end, so that no folder there hides an installed package
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # loading a module can raise anything
        raise InputError(
            f"synthesize.verifier: cannot load {path}: {type(error).__name__}: {error}. Give module:function; "
            "the module must be installed or lie in the working directory."
        ) from error
    if not callable(function):
        raise InputError(f"synthesize.verifier: {path} is of type {type(function).__name__}, not a function.")

    def verify(instruction: str, input_text: str, output: str, reference: str) -> float:
        try:
            score = float(function(instruction, input_text, output, reference))
        except Exception as error:  # the user's code can raise anything
            why = f"{type(error).__name__}: {error}"
            raise InputError(_failed(path, why, instruction, input_text, output)) from error
        if math.isnan(score):
            raise InputError(_failed(path, "its score is not a number", instruction, input_text, output))
        return score

    return verify


def _failed(path: str, why: str, instruction: str, input_text: str, output: str) -> str:
    return (
        f"synthesize.verifier: {path} failed: {why}; instruction {instruction[:200]!r}, input {input_text[:200]!r}, "
        f"output {output[:200]!r}. Fix the function and start again: the answers stay in the request log."
    )
