"""A tiered store for the KV cache of token prefixes: host memory, disk, a shared path."""

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
