"""Eviction policies, one a file. `make_policy` finds them by name."""

from __future__ import annotations

import importlib
from typing import Final

from kvstore.errors import ConfigError
from kvstore.policy.arc import ARCPolicy
from kvstore.policy.base import EvictionPolicy
from kvstore.policy.lru import LRUPolicy
from kvstore.policy.s3fifo import S3FIFOPolicy

POLICIES: Final[dict[str, type[EvictionPolicy]]] = {"lru": LRUPolicy, "arc": ARCPolicy, "s3fifo": S3FIFOPolicy}


def make_policy(name: str, num_slots: int) -> EvictionPolicy:
    """A policy by its name, or a user's own as ``package.module:Class``.

    Raises:
        ConfigError: there is no such policy.
    """
    known = POLICIES.get(name)
    if known is not None:
        return known(num_slots)
    module_name, colon, class_name = name.partition(":")
    allowed = f"allowed: {', '.join(POLICIES)}, or package.module:Class"
    if not colon:
        raise ConfigError(f"eviction_policy: {name!r} is not a policy; {allowed}")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ConfigError(f"eviction_policy: {name!r} cannot be imported ({e}); {allowed}") from e
    if not (isinstance(found, type) and issubclass(found, EvictionPolicy)):
        raise ConfigError(f"eviction_policy: {name!r} is not a subclass of kvstore.policy.EvictionPolicy; {allowed}")
    return found(num_slots)


__all__ = ["POLICIES", "ARCPolicy", "EvictionPolicy", "LRUPolicy", "S3FIFOPolicy", "make_policy"]
