"""All lower tiers of a store behind one interface, wherever their I/O runs.

`ThreadIo` runs them in threads of this process. `kvstore.io_process` runs a `ThreadIo` in a
process of its own behind the same interface. Slots are those of the host arena.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kvstore.arena import HostArena
from kvstore.config import StoreConfig
from kvstore.events import EventLog, TierEvent, TierEvents
from kvstore.jobs import ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, SlotCodec, Slots
from kvstore.tiers.base import NO_CHUNKS, FoundChunks, LowerTier, TierStats
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.shared import SharedTier
from kvstore.write_behind import WriteBehind

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Located:
    """Chunks of one tier, what the service knows that tier by, and the tier's name."""

    source: Any
    chunks: FoundChunks
    tier: str

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, part: slice) -> Located:
        return Located(self.source, self.chunks[part], self.tier)


NOWHERE: Final = Located(None, NO_CHUNKS, "")


class IoService(ABC):
    """The I/O side of a store. Thread-safe."""

    @abstractmethod
    def find_prefix(self, keys: Sequence[BlockKey]) -> Located:
        """Chunks of the first tier, from the top, that holds the leading key; none where no tier does."""

    @abstractmethod
    def read(self, located: Located, host_slots: Slots, deadline: float) -> ReadJob:
        """See `LowerTier.read`."""

    @abstractmethod
    def store(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        """See `WriteBehind.submit`."""

    @abstractmethod
    def flush(self, deadline: float) -> bool:
        """True once all that was stored is durable in every tier."""

    @abstractmethod
    def set_namespace(self, namespace: bytes) -> None: ...

    @abstractmethod
    def purge(self, keys: Sequence[BlockKey]) -> int: ...

    @abstractmethod
    def stats(self) -> list[TierStats]: ...

    @abstractmethod
    def take_events(self) -> list[TierEvent]:
        """What has come and gone in all tiers since the last call, where the configuration asks for it."""

    @abstractmethod
    def close(self) -> None: ...


class ThreadIo(IoService):
    """Lower tiers in threads of this process."""

    def __init__(self, config: StoreConfig, arena: HostArena, codec: SlotCodec, namespace: bytes) -> None:
        """Raises ConfigError for a wrong setting; what was opened before is closed again."""
        rows = arena.rows
        self._fmt = codec.fmt
        self._tiers: list[LowerTier] = []
        self._log = EventLog(config.event_log_blocks)
        disk_events, shared_events = (
            TierEvents(self._log, tier) if config.event_log_blocks else None
            for tier in (DiskTier.name, SharedTier.name)
        )
        try:
            if config.disk is not None:
                self._tiers.append(DiskTier(config.disk, config.identity, rows, codec, namespace, disk_events))
            if config.shared is not None:
                per_chunk = config.blocks_per_chunk
                self._tiers.append(
                    SharedTier(config.shared, config.identity, per_chunk, rows, codec, namespace, shared_events)
                )
        except BaseException:
            for tier in self._tiers:
                tier.close()
            raise
        self._write_behind = WriteBehind(self._tiers, rows, codec, config.stall_s)

    def find_prefix(self, keys: Sequence[BlockKey]) -> Located:
        for tier in self._tiers:
            found = tier.find_prefix(keys)
            if len(found):
                return Located(tier, found, tier.name)
        return NOWHERE

    def read(self, located: Located, host_slots: Slots, deadline: float) -> ReadJob:
        tier: LowerTier = located.source
        return tier.read(located.chunks, host_slots, deadline)

    def store(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        self._write_behind.submit(host_slots, keys, namespace, on_done)

    def flush(self, deadline: float) -> bool:
        drained = self._write_behind.drain(deadline)
        return all([tier.flush(deadline) for tier in self._tiers]) and drained

    def set_namespace(self, namespace: bytes) -> None:
        for tier in self._tiers:
            tier.set_namespace(namespace)

    def purge(self, keys: Sequence[BlockKey]) -> int:
        self._write_behind.drain(time.monotonic() + CLOSE_TIMEOUT_S)
        return sum(tier.purge(keys) for tier in self._tiers)

    def stats(self) -> list[TierStats]:
        all_stats = [tier.stats() for tier in self._tiers]
        dropped, stalled = self._write_behind.dropped_chunks(), self._write_behind.stalled()
        for stats, chunks, is_stalled in zip(all_stats, dropped, stalled, strict=True):
            stats.dropped_blocks = chunks * self._fmt.blocks_per_chunk
            if is_stalled and stats.state == "on":
                stats.state = "read-only"
        return all_stats

    def take_events(self) -> list[TierEvent]:
        return self._log.take()

    def close(self) -> None:
        if not self._write_behind.close(time.monotonic() + CLOSE_TIMEOUT_S):
            logger.warning("closed with writes that have not returned within %g s", CLOSE_TIMEOUT_S)
        for tier in self._tiers:
            tier.close()
