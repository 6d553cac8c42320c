"""Least recently used, leaf first: a prefix's tail leaves before its head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.base import EvictionPolicy, Slots


class LRUPolicy(EvictionPolicy):
    """Stamps by slot; within a call the head gets the newest, so stamps fall along a prefix."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._clock = 1
        self._stamps = np.zeros(num_slots, dtype=np.int64)  # 0: not in

    def insert(self, slots: Slots, tags: NDArray[np.uint64]) -> None:
        self.touch(slots)

    def touch(self, slots: Slots) -> None:
        self._clock += len(slots)
        self._stamps[slots] = self._clock - np.arange(len(slots))

    def remove(self, slots: Slots) -> None:
        self._stamps[slots] = 0

    def evict(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        candidates = np.flatnonzero((self._stamps > 0) & ~pinned)
        stamps = self._stamps[candidates]
        if n < len(candidates):
            candidates = candidates[np.argpartition(stamps, n - 1)[:n]] if n else candidates[:0]
        victims = candidates[np.argsort(self._stamps[candidates])]
        self._stamps[victims] = 0
        return victims

    def grow(self, num_slots: int) -> None:
        self._stamps = np.concatenate((self._stamps, np.zeros(num_slots - self.num_slots, dtype=np.int64)))
        self.num_slots = num_slots
