"""The contract of a tier below host memory.

A lower tier stores whole sealed slots. It reads them into, and writes them from, slots of
the host arena, named by number. It never raises for what is wrong with its storage: it
answers with misses, counts, turns itself off, and comes back (`TierHealth`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kvstore.jobs import ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, Slots


@dataclass(frozen=True, slots=True)
class FoundChunks:
    """n chunks of a lower tier that hold the asked-for keys one after the other.

    ``places`` and ``generations`` mean something to the tier only. A chunk found is not
    pinned: it may be gone when it is read, which is a miss.
    """

    places: Sequence[Any] | NDArray[np.int64]  # (n,)
    num_keys: NDArray[np.int64]  # (n,): of the asked-for keys, how many each one holds
    generations: NDArray[np.uint64]  # (n,)

    def __len__(self) -> int:
        return len(self.num_keys)

    def __getitem__(self, part: slice) -> FoundChunks:
        return FoundChunks(self.places[part], self.num_keys[part], self.generations[part])

    @property
    def total_keys(self) -> int:
        return int(self.num_keys.sum())


NO_CHUNKS: Final = FoundChunks((), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.uint64))


@dataclass(frozen=True, slots=True)
class SealedChunks:
    """n chunks in host memory whose trailers are written; the caller holds their slots."""

    host_slots: Slots  # (n,)
    keys: KeyArray  # (n, blocks_per_chunk, KEY_NBYTES)
    namespace: bytes
    generations: NDArray[np.uint64]  # (n,)


@dataclass(slots=True)
class TierStats:
    """Counters of one tier since it was opened; sizes now."""

    name: str
    state: str = "on"  # "on", "read-only" or "off"
    problem: str = ""  # what is wrong now, for a person
    capacity_blocks: int | None = None
    used_blocks: int | None = None
    capacity_nbytes: int = 0
    used_nbytes: int = 0
    pinned_blocks: int = 0
    hit_blocks: int = 0
    miss_blocks: int = 0
    read_nbytes: int = 0
    written_nbytes: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    evicted_blocks: int = 0
    corrupt_chunks: int = 0
    failed_chunks: int = 0  # the storage raised an error
    late_chunks: int = 0  # past the deadline
    dropped_blocks: int = 0  # not stored: tier off, or write-behind too far behind
    misses_by_reason: dict[str, int] = field(default_factory=dict)


class LowerTier(ABC):
    """Thread-safe: `find_prefix` and `read` from any thread, `write` from one at a time."""

    name: str

    @abstractmethod
    def find_prefix(self, keys: Sequence[BlockKey]) -> FoundChunks:
        """The chunks that hold the leading keys, in prefix order. Touches no payload."""

    @abstractmethod
    def read(self, chunks: FoundChunks, host_slots: Slots, deadline: float) -> ReadJob:
        """Start to read chunks into ``host_slots``, which belong to the job until it yields
        or releases them. A chunk that fails to verify is dropped from the tier and counted."""

    @abstractmethod
    def write(self, chunks: SealedChunks) -> NDArray[np.bool_]:
        """Store chunks, prefix first; returns when no transfer uses their slots any more.

        Returns:
            Shape (n,): which are stored (or were already). False is no error.
        """

    @abstractmethod
    def flush(self, deadline: float) -> bool:
        """Make durable what `write` stored; False if it could not be done by the deadline."""

    @abstractmethod
    def set_namespace(self, namespace: bytes) -> None:
        """Look up in another namespace from now on; what is stored elsewhere is never a hit."""

    @abstractmethod
    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete the chunks that hold these keys, so that no rebuild brings them back."""

    @abstractmethod
    def stats(self) -> TierStats: ...

    @abstractmethod
    def close(self) -> None:
        """Release files and threads; what was written but not flushed may be lost by a power cut only."""
