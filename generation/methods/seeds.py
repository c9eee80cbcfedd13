"""Seed tasks as what the filters remember, and as rows of a dataset."""

from collections.abc import Sequence

from generation.filters import Draft
from generation.records import Origin, Record, human_record
from generation.seed_tasks import SeedTask


def seed_drafts(seeds: Sequence[SeedTask]) -> list[tuple[str, Draft]]:
    """Id and draft of each seed, for filters that judge by what is there already."""
    return [(task.id, Draft(task.instruction, task.instances[0].input if task.instances else "")) for task in seeds]


def seed_records(seeds: Sequence[SeedTask], license_name: str | None) -> list[Record]:
    """The rows that people wrote: every instance whose output is known."""
    return [
        human_record(
            Origin("seed", task.id, seed_ids=(task.id,), license=license_name), task.instruction, instance, position
        )
        for task in seeds
        for position, instance in enumerate(task.instances)
        if instance.output
    ]
