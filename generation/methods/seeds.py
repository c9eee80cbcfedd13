"""Seed tasks as demonstrations, as what the filters remember, and as rows of a dataset."""

import re
from collections.abc import Callable, Sequence

from generation.filters import Draft
from generation.records import Origin, Record, human_record
from generation.seed_tasks import SeedTask


def one_line(instruction: str) -> str:
    """An instruction as a prompt shows it: on one line, and without a colon at its end.

    So `encode_prompt` of Self-Instruct's and of Alpaca's released code has it.
    """
    return re.sub(r"\s+", " ", instruction).strip().rstrip(":")


def seed_drafts(seeds: Sequence[SeedTask]) -> list[tuple[str, Draft]]:
    """Id and draft of each seed, for filters that judge by what is there already."""
    return [(task.id, Draft(task.instruction, task.instances[0].input if task.instances else "")) for task in seeds]


def seed_records(
    seeds: Sequence[SeedTask],
    license_name: str | None,
    layout: Callable[[SeedTask, int], str] | None = None,
) -> list[Record]:
    """The rows that people wrote: every instance whose output is known. layout: makes the user's turn of one."""
    return [
        human_record(
            Origin("seed", task.id, seed_ids=(task.id,), license=license_name),
            task.instruction,
            instance,
            position,
            layout(task, position) if layout else None,
        )
        for task in seeds
        for position, instance in enumerate(task.instances)
        if instance.output
    ]
