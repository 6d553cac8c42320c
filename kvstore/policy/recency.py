"""Slots in the order of their last use, in one array; and a bounded memory of what has left.

What the policies are made of. Knows no keys: a tag is a number that its owner gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]
_OUT: Final = 0  # stamp of a slot that is not in
_SORTED_AT_ONCE: Final = 512


class RecencyList:
    """A stamp a slot, rising with use. Within one call the head of a prefix gets the newest,
    so that stamps fall along the prefix and its tail is oldest.

    The oldest are sorted some hundreds at a time: whoever is used later gets a newer stamp
    than all of them, so what is sorted stays the oldest until it is used up.
    """

    def __init__(self, num_slots: int) -> None:
        self._stamps = np.zeros(num_slots, dtype=np.int64)
        self._clock = _OUT + 1
        self._num_in = 0
        self._forget_order()

    def __len__(self) -> int:
        return self._num_in

    @property
    def nbytes(self) -> int:
        return self._stamps.nbytes + self._sorted.nbytes + self._sorted_stamps.nbytes

    def holds(self, slots: Slots) -> NDArray[np.bool_]:
        """Which of these slots are in."""
        held: NDArray[np.bool_] = self._stamps[slots] != _OUT
        return held

    def add(self, slots: Slots) -> None:
        """Make slots the newest, head first; they may be in or not."""
        self._num_in += len(slots) - int(np.count_nonzero(self._stamps[slots]))
        self._clock += len(slots)
        self._stamps[slots] = self._clock - np.arange(len(slots))

    def arrange(self, slots: Slots) -> None:
        """Give slots that are in each other's places: of those that they have, the head gets the newest."""
        stamps = self._stamps[slots]
        if (stamps[1:] > stamps[:-1]).any():
            self._stamps[slots] = np.sort(stamps)[::-1]
            self._forget_order()

    def remove(self, slots: Slots) -> None:
        """Take out slots that are in."""
        self._stamps[slots] = _OUT
        self._num_in -= len(slots)

    def take_oldest(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        """Take out up to n slots that are not pinned, oldest first."""
        taken: list[Slots] = []
        missing = min(n, self._num_in)
        sorted_anew = False
        while missing > 0:
            if self._next >= len(self._sorted):
                if sorted_anew and not taken:
                    break
                self._sort_oldest(missing, pinned)
                sorted_anew = True
                if not len(self._sorted):
                    break
            part = slice(self._next, self._next + missing)
            slots, stamps = self._sorted[part], self._sorted_stamps[part]
            self._next += len(slots)
            good = slots[(self._stamps[slots] == stamps) & ~pinned[slots]]
            self.remove(good)
            taken.append(good)
            missing -= len(good)
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def put_back(self, slots: Slots) -> None:
        """Make slots the oldest again, oldest first; what `take_oldest` took too many of."""
        if not len(slots):
            return
        low = int(self._stamps[self._stamps != _OUT].min(initial=self._clock))
        self._stamps[slots] = low - np.arange(len(slots), 0, -1)
        self._num_in += len(slots)
        self._forget_order()

    def grow(self, num_slots: int) -> None:
        self._stamps = np.concatenate((self._stamps, np.zeros(num_slots - len(self._stamps), dtype=np.int64)))

    def _sort_oldest(self, n: int, pinned: NDArray[np.bool_]) -> None:
        candidates = np.flatnonzero((self._stamps != _OUT) & ~pinned)
        stamps = self._stamps[candidates]
        wanted = max(n, _SORTED_AT_ONCE, len(candidates) >> 6)
        if wanted < len(candidates):
            oldest = np.argpartition(stamps, wanted)[:wanted]
            candidates, stamps = candidates[oldest], stamps[oldest]
        order = np.argsort(stamps)
        self._sorted, self._sorted_stamps, self._next = candidates[order], stamps[order], 0

    def _forget_order(self) -> None:
        self._sorted = np.empty(0, dtype=np.int64)
        self._sorted_stamps = np.empty(0, dtype=np.int64)
        self._next = 0


class Ghosts:
    """Tags of what has left, first in first out, at most ``capacity`` of them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tags: dict[int, None] = {}  # ordered by insertion

    def __len__(self) -> int:
        return len(self._tags)

    def add(self, tags: Iterable[int]) -> None:
        """Remember tags; the oldest are forgotten where there are too many."""
        for tag in tags:
            self._tags.pop(tag, None)
            self._tags[tag] = None
        oldest = list(islice(self._tags, max(0, len(self._tags) - self.capacity)))  # a dict is slow to find its first
        for tag in oldest:
            del self._tags[tag]

    def take(self, tag: int) -> bool:
        """Forget a tag; whether it was remembered."""
        if tag in self._tags:
            del self._tags[tag]
            return True
        return False
