"""Gives out slots best-fit in contiguous runs, so that a prefix reads back in few calls.

Knows numbers only. Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class RunAllocator:
    """Free slots as maximal runs ``[start, start + length)``, kept sorted by length."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.num_free = 0
        self._by_length: list[tuple[int, int]] = []  # (length, start), sorted
        self._starts: list[int] = []  # sorted
        self._length_at: dict[int, int] = {}  # start -> length
        if num_slots:
            self._add(0, num_slots)

    def allocate(self, n: int) -> Slots:
        """Take up to n slots: the smallest run that holds them, else the largest ones.

        Returns:
            Ascending within each run; shorter than n where fewer are free.
        """
        taken: list[NDArray[np.int64]] = []
        while n > 0 and self._by_length:
            at = min(bisect_left(self._by_length, (n, -1)), len(self._by_length) - 1)
            length, start = self._by_length[at]
            self._drop(start, length)
            used = min(n, length)
            if used < length:
                self._add(start + used, length - used)
            taken.append(np.arange(start, start + used, dtype=np.int64))
            n -= used
        return np.concatenate(taken) if taken else np.empty(0, dtype=np.int64)

    def take(self, slots: Slots) -> Slots:
        """Take those of these slots that are free; returns them, ascending."""
        found: list[NDArray[np.int64]] = []
        for start, length in runs(slots):
            for run_start in self._overlapping(start, start + length):
                run_length = self._length_at[run_start]
                low, high = max(start, run_start), min(start + length, run_start + run_length)
                self._drop(run_start, run_length)
                if run_start < low:
                    self._add(run_start, low - run_start)
                if high < run_start + run_length:
                    self._add(high, run_start + run_length - high)
                found.append(np.arange(low, high, dtype=np.int64))
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def free(self, slots: Slots) -> None:
        """Give back slots that are taken, in any order."""
        for start, length in runs(slots):
            at = bisect_left(self._starts, start)
            if at and (before := self._starts[at - 1]) + self._length_at[before] == start:
                before_length = self._length_at[before]
                self._drop(before, before_length)
                start, length = before, before_length + length
            after_length = self._length_at.get(start + length)
            if after_length is not None:
                self._drop(start + length, after_length)
                length += after_length
            self._add(start, length)

    def grow(self, num_slots: int) -> None:
        """Add free slots up to num_slots - 1."""
        if num_slots > self.num_slots:
            added = np.arange(self.num_slots, num_slots, dtype=np.int64)
            self.num_slots = num_slots
            self.free(added)

    def num_runs(self) -> int:
        return len(self._by_length)

    def _overlapping(self, start: int, end: int) -> list[int]:
        low = bisect_left(self._starts, start)
        if low and self._starts[low - 1] + self._length_at[self._starts[low - 1]] > start:
            low -= 1
        return self._starts[low : bisect_left(self._starts, end)]

    def _add(self, start: int, length: int) -> None:
        insort(self._by_length, (length, start))
        insort(self._starts, start)
        self._length_at[start] = length
        self.num_free += length

    def _drop(self, start: int, length: int) -> None:
        del self._by_length[bisect_left(self._by_length, (length, start))]
        del self._starts[bisect_left(self._starts, start)]
        del self._length_at[start]
        self.num_free -= length


def runs(slots: Slots) -> list[tuple[int, int]]:
    """Slots as maximal ``(start, length)`` runs, ascending."""
    if not len(slots):
        return []
    ordered = np.sort(slots)
    breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
    starts = ordered[np.concatenate(([0], breaks))]
    lengths = np.diff(np.concatenate((breaks, [len(ordered)])), prepend=0)
    return list(zip(starts.tolist(), lengths.tolist(), strict=True))
