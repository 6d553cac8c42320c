"""ARC: Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache", FAST 2003.

``recent`` (T1) holds what was used once, ``frequent`` (T2) what was used more often; ghosts
(B1, B2) of what left each of them move the target size of ``recent``. Evictions here come
in batches and apart from insertions, so the paper's case analysis is split between the two.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.base import EvictionPolicy, Slots
from kvstore.policy.recency import Ghosts, RecencyList


class ARCPolicy(EvictionPolicy):
    """Ghosts of both lists are at most as many as there are slots."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._recent, self._frequent = RecencyList(num_slots), RecencyList(num_slots)
        self._recent_ghosts, self._frequent_ghosts = Ghosts(num_slots // 2), Ghosts(num_slots // 2)
        self._tags = np.zeros(num_slots, dtype=np.uint64)
        self._target = 0.0  # slots that ``recent`` should have; the paper's p

    def insert(self, slots: Slots, tags: NDArray[np.uint64]) -> None:
        self._tags[slots] = tags
        known = np.fromiter((self._recall(tag) for tag in tags.tolist()), dtype=np.bool_, count=len(slots))
        self._frequent.add(slots[known])
        self._recent.add(slots[~known])

    def touch(self, slots: Slots) -> None:
        self._recent.remove(slots[self._recent.holds(slots)])
        self._frequent.add(slots)

    def arrange(self, slots: Slots) -> None:
        in_recent = self._recent.holds(slots)
        self._recent.add(slots[in_recent])
        self._frequent.add(slots[~in_recent])

    def remove(self, slots: Slots) -> None:
        in_recent = self._recent.holds(slots)
        self._recent.remove(slots[in_recent])
        self._frequent.remove(slots[~in_recent])

    def evict(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        too_many = min(n, max(0, len(self._recent) - int(self._target)))
        recent = self._recent.take_oldest(too_many, pinned)
        frequent = self._frequent.take_oldest(n - len(recent), pinned)
        more = self._recent.take_oldest(n - len(recent) - len(frequent), pinned)
        recent = np.concatenate((recent, more))
        self._recent_ghosts.add(self._tags[recent].tolist())
        self._frequent_ghosts.add(self._tags[frequent].tolist())
        return np.concatenate((recent, frequent))

    def grow(self, num_slots: int) -> None:
        self._recent.grow(num_slots)
        self._frequent.grow(num_slots)
        self._recent_ghosts.capacity = self._frequent_ghosts.capacity = num_slots // 2
        self._tags = np.concatenate((self._tags, np.zeros(num_slots - self.num_slots, dtype=np.uint64)))
        self.num_slots = num_slots

    def _recall(self, tag: int) -> bool:
        """Whether a ghost comes back; if so, the target moves towards the list it left."""
        num_recent, num_frequent = len(self._recent_ghosts), len(self._frequent_ghosts)
        if self._recent_ghosts.take(tag):
            self._target = min(self.num_slots, self._target + max(1.0, num_frequent / num_recent))
            return True
        if self._frequent_ghosts.take(tag):
            self._target = max(0.0, self._target - max(1.0, num_recent / num_frequent))
            return True
        return False
