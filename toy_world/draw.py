"""Draws of content, shared by the families."""

from random import Random

from toy_world import words


def some(rng: Random, low: int, high: int, pool: tuple[str, ...] = words.CONTENT_WORDS) -> list[str]:
    """`low` to `high` different words of `pool`."""
    return rng.sample(pool, rng.randint(low, high))


def numbers(rng: Random, low: int, high: int, below: int = 100) -> list[str]:
    """`low` to `high` different numbers from 0 to `below` - 1."""
    return [str(number) for number in rng.sample(range(below), rng.randint(low, high))]


def content(words_: list[str], **others: str) -> dict[str, str]:
    return {"c": " ".join(words_), **others}
