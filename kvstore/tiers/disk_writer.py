"""Takes a disk directory's slots for writing, beside other processes, and commits them.

Order of events for a slot: its old entry is deleted in the index, it is reserved by a kernel
lock, checked against what other processes committed meanwhile, written (by the caller),
committed, unlocked. Every error on the way gives slots and locks back.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import runs
from kvstore.slot import Slots
from kvstore.tiers.disk_dir import DiskDirectory
from kvstore.tiers.disk_index import Records, empty_records, joined
from kvstore.tiers.disk_trailers import DiskTrailers
from kvstore.tiers.disk_view import NO_SLOTS, DiskView

logger = logging.getLogger(__name__)

EVICT_SLOTS: Final = 256
_ATTEMPTS: Final = 8
_GROW_RETRY_S: Final = 30.0


class DiskWriter:
    """For one thread at a time."""

    def __init__(self, directory: DiskDirectory, view: DiskView, trailers: DiskTrailers) -> None:
        self._directory, self._view, self._trailers = directory, view, trailers
        self._nothing = empty_records(view.table.blocks_per_chunk)
        self._grow_after = 0.0

    def reserve(self, n: int) -> Slots:
        """Take up to n slots for writing, locked against other processes, in contiguous runs.

        Raises:
            OSError, lmdb.Error: the directory cannot be used; nothing was taken.
        """
        got, elsewhere = [NO_SLOTS], [NO_SLOTS]
        missing = n
        try:
            self.delete_doomed()
            for _ in range(_ATTEMPTS):
                self._make_room(missing)
                taken = self._view.allocate(missing)
                mine, locked = self._lock(taken)
                got.append(mine)
                elsewhere.append(locked)
                missing -= len(mine)
                if missing <= 0 or not len(taken):
                    break
        except BaseException:
            self.give_back(np.concatenate(got))
            raise
        finally:
            self._view.release(np.concatenate(elsewhere))
        return np.concatenate(got)

    def give_back(self, slots: Slots) -> None:
        """Undo `reserve`."""
        self._view.release(slots)
        self._unlock(slots)

    def commit(self, stored: Records, failed: Slots) -> None:
        """Publish written slots and give back failed ones; all were reserved.

        Raises:
            OSError, lmdb.Error: nothing was published; all slots were given back.
        """
        slots = np.concatenate((stored.slots, failed))
        try:
            self._commit(self._nothing, stored)
        except BaseException:
            self._view.release(slots)
            raise
        else:
            self._view.publish(stored)
            self._view.release(failed)
        finally:
            self._unlock(slots)

    def delete(self, records: Records) -> None:
        """Delete entries durably; their slots are free afterwards, or in limbo while they are read.

        Raises:
            OSError, lmdb.Error: they are still in the index.
        """
        loose = self._view.withdraw(records.slots)
        try:
            self._commit(records, self._nothing)
            self._view.index.sync()
        finally:
            self._view.release(loose)

    def erase(self, keys: NDArray[np.void], also: Slots) -> None:
        """Overwrite the trailers that name one of these keys in free slots, and in slots ``also``,
        which have no entry any more; those that another process writes are let alone."""
        taken = self._view.allocate_all()
        mine, elsewhere = self._lock(taken)
        more = np.setdiff1d(also, taken)
        try:
            more = np.array([s for s in more.tolist() if self._directory.try_lock(s, 1)], dtype=np.int64)
            self._trailers.erase(np.concatenate((mine, more)), keys)
            os.fdatasync(self._directory.data_fd)
        finally:
            self._view.release(np.concatenate((mine, elsewhere)))
            self._unlock(np.concatenate((mine, more)))

    def delete_doomed(self) -> None:
        """Delete entries of slots that failed to verify."""
        self._commit(self._nothing, self._nothing)

    # -- inside

    def _commit(self, deleted: Records, stored: Records) -> None:
        doomed = self._view.take_doomed()
        if not len(doomed) + len(deleted) + len(stored):
            return
        try:
            self._view.index.commit(joined([doomed, deleted]), stored)
        except BaseException:
            self._view.doom(doomed)
            raise

    def _make_room(self, n: int) -> None:
        self._view.refresh()
        self._grow(n)
        victims = self._view.make_room(n, min(EVICT_SLOTS, self._view.num_slots // 16))
        try:
            self._commit(victims, self._nothing)
        finally:  # after an error the index still has them: `_lock` publishes them again
            self._view.release(victims.slots)

    def _grow(self, n: int) -> None:
        allocator, limit = self._view.table.allocator, self._view.num_slots
        self._view.grow()
        while allocator.num_free < n and allocator.num_slots < limit and time.monotonic() >= self._grow_after:
            try:
                self._directory.extend(limit)
            except OSError as e:
                self._grow_after = time.monotonic() + _GROW_RETRY_S
                logger.warning("disk tier %s: stays at %d chunks: %s", self._directory.path, allocator.num_slots, e)
                if allocator.num_slots == 0:
                    raise
            self._view.grow()

    def _lock(self, taken: Slots) -> tuple[Slots, Slots]:
        """Lock taken slots: those that are this process's now, and those that another one holds.

        What others have written there meanwhile is published, and is neither.
        """
        mine, elsewhere = [NO_SLOTS], [NO_SLOTS]
        try:
            for start, length in runs(taken):
                run = np.arange(start, start + length, dtype=np.int64)
                (mine if self._directory.try_lock(start, length) else elsewhere).append(run)
            locked = np.concatenate(mine)
            records = self._view.index.get(locked)
        except BaseException:
            self.give_back(taken)
            raise
        if len(records):
            self._unlock(records.slots)
            self._view.publish(records)
            locked = np.setdiff1d(locked, records.slots)
        return locked, np.concatenate(elsewhere)

    def _unlock(self, slots: Slots) -> None:
        for start, length in runs(slots):
            self._directory.unlock(start, length)
