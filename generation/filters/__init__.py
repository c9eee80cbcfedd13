"""Filters: what a draft must pass to be kept. Pure functions of a draft and of what is remembered."""

from generation.filters.chain import FilterChain
from generation.filters.drafts import Draft, Neighbor, Rejection, Verdict
from generation.filters.instances import Instance, check_instance, check_instances

__all__ = [
    "Draft",
    "FilterChain",
    "Instance",
    "Neighbor",
    "Rejection",
    "Verdict",
    "check_instance",
    "check_instances",
]
