"""Recipes name secrets and never contain them: a value that looks like a token is refused.

A recipe is copied into the run folder, and `ps` and `scontrol show job` show a command line. Others can read both.
"""

import re
from collections.abc import Iterable, Iterator

from cluster.errors import InputError

# Hugging Face, GitHub, OpenAI and the like, AWS, Slack.
_TOKENS = re.compile(
    r"(?<![A-Za-z0-9_])(hf_[A-Za-z0-9]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|sk-[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_]{16,}|AKIA[A-Z0-9]{16}|xox[abprs]-[A-Za-z0-9-]{10,})"
)
_WANDB_KEY = re.compile(r"[0-9a-f]{40}")  # also the form of a commit, so a `revision` may look like it


def looks_like_a_token(key: str, value: str) -> bool:
    """Whether the value of a key has the shape of a secret."""
    if _TOKENS.search(value):
        return True
    return not key.endswith("revision") and _WANDB_KEY.fullmatch(value.rpartition("=")[2].strip()) is not None


def refuse_literal_tokens(values: object) -> None:
    """Raise InputError if a recipe holds what looks like a token. The message does not repeat it."""
    for key, value in _texts(values):
        if looks_like_a_token(key, value):
            raise InputError(
                f"{key}: this looks like a secret, and a recipe is copied into the run folder. Put the secret into an "
                "environment variable and name the variable: export.hub_token={env: HF_TOKEN} for the hub, "
                "slurm.environment=[WANDB_API_KEY] for a Slurm job. Then revoke this secret."
            )


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of all texts in nested mappings and lists. Keys are texts too."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield key or "the recipe", str(name)
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str):
        yield key, value
    elif isinstance(value, Iterable):
        for inner in value:
            yield from _texts(inner, key)
