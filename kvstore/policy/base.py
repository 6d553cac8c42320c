"""Which slots to evict. A policy knows slots and the order of their use, never bytes or files.

Its state lives in arrays by slot. It is called under its owner's lock, by one thread at a
time. "In" below means inserted and since then neither evicted nor removed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]


class EvictionPolicy(ABC):
    """Args:
    num_slots: slots are 0 .. num_slots - 1.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots

    @abstractmethod
    def insert(self, slots: Slots, tags: NDArray[np.uint64]) -> None:
        """Take in slots that are not in, prefix first.

        Args:
            slots: shape (n,), unique.
            tags: shape (n,); the same content has the same tag each time it comes, so that
                a policy can remember what it evicted.
        """

    @abstractmethod
    def touch(self, slots: Slots) -> None:
        """Note one use of a prefix whose chunks lie in ``slots``, head first; all are in. Its tail is to leave before
        its head."""

    @abstractmethod
    def arrange(self, slots: Slots) -> None:
        """As `touch`, but this is no use: something was inserted behind the prefix's head, by the same request that
        has touched what it found of it."""

    @abstractmethod
    def remove(self, slots: Slots) -> None:
        """Forget slots that left for a reason other than eviction; all are in."""

    @abstractmethod
    def evict(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        """Choose and forget up to n slots that are in and not pinned, best victim first.

        Args:
            n: how many are wanted.
            pinned: shape (num_slots,); True where a slot must stay.
        Returns:
            Shape (m,), m <= n, unique; m < n only if no other slot is in and unpinned.
        """

    @abstractmethod
    def grow(self, num_slots: int) -> None:
        """Accept slots up to num_slots - 1; num_slots is at least the present number."""
