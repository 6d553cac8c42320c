"""Eviction policies by name."""

from __future__ import annotations

from kvstore.policy.base import EvictionPolicy
from kvstore.policy.lru import LRUPolicy


def make_policy(name: str, num_slots: int) -> EvictionPolicy:
    """The policy of a name."""
    return LRUPolicy(num_slots)
