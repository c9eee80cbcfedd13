"""Filters: what a draft must pass to be kept. Pure functions of a draft and of what is remembered."""

from generation.filters.chain import FilterChain
from generation.filters.drafts import Decision, Draft, Neighbor, Rejection
from generation.filters.instances import Instance, check_instance, check_instances

__all__ = [
    "Decision",
    "Draft",
    "FilterChain",
    "Instance",
    "Neighbor",
    "Rejection",
    "check_instance",
    "check_instances",
]
