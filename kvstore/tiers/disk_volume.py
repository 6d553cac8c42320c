"""An opened disk directory: which slots hold what, for this process and beside others.

Joins the directory (files, locks), the index (LMDB) and a slot table in memory. Order of
events for a slot: its old entry is deleted in the index, it is reserved by a kernel lock,
checked against what other processes committed meanwhile, written, committed, unlocked.
Payload never passes through here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.allocator import runs
from kvstore.config import DiskTierConfig
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey, keys_to_array
from kvstore.slot import KeyArray, SlotCodec, Slots
from kvstore.slot_table import SlotTable
from kvstore.tiers import disk_index
from kvstore.tiers.disk_dir import DirectoryHeader, DiskDirectory, read_header
from kvstore.tiers.disk_index import DiskIndex, Records, empty_records, joined
from kvstore.tiers.disk_trailers import DiskTrailers, void_keys

logger = logging.getLogger(__name__)

EVICT_SLOTS: Final = 256
_ATTEMPTS: Final = 8
_GROW_RETRY_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class VolumeConfig:
    """What a volume is opened with."""

    disk: DiskTierConfig
    identity: KVIdentity
    codec: SlotCodec
    num_slots: int

    @property
    def header(self) -> DirectoryHeader:
        fmt = self.codec.fmt
        return DirectoryHeader(
            content=dict(self.identity.content()),
            placement=dict(self.identity.placed(fmt.blocks_per_chunk)),
            slot_nbytes=fmt.slot_nbytes,
            num_slots=self.num_slots,
            retired={},
        )


@dataclass(frozen=True, slots=True)
class Pins:
    """What `DiskVolume.pin_current` found: which of n slots are pinned, and the keys of all."""

    current: NDArray[np.bool_]  # (n,)
    keys: KeyArray
    namespace: bytes


class DiskVolume:
    """Thread-safe; no lock is held over I/O. `reserve` .. `commit` and `purge` are for one
    thread at a time, which the caller sees to."""

    header: DirectoryHeader
    index: DiskIndex
    table: SlotTable
    generations: NDArray[np.uint64]  # (num_slots,)

    def __init__(self, config: VolumeConfig, namespace: bytes) -> None:
        """Open, create, or rebuild.

        Raises:
            ConfigError: see `DiskDirectory` and `DiskDirectory.settle`.
            OSError, lmdb.Error: it cannot be opened now.
        """
        self.config = config
        self.codec = config.codec
        self.namespace = namespace
        self._lock = threading.Lock()
        self._doomed: list[Records] = []  # corrupt entries, deleted with the next commit
        self._grow_after = 0.0
        self._locked_elsewhere = np.empty(0, dtype=np.int64)
        self.directory = DiskDirectory(config.disk.path)
        self._trailers = DiskTrailers(self.directory, config.codec)
        try:
            with self.directory.opening():
                self._open()
        except BaseException:
            self.directory.close()
            raise

    # -- looking up and reading

    def find(self, keys: Sequence[BlockKey]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Locations of the leading keys, and the generation of each one's slot."""
        self.refresh()
        with self._lock:
            locations = self.table.find_prefix(keys)
            slots = locations // self.table.blocks_per_chunk
            self.table.touch(self.table.slots_of(locations))
            return locations, self.generations[slots]

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
        on_disk = self.index.get(slots)
        expected = np.zeros(self.header.num_slots, dtype=np.uint64)
        expected[slots] = generations
        with self._lock:
            corrupt = on_disk.at(on_disk.generations == expected[on_disk.slots])
            mine = self.generations[slots] == generations
            self.table.release(self.table.drop(slots[mine]))
            if len(corrupt):
                self._doomed.append(corrupt)
        return len(corrupt)

    def refresh(self) -> None:
        """Take over what other processes committed."""
        with self._lock:
            changes = self.index.changes()
            if changes is None:
                records = self.index.load()
                self._reconcile(np.union1d(self.table.ready_slots(), records.slots), records)
            elif len(changes.slots):
                self._reconcile(changes.slots, changes.records)

    # -- writing

    def reserve(self, n: int) -> Slots:
        """Take up to n slots for writing, locked against other processes, in contiguous runs.

        Raises:
            OSError, lmdb.Error: the directory cannot be used.
        """
        with self._lock:
            self.table.release(self._locked_elsewhere)
            self._locked_elsewhere = np.empty(0, dtype=np.int64)
        got: list[Slots] = []
        missing = n
        try:
            for _ in range(_ATTEMPTS):
                self._make_room(missing)
                with self._lock:
                    taken = self.table.allocate(missing)
                got.append(self._lock_free(taken))
                missing -= len(got[-1])
                if missing <= 0 or not len(taken):
                    break
        except BaseException:
            self.give_back(np.concatenate([*got, np.empty(0, dtype=np.int64)]))
            raise
        return np.concatenate(got)

    def give_back(self, slots: Slots) -> None:
        """Undo `reserve`."""
        with self._lock:
            self.table.release(slots)
        self._unlock(slots)

    def commit(self, stored: Records, failed: Slots) -> None:
        """Publish written slots and give back failed ones; all were reserved.

        Raises:
            OSError, lmdb.Error: nothing was published; all slots were given back.
        """
        doomed = self._take_doomed()
        try:
            self.index.commit(doomed, stored)
        except BaseException:
            with self._lock:
                self._doomed.append(doomed)
                self.table.release(np.concatenate((stored.slots, failed)))
            raise
        else:
            with self._lock:
                self._publish(stored)
                self.table.release(failed)
        finally:
            self._unlock(np.concatenate((stored.slots, failed)))

    def contains(self, keys: KeyArray) -> NDArray[np.bool_]:
        """Which chunks have all their blocks here already."""
        with self._lock:
            return self.table.index.contains_chunks(keys)

    def set_namespace(self, namespace: bytes) -> None:
        """Hide everything; where no other process uses the directory, for good."""
        with self.directory.opening():
            if self.directory.is_only_member():
                floor = int(self.generations.max(initial=0)) + 1
                retired = {**self.header.retired, self.namespace.hex(): max(floor, time.time_ns())}
                self.header = replace(self.header, retired=retired)
                self.directory.write_header(self.header)
            with self._lock:
                self.namespace = namespace
                self.table.hide()

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete every chunk that holds one of these keys, and what is left of evicted ones;
        returns the number of entries deleted."""
        self.refresh()
        wanted = void_keys(keys_to_array(keys))
        everything = self.index.load()
        records = everything.at(np.flatnonzero(np.isin(void_keys(everything.keys), wanted).any(axis=1)))
        with self._lock:
            loose = self.table.drop(records.slots)
        try:
            self.index.commit(records, empty_records(self.codec.fmt.blocks_per_chunk))
            self.index.sync()
        finally:
            with self._lock:
                self.table.release(loose)
        with self._lock:
            free = self.table.allocate(self.table.allocator.num_free)
        mine = self._lock_free(free)
        try:
            self._trailers.erase(mine, wanted)
        finally:
            with self._lock:
                self.table.release(mine)
            self._unlock(mine)
        return len(records)

    def sync(self) -> None:
        """Delete what is doomed and make the index durable."""
        doomed = self._take_doomed()
        if len(doomed):
            self.index.commit(doomed, empty_records(self.codec.fmt.blocks_per_chunk))
        self.index.sync()

    def is_intact(self) -> bool:
        """Whether the files in the directory are still the ones that are open."""
        return self.directory.is_intact() and self.index.is_intact()

    def close_when_idle(self) -> bool:
        """Close the index; close the files too, unless a read in flight still uses them."""
        self.index.close()
        with self._lock:
            if self.table.num_pinned:
                return False
        self.directory.close()
        return True

    def close(self) -> None:
        self.index.close()
        self.directory.close()

    # -- opening

    def _open(self) -> None:
        existing = read_header(self.directory.path)
        self.header = self.directory.settle(self.config.header, on_mismatch=self.config.disk.on_mismatch)
        fmt, num_slots = self.codec.fmt, self.header.num_slots
        path, has_data = self.directory.index_path, self.directory.num_slots_on_disk() > 0
        problem = None
        if (path / "data.mdb").exists():
            problem = disk_index.check(path) if existing else "store.json is missing or damaged"
        rebuild = has_data and (problem is not None or not (path / "data.mdb").exists())
        if problem is not None:
            logger.warning("disk tier %s: index unusable (%s); it is moved aside and rebuilt", path.parent, problem)
            self.directory.move_index_aside()
        self.index = DiskIndex(path, num_slots, fmt.blocks_per_chunk)
        try:
            if rebuild:
                self.index.commit(empty_records(fmt.blocks_per_chunk), self._trailers.scan())
            self._load()
        except BaseException:
            self.index.close()
            raise

    def _load(self) -> None:
        fmt, num_slots = self.codec.fmt, self.header.num_slots
        records = self.index.load()
        on_disk = self.directory.num_slots_on_disk()
        beyond = np.asarray(records.slots >= on_disk)
        if beyond.any():
            self.index.commit(records.at(np.flatnonzero(beyond)), empty_records(fmt.blocks_per_chunk))
            records = records.at(np.flatnonzero(~beyond))
        self.table = SlotTable(num_slots, fmt.blocks_per_chunk, self.config.disk.eviction_policy, on_disk)
        self.generations = np.zeros(num_slots, dtype=np.uint64)
        self.table.allocator.take(records.slots)
        self._publish(records.at(np.argsort(records.generations)[::-1]))

    # -- inside

    def _publish(self, records: Records) -> None:
        retired = self.header.retired.get(self.namespace.hex(), 0)
        findable = (records.namespaces == np.void(self.namespace)) & (records.generations >= np.uint64(retired))
        self.table.publish(records.slots, records.keys, findable)
        self.generations[records.slots] = records.generations

    def _reconcile(self, slots: Slots, records: Records) -> None:
        """Make ``slots`` hold exactly ``records``; slots that this process writes are let alone."""
        self.table.allocator.grow(min(self.directory.num_slots_on_disk(), self.header.num_slots))
        current = np.zeros(len(slots), dtype=np.uint64)
        current[np.searchsorted(slots, records.slots)] = records.generations
        ready = self.table.is_ready(slots)
        stale = slots[ready & (self.generations[slots] != current)]
        self.table.release(self.table.drop(stale))
        kept = self.table.is_ready(records.slots) & (self.generations[records.slots] == records.generations)
        missing = records.at(~kept)
        taken = self.table.allocator.take(missing.slots)
        self._publish(missing.at(np.isin(missing.slots, taken)))

    def _make_room(self, n: int) -> None:
        self.refresh()
        self._grow(n)
        with self._lock:
            short = n - self.table.allocator.num_free
            if short <= 0:
                return
            victims = self.table.evict(max(short, min(EVICT_SLOTS, self.header.num_slots // 16)))
            namespaces = np.zeros(len(victims), dtype=empty_records(1).namespaces.dtype)
            evicted = Records(victims, self.generations[victims], namespaces, self.table.index.keys_of(victims))
        try:
            self.index.commit(joined([evicted, self._take_doomed()]), empty_records(self.codec.fmt.blocks_per_chunk))
        finally:  # after an error the index still has them: `_lock_free` puts them back
            with self._lock:
                self.table.release(victims)

    def _grow(self, n: int) -> None:
        limit = self.header.num_slots
        while self.table.allocator.num_free < n and self.table.allocator.num_slots < limit:
            on_disk = self.directory.num_slots_on_disk()
            if on_disk <= self.table.allocator.num_slots:
                if time.monotonic() < self._grow_after:
                    return
                try:
                    on_disk = self.directory.extend(limit)
                except OSError as e:
                    self._grow_after = time.monotonic() + _GROW_RETRY_S
                    logger.warning("disk tier %s: stays at %d chunks: %s", self.directory.path, on_disk, e)
                    if on_disk == 0:
                        raise
                    return
            with self._lock:
                self.table.allocator.grow(min(on_disk, limit))

    def _lock_free(self, slots: Slots) -> Slots:
        """Lock taken slots; those that others write or have written are set aside or published."""
        mine: list[Slots] = []
        for start, length in runs(slots):
            run = np.arange(start, start + length, dtype=np.int64)
            if self.directory.try_lock(start, length):
                mine.append(run)
            else:
                self._locked_elsewhere = np.concatenate((self._locked_elsewhere, run))
        locked = np.concatenate([*mine, np.empty(0, dtype=np.int64)])
        try:
            records = self.index.get(locked)
        except BaseException:
            self.give_back(locked)
            raise
        if len(records):
            self._unlock(records.slots)
            with self._lock:
                self._publish(records)
            locked = np.setdiff1d(locked, records.slots)
        return locked

    def _unlock(self, slots: Slots) -> None:
        for start, length in runs(slots):
            self.directory.unlock(start, length)

    def _take_doomed(self) -> Records:
        with self._lock:
            doomed, self._doomed = [empty_records(self.codec.fmt.blocks_per_chunk), *self._doomed], []
        return joined(doomed)
