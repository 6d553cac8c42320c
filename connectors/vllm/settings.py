"""``kv_connector_extra_config`` as settings: what is allowed, and what it comes to in blocks.

A ConfigError of this file begins with the setting's key; `named_in` says where that was given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Self

from kvstore.config import DiskTierConfig, HostTierConfig, JournalConfig, SharedTierConfig, StoreConfig
from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity
from kvstore.slot import SlotFormat

_NAMES: Final = {  # of a store's settings, as they are called here
    "host.num_blocks": "num_cpu_blocks",
    "host.eviction_policy": "eviction_policy",
    "disk.path": "disk_path",
    "disk.capacity_nbytes": "disk_capacity_bytes",
    "disk.on_mismatch": "disk_on_mismatch",
    "disk.eviction_policy": "eviction_policy",
    "shared.path": "shared_storage_path",
    "shared.capacity_nbytes": "shared_capacity_bytes",
    "journal.path": "journal_path",
    "journal.capacity_nbytes": "journal_capacity_bytes",
}


EXTRA_CONFIG: Final = "kv_connector_extra_config"


@contextmanager
def named_in(where: str) -> Iterator[None]:
    """Errors about a setting say where it was given."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(f"{where}.{e}") from e


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Args:
    block_size: tokens stored as one unit, a multiple of the engine's block size; 0 for that itself.
    num_cpu_blocks: units of host memory, per worker.
    cpu_bytes_to_use: host memory of all workers together, instead.
    model_revision: immutable; by default found out, or a digest of the weights.
    """

    block_size: int = 0
    num_cpu_blocks: int | None = None
    cpu_bytes_to_use: int | None = None
    disk_path: str | None = None
    disk_capacity_bytes: int | None = None
    disk_on_mismatch: str = "refuse"
    shared_storage_path: str | None = None
    shared_capacity_bytes: int | None = None
    eviction_policy: str = "lru"
    integrity_key_file: str | None = None
    load_timeout_s: float = 5.0
    model_revision: str | None = None
    journal_path: str | None = None
    journal_capacity_bytes: int = 64 << 20

    @classmethod
    def of(cls, extra: Mapping[str, Any], required: tuple[str, ...], excluded: tuple[str, ...] = ()) -> Self:
        """Raises ConfigError for a key that is not known, or is missing."""
        allowed = [f.name for f in dataclasses.fields(cls) if f.name not in excluded]
        for key in extra:
            if key not in allowed:
                raise ConfigError(f"{key}: not known; allowed: {', '.join(allowed)}")
        for key, types in (("block_size", int), ("num_cpu_blocks", int), ("cpu_bytes_to_use", int)):
            if key in extra and (isinstance(extra[key], bool) or not isinstance(extra[key], types)):
                raise ConfigError(f"{key}: {extra[key]!r}; give a whole number")
        settings = cls(**extra)
        for key in required:
            if getattr(settings, key) is None:
                raise ConfigError(f"{key}: not set; this connector needs it")
        for path, size in (("disk_path", "disk_capacity_bytes"), ("shared_storage_path", "shared_capacity_bytes")):
            if (getattr(settings, path) is None) != (getattr(settings, size) is None):
                raise ConfigError(f"{path}: give it and {size}, or neither")
        return settings

    def store_config(self, identity: KVIdentity, *, default_host_nbytes: int, event_log_blocks: int) -> StoreConfig:
        """What this comes to for the blocks of one engine."""
        per_chunk = self._blocks_per_chunk(identity.layout.block_size)
        slot_nbytes = SlotFormat.of(identity, per_chunk).slot_nbytes
        num_chunks = self.num_cpu_blocks
        if num_chunks is None:
            host_nbytes = default_host_nbytes if self.cpu_bytes_to_use is None else self.cpu_bytes_to_use
            num_chunks = host_nbytes // slot_nbytes
            if num_chunks < 1:
                raise ConfigError(
                    f"cpu_bytes_to_use: {host_nbytes} is less than one block of {slot_nbytes} bytes; give more"
                )
        elif self.cpu_bytes_to_use is not None:
            raise ConfigError("num_cpu_blocks: give it or cpu_bytes_to_use, not both")
        try:
            return self._config(identity, num_chunks * per_chunk, per_chunk, event_log_blocks)
        except ConfigError as e:  # in the words of who set it
            key, colon, rest = str(e).partition(":")
            raise ConfigError(f"{_NAMES.get(key, key)}{colon}{rest}") from e

    def _config(
        self, identity: KVIdentity, num_host_blocks: int, blocks_per_chunk: int, event_log_blocks: int
    ) -> StoreConfig:
        disk = shared = None
        if self.disk_path is not None:
            disk = DiskTierConfig(
                path=self.disk_path, capacity_nbytes=self.disk_capacity_bytes, eviction_policy=self.eviction_policy,
                on_mismatch=self.disk_on_mismatch,  # type: ignore[arg-type]
            )  # fmt: skip
        if self.shared_storage_path is not None:
            assert self.shared_capacity_bytes is not None
            shared = SharedTierConfig(path=self.shared_storage_path, capacity_nbytes=self.shared_capacity_bytes)
        journal = None
        if self.journal_path is not None:
            journal = JournalConfig(path=self.journal_path, capacity_nbytes=self.journal_capacity_bytes)
        return StoreConfig(
            identity=identity,
            host=HostTierConfig(num_blocks=num_host_blocks, eviction_policy=self.eviction_policy),
            disk=disk,
            shared=shared,
            blocks_per_chunk=blocks_per_chunk,
            io="process",
            put_timeout_s=0.0,
            load_timeout_s=self.load_timeout_s,
            integrity_key_file=self.integrity_key_file,
            journal=journal,
            event_log_blocks=event_log_blocks,
        )

    def _blocks_per_chunk(self, engine_block_size: int) -> int:
        if self.block_size < 0 or self.block_size % engine_block_size:
            raise ConfigError(
                f"block_size: {self.block_size!r}; "
                f"give a multiple of the engine's block size, {engine_block_size} tokens"
            )
        return max(1, self.block_size // engine_block_size)
