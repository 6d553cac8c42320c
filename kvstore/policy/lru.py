"""Least recently used, leaf first: a prefix's tail leaves before its head."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.base import EvictionPolicy, Slots
from kvstore.policy.recency import RecencyList


class LRUPolicy(EvictionPolicy):
    """One list; its order within a call makes it leaf first."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._list = RecencyList(num_slots)

    def insert(self, slots: Slots, tags: NDArray[np.uint64]) -> None:
        self._list.add(slots)

    def touch(self, slots: Slots) -> None:
        self._list.add(slots)

    def arrange(self, slots: Slots) -> None:
        self._list.add(slots)

    def remove(self, slots: Slots) -> None:
        self._list.remove(slots)

    def evict(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        return self._list.take_oldest(n, pinned)

    def grow(self, num_slots: int) -> None:
        self._list.grow(num_slots)
        self.num_slots = num_slots
