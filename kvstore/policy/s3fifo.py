"""S3-FIFO: Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023.

New slots enter a small queue of a tenth of the slots and leave it soon unless they are used;
those move to the main queue, where use earns further rounds. A ghost that comes back
enters the main queue.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.policy.base import EvictionPolicy, Slots
from kvstore.policy.recency import Ghosts, RecencyList

_SMALL_PART: Final = 10
_MAX_USES: Final = 3
_USES_TO_MOVE: Final = 1  # its insertion is none
_BATCH: Final = 256


class S3FIFOPolicy(EvictionPolicy):
    """Ghosts are at most as many as the main queue has slots."""

    def __init__(self, num_slots: int) -> None:
        super().__init__(num_slots)
        self._small, self._main = RecencyList(num_slots), RecencyList(num_slots)
        self._ghosts = Ghosts(num_slots - num_slots // _SMALL_PART)
        self._uses = np.zeros(num_slots, dtype=np.uint8)
        self._tags = np.zeros(num_slots, dtype=np.uint64)

    def insert(self, slots: Slots, tags: NDArray[np.uint64]) -> None:
        self._tags[slots], self._uses[slots] = tags, 0
        known = np.fromiter((self._ghosts.take(tag) for tag in tags.tolist()), dtype=np.bool_, count=len(slots))
        self._main.add(slots[known])
        self._small.add(slots[~known])

    def touch(self, slots: Slots) -> None:
        self._uses[slots] = np.minimum(self._uses[slots] + 1, _MAX_USES)

    def arrange(self, slots: Slots) -> None:
        """A queue is in the order of arrival, and stays so: what came in parts leaves as if it had come in one."""
        unused = slots[self._uses[slots] == 0]
        in_small = self._small.holds(unused)
        self._small.arrange(unused[in_small])
        self._main.arrange(unused[~in_small])

    def remove(self, slots: Slots) -> None:
        in_small = self._small.holds(slots)
        self._small.remove(slots[in_small])
        self._main.remove(slots[~in_small])

    def evict(self, n: int, pinned: NDArray[np.bool_]) -> Slots:
        victims: list[Slots] = []
        missing, from_main = n, False
        while missing > 0:
            if len(self._small) > self.num_slots // _SMALL_PART and not from_main:
                got, progress = self._from_small(missing, pinned)
            else:
                got, progress = self._from_main(missing, pinned)
                if not progress:
                    got, progress = self._from_small(missing, pinned)
            from_main = not progress and not from_main
            if not progress and not from_main:
                break
            victims.append(got)
            missing -= len(got)
        return np.concatenate(victims) if victims else np.empty(0, dtype=np.int64)

    def grow(self, num_slots: int) -> None:
        more = num_slots - self.num_slots
        self._small.grow(num_slots)
        self._main.grow(num_slots)
        self._ghosts.capacity = num_slots - num_slots // _SMALL_PART
        self._uses = np.concatenate((self._uses, np.zeros(more, dtype=np.uint8)))
        self._tags = np.concatenate((self._tags, np.zeros(more, dtype=np.uint64)))
        self.num_slots = num_slots

    def _from_small(self, n: int, pinned: NDArray[np.bool_]) -> tuple[Slots, bool]:
        """Victims of the small queue, and whether anything has moved."""
        oldest = self._small.take_oldest(n, pinned)
        moving = self._uses[oldest] >= _USES_TO_MOVE
        self._uses[oldest[moving]] = 0
        self._main.add(oldest[moving][::-1])
        victims = oldest[~moving]
        self._ghosts.add(self._tags[victims].tolist())
        return victims, len(oldest) > 0

    def _from_main(self, n: int, pinned: NDArray[np.bool_]) -> tuple[Slots, bool]:
        oldest = self._main.take_oldest(max(n, _BATCH), pinned)
        unused = np.flatnonzero(self._uses[oldest] == 0)
        seen = len(oldest) if len(unused) <= n else int(unused[n])  # those behind stay where they were
        self._main.put_back(oldest[seen:])
        used = oldest[:seen][self._uses[oldest[:seen]] > 0]
        self._uses[used] -= 1
        self._main.add(used[::-1])
        return oldest[unused[:n]], len(oldest) > 0
