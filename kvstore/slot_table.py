"""The control plane of one tier's slots: which keys they hold, which are free, pinned, next to go.

    free  --allocate-->  taken  --publish-->  ready  --evict / drop-->  gone  --release-->  free

A slot that goes while it is pinned waits in limbo and is released with its last pin. Knows
no bytes and does no I/O. Not thread-safe: its owner holds a lock.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import RunAllocator
from kvstore.events import RemovedWhy, TierEvents
from kvstore.index import BlockIndex
from kvstore.keys import BlockKey
from kvstore.policy import make_policy
from kvstore.slot import KeyArray, Slots

_ONE = np.int32(1)  # of the counters' own type, else `ufunc.at` is ten times slower


class SlotTable:
    """Args:
    num_slots: slots it may ever hold.
    free_slots: slots that exist now; `grow` adds more.
    events: told of every key that can be found, or no more.
    """

    def __init__(
        self,
        num_slots: int,
        blocks_per_chunk: int,
        policy: str,
        free_slots: int | None = None,
        events: TierEvents | None = None,
    ) -> None:
        self.blocks_per_chunk, self._events = blocks_per_chunk, events
        self.index = BlockIndex(num_slots, blocks_per_chunk)
        self.policy = make_policy(policy, num_slots)
        self.allocator = RunAllocator(num_slots if free_slots is None else free_slots)
        self.evicted_slots = 0
        self._pins = np.zeros(num_slots, dtype=np.int32)
        self._pinned = np.zeros(num_slots, dtype=np.bool_)
        self._ready = np.zeros(num_slots, dtype=np.bool_)
        self._limbo = np.zeros(num_slots, dtype=np.bool_)

    @property
    def num_ready(self) -> int:
        return int(np.count_nonzero(self._ready))

    @property
    def num_pinned(self) -> int:
        return int(np.count_nonzero(self._pinned))

    @property
    def num_evictable(self) -> int:
        return int(np.count_nonzero(self._ready & ~self._pinned))

    @property
    def nbytes(self) -> int:
        """Memory of the table without the policy's."""
        return self.index.nbytes + self._pins.nbytes + self._pinned.nbytes + self._ready.nbytes + self._limbo.nbytes

    def find_prefix(self, keys: Sequence[BlockKey]) -> NDArray[np.int64]:
        """Locations (slot * blocks_per_chunk + position) of the leading keys that are ready."""
        return self.index.find_prefix(keys)

    def slots_of(self, locations: NDArray[np.int64]) -> Slots:
        """The distinct slots of locations, in order of first use."""
        slots = locations // self.blocks_per_chunk
        if self.blocks_per_chunk == 1:
            return slots
        _, first = np.unique(slots, return_index=True)
        return slots[np.sort(first)]

    def ready_slots(self) -> Slots:
        return np.flatnonzero(self._ready)

    def is_ready(self, slots: Slots) -> NDArray[np.bool_]:
        return self._ready[slots]

    def touch(self, slots: Slots) -> None:
        """Note one use of a prefix, head first; slots that are not ready are passed over."""
        self.policy.touch(slots[self._ready[slots]])

    def arrange(self, slots: Slots) -> None:
        """Let a prefix's tail leave before its head, head first; slots that are not ready are passed over."""
        self.policy.arrange(slots[self._ready[slots]])

    def allocate(self, n: int) -> Slots:
        """Take up to n free slots; evicts nothing."""
        return self.allocator.allocate(n)

    def evict(self, n: int) -> Slots:
        """Take up to n unpinned ready slots away from their keys; the caller releases them."""
        slots = self.policy.evict(n, self._pinned)
        self.unlist(slots, "evicted")
        self._ready[slots] = False
        self.evicted_slots += len(slots)
        return slots

    def publish(
        self, slots: Slots, keys: KeyArray, findable: NDArray[np.bool_] | None = None, *, are_new: bool = False
    ) -> None:
        """Make taken slots ready, prefix first.

        Args:
            findable: shape (n,); where False, the slot is only kept track of and evicted.
            are_new: no key is in yet, which the caller knows; spares looking.
        """
        listed = keys
        if findable is None or findable.all():
            self.index.insert(slots, keys, are_new=are_new)
        else:
            listed = keys[findable]
            self.index.insert(slots[findable], listed)
        if self._events is not None:
            self._events.stored(listed)
        self._ready[slots] = True
        self.policy.insert(slots, _tags(keys))

    def drop(self, slots: Slots, why: RemovedWhy) -> Slots:
        """Take ready slots away from their keys; slots that are not ready are passed over.

        Returns:
            The slots that the caller releases now. The others are pinned, and in limbo.
        """
        slots = slots[self._ready[slots]]
        self.unlist(slots, why)
        self.policy.remove(slots)
        self._ready[slots] = False
        pinned = self._pinned[slots]
        self._limbo[slots[pinned]] = True
        return slots[~pinned]

    def hide(self) -> None:
        """After a reset: take every key out of the index; the slots stay, to be evicted."""
        self.unlist(self.index.slots(), "reset")

    def release(self, slots: Slots) -> None:
        """Make taken slots free."""
        self.allocator.free(slots)

    def pin(self, slots: Slots) -> None:
        np.add.at(self._pins, slots, _ONE)
        self._pinned[slots] = True

    def unpin(self, slots: Slots) -> Slots:
        """Undo one `pin` of each; returns slots that leave limbo, for the caller to release."""
        np.subtract.at(self._pins, slots, _ONE)
        loose = slots[self._pins[slots] == 0]
        self._pinned[loose] = False
        freed: Slots = loose[self._limbo[loose]]
        if not len(freed):
            return freed
        freed = np.unique(freed)
        self._limbo[freed] = False
        return freed

    def unlist(self, slots: Slots, why: RemovedWhy) -> None:
        """Let slots be found no more; they stay what they are."""
        if self._events is not None:
            self._events.removed(self.index.keys_of(slots[self.index.holds(slots)]), why)
        self.index.remove(slots)


def _tags(keys: KeyArray) -> NDArray[np.uint64]:
    """A number a chunk that stays the same whenever its content comes back."""
    return np.ascontiguousarray(keys[:, -1, :8]).view(np.uint64).reshape(-1)
