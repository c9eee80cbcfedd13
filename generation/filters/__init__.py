"""Filters accept or reject drafts. A decision depends only on the draft and on the drafts remembered before it."""

from generation.filters.chain import FilterChain
from generation.filters.drafts import Decision, Draft, Instance, Neighbor, Rejection

__all__ = [
    "Decision",
    "Draft",
    "FilterChain",
    "Instance",
    "Neighbor",
    "Rejection",
]
