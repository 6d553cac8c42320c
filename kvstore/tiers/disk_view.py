"""What one process knows of a disk directory's slots, and how it follows the other processes.

The index says what all processes have committed; a `SlotTable` in memory says the same by
key, and which slots this process reads (pinned) or writes (taken). What the index says of a
slot that is taken or in limbo here is looked at again later. Touches no payload.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, Slots
from kvstore.slot_table import SlotTable
from kvstore.tiers.disk_index import DiskIndex, Records, empty_records, joined

NO_SLOTS: Final = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Pins:
    """What `DiskView.pin_current` found: which of n slots are pinned, and the keys of all."""

    current: NDArray[np.bool_]  # (n,)
    keys: KeyArray
    namespace: bytes


class DiskView:
    """Thread-safe. Its lock is held over look-ups in the index, never over commits or payload.

    Args:
        num_slots_on_disk: says how many slots the data file has room for now.
    """

    def __init__(
        self, index: DiskIndex, table: SlotTable, num_slots: int, namespace: bytes, num_slots_on_disk: Callable[[], int]
    ) -> None:
        self.index, self.table, self.num_slots, self.namespace = index, table, num_slots, namespace
        self.generations = np.zeros(num_slots, dtype=np.uint64)  # of what is ready
        self._num_slots_on_disk = num_slots_on_disk
        self._lock = threading.Lock()
        self._doomed: list[Records] = []  # corrupt entries, deleted with the next commit
        self._unseen = NO_SLOTS  # others' records of them could not be taken over yet

    # -- looking up and reading

    def find(self, keys: Sequence[BlockKey]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Locations of the leading keys, and the generation of each one's slot."""
        with self._lock:
            self._follow()
            locations = self.table.find_prefix(keys)
            slots = locations // self.table.blocks_per_chunk
            self.table.touch(self.table.slots_of(locations))
            return locations, self.generations[slots]

    def contains(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Which chunks have all their blocks here already."""
        with self._lock:
            return self.table.index.contains_chunks(keys)

    def hide(self, keys: Sequence[BlockKey]) -> None:
        """Let these keys be found no more; their chunks stay where they are."""
        with self._lock:
            for i in np.flatnonzero(self.table.index.contains(keys)).tolist():
                self.table.unlist(self.table.find_prefix([keys[i]]) // self.table.blocks_per_chunk, "purged")

    def pin_current(self, slots: Slots, generations: NDArray[np.uint64]) -> Pins:
        """Pin those slots that still hold these generations, in the namespace in effect."""
        with self._lock:
            current = self.table.is_ready(slots) & self.table.index.holds(slots)
            current &= self.generations[slots] == generations
            self.table.pin(slots[current])
            return Pins(current, self.table.index.keys_of(slots), self.namespace)

    def unpin(self, slots: Slots) -> None:
        with self._lock:
            self.table.release(self.table.unpin(slots))

    def reject(self, slots: Slots, generations: NDArray[np.uint64]) -> int:
        """Drop slots that failed to verify; returns how many were corrupt.

        The others were overwritten by another process after they were evicted there.
        """
        order = np.argsort(slots)
        slots, generations = slots[order], generations[order]
        on_disk = self.index.get(slots)
        corrupt = on_disk.at(on_disk.generations == generations[np.searchsorted(slots, on_disk.slots)])
        with self._lock:
            mine = self.generations[slots] == generations
            are_corrupt = np.isin(slots, corrupt.slots)
            self.table.release(self.table.drop(slots[mine & are_corrupt], "corrupt"))
            self.table.release(self.table.drop(slots[mine & ~are_corrupt], "by_other"))
            self._doomed.append(corrupt)
        return len(corrupt)

    # -- following the index

    def refresh(self) -> None:
        """Take over what other processes committed."""
        with self._lock:
            self._follow()

    def load(self, records: Records) -> None:
        """Take over what the index held when it was loaded, oldest to be evicted first."""
        with self._lock:
            self.table.allocator.take(records.slots)
            self._publish(records.at(np.argsort(records.generations)[::-1]))

    def set_namespace(self, namespace: bytes) -> None:
        """Hide everything; what is committed from now on is looked up in this namespace."""
        with self._lock:
            self.namespace = namespace
            self.table.hide()

    # -- writing; by one thread at a time

    def allocate(self, n: int) -> Slots:
        """Take up to n free slots."""
        with self._lock:
            return self.table.allocate(n)

    def allocate_all(self) -> Slots:
        with self._lock:
            return self.table.allocate(self.table.allocator.num_free)

    def release(self, slots: Slots) -> None:
        """Give taken slots back."""
        with self._lock:
            self.table.release(slots)

    def publish(self, records: Records) -> None:
        """Make taken slots ready."""
        with self._lock:
            self._publish(records)

    def withdraw(self, slots: Slots) -> Slots:
        """Take ready slots away from their keys; returns those to `release`. Pinned ones wait in limbo."""
        with self._lock:
            return self.table.drop(slots, "purged")

    def make_room(self, n: int, least: int) -> Records:
        """Evict where fewer than n slots are free, at least ``least`` at once; they stay taken."""
        with self._lock:
            short = n - self.table.allocator.num_free
            victims = self.table.evict(max(short, least)) if short > 0 else NO_SLOTS
            namespaces = np.zeros(len(victims), dtype=empty_records(1).namespaces.dtype)
            return Records(victims, self.generations[victims], namespaces, self.table.index.keys_of(victims))

    def grow(self) -> None:
        """Take note of how far the data file reaches."""
        with self._lock:
            self._grow()

    def doom(self, records: Records) -> None:
        with self._lock:
            self._doomed.append(records)

    def take_doomed(self) -> Records:
        with self._lock:
            doomed, self._doomed = [empty_records(self.table.blocks_per_chunk), *self._doomed], []
        return joined(doomed)

    # -- inside; the lock is held

    def _follow(self) -> None:
        changes = self.index.changes()
        if changes is None:
            records = self.index.load()
            self._reconcile(np.union1d(self.table.ready_slots(), records.slots), records)
        elif len(changes.slots):
            self._reconcile(changes.slots, changes.records)
        if len(self._unseen):
            self._reconcile(self._unseen, self.index.get(self._unseen))

    def _reconcile(self, slots: Slots, records: Records) -> None:
        """Make ``slots`` (ascending) hold exactly ``records``, those aside that are taken or in limbo here."""
        self._grow()
        current = np.zeros(len(slots), dtype=np.uint64)
        current[np.searchsorted(slots, records.slots)] = records.generations
        stale = slots[self.table.is_ready(slots) & (self.generations[slots] != current)]
        self.table.release(self.table.drop(stale, "by_other"))
        kept = self.table.is_ready(records.slots) & (self.generations[records.slots] == records.generations)
        missing = records.at(~kept)
        taken = np.isin(missing.slots, self.table.allocator.take(missing.slots))
        self._publish(missing.at(taken))
        self._unseen = np.union1d(np.setdiff1d(self._unseen, slots), missing.slots[~taken])

    def _publish(self, records: Records) -> None:
        self.table.publish(records.slots, records.keys, records.namespaces == np.void(self.namespace))
        self.generations[records.slots] = records.generations

    def _grow(self) -> None:
        self.table.allocator.grow(min(self._num_slots_on_disk(), self.num_slots))
