"""Decides what lies in host memory: which slot holds which blocks, who holds a slot, who goes.

    [taken]  reserve ..................... publish
    [ready]  published, evictable          pinned by leases: loads, write-behind
    [limbo]  dropped while pinned, or under a transfer that outlived its deadline

Knows keys and slots and never touches payload. Thread-safe; never waits but for room, and
then up to a deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.events import TierEvents
from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, Slots
from kvstore.slot_table import SlotTable


@dataclass(frozen=True, slots=True)
class LoadLease:
    """Leading blocks in host memory, pinned until `TierManager.release`.

    ``slots[i]`` and ``positions[i]`` say where block i lies; shape (n,) each.
    """

    slots: Slots
    positions: NDArray[np.int64]
    epoch: int

    def __len__(self) -> int:
        return len(self.slots)


class TierManager:
    """Args:
    num_slots: chunks that host memory has room for.
    """

    def __init__(
        self, num_slots: int, blocks_per_chunk: int, eviction_policy: str, events: TierEvents | None = None
    ) -> None:
        self.num_slots, self.blocks_per_chunk = num_slots, blocks_per_chunk
        self.epoch = 0
        self.num_published = 0  # calls; while it stays the same, what was absent still is
        self._table = SlotTable(num_slots, blocks_per_chunk, eviction_policy, events=events)
        self._room = threading.Condition()

    def prefix_hit(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks present; changes nothing."""
        with self._room:
            return len(self._table.find_prefix(keys))

    def contains(self, keys: Sequence[BlockKey]) -> NDArray[np.bool_]:
        with self._room:
            return self._table.index.contains(keys)

    def prepare_load(self, keys: Sequence[BlockKey]) -> LoadLease:
        """Pin the leading blocks that are present, and note their use."""
        with self._room:
            locations = self._table.find_prefix(keys)
            slots, positions = np.divmod(locations, self.blocks_per_chunk)
            self._table.touch(self._table.slots_of(locations))
            self._table.pin(slots)
            return LoadLease(slots, positions, self.epoch)

    def release(self, lease: LoadLease) -> None:
        """End a lease; its slots may be evicted."""
        self.unpin(lease.slots)

    def arrange(self, keys: Sequence[BlockKey]) -> None:
        """Let a prefix's tail leave before its head; no use of it: `prepare_load` is one."""
        with self._room:
            self._table.arrange(self._table.slots_of(self._table.find_prefix(keys)))

    def reserve(self, n: int, deadline: float) -> Slots:
        """Take slots to be filled: free ones, else evicted ones.

        Waits until the deadline for the first; returns up to n, none at the deadline.
        """
        with self._room:
            while self._make_room(n) == 0:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._room.wait(left_s):
                    break
            return self._table.allocate(n)

    def reserve_all(self, n: int, deadline: float) -> Slots | None:
        """As `reserve`, but all n of them at once; None where there is no such room by the deadline. Nothing is
        evicted for what does not fit yet."""
        with self._room:
            while self._table.allocator.num_free + self._table.num_evictable < n or self._make_room(n) < n:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._room.wait(left_s):
                    return None
            return self._table.allocate(n)

    def publish(
        self, slots: Slots, keys: KeyArray, epoch: int, *, pins: int, absent_as_of: int | None = None
    ) -> NDArray[np.bool_]:
        """Make filled slots ready, prefix first, each pinned ``pins`` times.

        Args:
            absent_as_of: all keys were seen to be absent, after `num_published` was read as this.
        Returns:
            Shape (n,): False where the chunk was there already or its epoch has passed; that
            slot is free again.
        """
        with self._room:
            kept = np.full(len(slots), epoch == self.epoch)
            are_new = absent_as_of == self.num_published
            self.num_published += 1
            if epoch == self.epoch and not are_new:
                kept = ~self._table.index.contains_chunks(keys)
            if not kept.all():
                self._free(slots[~kept])
                slots, keys = slots[kept], keys[kept]
            self._table.publish(slots, keys, are_new=are_new)
            for _ in range(pins):
                self._table.pin(slots)
            return kept

    def give_back(self, slots: Slots) -> None:
        """Return reserved slots unfilled."""
        with self._room:
            self._free(slots)

    def unpin(self, slots: Slots) -> None:
        with self._room:
            self._free(self._table.unpin(slots))
            self._room.notify_all()

    def drop(self, keys: Sequence[BlockKey]) -> int:
        """Forget chunks that hold these keys; returns how many."""
        with self._room:
            at = np.flatnonzero(self._table.index.contains(keys))
            locations = [self._table.find_prefix([keys[i]]) for i in at.tolist()]
            slots = np.unique(np.concatenate(locations) // self.blocks_per_chunk) if locations else at
            self._free(self._table.drop(slots, "purged"))
            return len(slots)

    def reset(self) -> int:
        """Forget everything, and whatever is on its way; returns the new epoch."""
        with self._room:
            self.epoch += 1
            self._free(self._table.drop(self._table.ready_slots(), "reset"))
            return self.epoch

    @property
    def num_free(self) -> int:
        """Slots that hold nothing, and are not being filled."""
        with self._room:
            return self._table.allocator.num_free

    def usage(self) -> tuple[int, int, int]:
        """(ready, pinned, evicted since the start), in slots."""
        with self._room:
            return self._table.num_ready, self._table.num_pinned, self._table.evicted_slots

    def _make_room(self, n: int) -> int:
        """Evict where fewer than n slots are free; returns how many are."""
        allocator = self._table.allocator
        if allocator.num_free < n:
            self._table.release(self._table.evict(n - allocator.num_free))
        return allocator.num_free

    def _free(self, slots: Slots) -> None:
        if len(slots):
            self._table.release(slots)
            self._room.notify_all()
