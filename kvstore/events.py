"""What comes into a tier and what leaves it, for whoever routes requests by it.

A log is bounded: what is not taken in time is lost, oldest first, and counted.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import KEY_NBYTES, BlockKey, array_to_keys

EventKind = Literal["stored", "removed"]
RemovedWhy = Literal["evicted", "purged", "corrupt", "reset", "by_other"]
"""By its policy or gc; by a person; as it failed to verify; by a reset; by another process of the directory."""


@dataclass(frozen=True, slots=True)
class TierEvent:
    """Blocks that can be found in a tier from now on, or no more: ``why`` says for what reason."""

    kind: EventKind
    tier: str
    packed_keys: bytes
    why: RemovedWhy | None = None

    @property
    def keys(self) -> list[BlockKey]:
        return array_to_keys(np.frombuffer(self.packed_keys, dtype=np.uint8).reshape(-1, KEY_NBYTES))

    def __len__(self) -> int:
        """Blocks."""
        return len(self.packed_keys) // KEY_NBYTES


class EventLog:
    """Thread-safe.

    Args:
        max_blocks: of all events that wait to be taken.
    """

    def __init__(self, max_blocks: int) -> None:
        self.num_lost = 0  # blocks of events that were not taken in time
        self._max_blocks, self._num_blocks = max_blocks, 0
        self._events: deque[TierEvent] = deque()
        self._lock = threading.Lock()

    def add(self, event: TierEvent) -> None:
        with self._lock:
            self._events.append(event)
            self._num_blocks += len(event)
            while self._num_blocks > self._max_blocks:
                lost = len(self._events.popleft())
                self._num_blocks -= lost
                self.num_lost += lost

    def take(self) -> list[TierEvent]:
        """All that wait, oldest first."""
        with self._lock:
            events, self._events = list(self._events), deque()
            self._num_blocks = 0
            return events


class TierEvents:
    """One tier's part of a log."""

    def __init__(self, log: EventLog, tier: str) -> None:
        self._log, self._tier = log, tier

    def stored(self, keys: NDArray[np.uint8]) -> None:
        """keys: uint8, (..., 36)."""
        self._add("stored", keys)

    def removed(self, keys: NDArray[np.uint8], why: RemovedWhy) -> None:
        self._add("removed", keys, why)

    def _add(self, kind: EventKind, keys: NDArray[np.uint8], why: RemovedWhy | None = None) -> None:
        if keys.size:
            self._log.add(TierEvent(kind, self._tier, keys.tobytes(), why))
