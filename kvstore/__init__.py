"""A tiered store for the KV cache of token prefixes: host memory, disk, a shared path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvstore.config import (
    DeviceTierConfig,
    DiskTierConfig,
    HostTierConfig,
    JournalConfig,
    SharedTierConfig,
    StoreConfig,
)
from kvstore.identity import KVIdentity, Placement
from kvstore.keys import BlockKey, hash_blocks
from kvstore.layout import KVLayout

if TYPE_CHECKING:
    from kvstore.store import StoreStats, TieredStore

__all__ = [
    "BlockKey",
    "DeviceTierConfig",
    "DiskTierConfig",
    "HostTierConfig",
    "JournalConfig",
    "KVIdentity",
    "KVLayout",
    "Placement",
    "SharedTierConfig",
    "StoreConfig",
    "StoreStats",
    "TieredStore",
    "hash_blocks",
]


def __getattr__(name: str) -> Any:
    """The store itself, once it is asked for: it needs torch, which takes seconds to import, and a command that only
    looks at what is stored does not."""
    if name not in ("StoreStats", "TieredStore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvstore import store

    return getattr(store, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
