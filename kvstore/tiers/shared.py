"""The shared tier: a directory that several hosts mount, one safetensors file a chunk.

Reading needs no lock and no index: a name that is there is a hit, and what it holds is
verified. Names and folders are `shared_tree`'s, files `chunk_file`'s, the bound is
`shared_gc`'s; this module keeps the tier alive and counts.

Every call may wait for as long as the mount does: on a dead one, for ever. `read` waits no
longer than its deadline, but starting it asks the file system; the caller that can't wait
puts a process, or a thread, between itself and `find_prefix`, `write` and `close`.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.config import SharedTierConfig
from kvstore.events import RemovedWhy, TierEvents
from kvstore.identity import KVIdentity
from kvstore.jobs import IoPool, NothingRead, ReadJob
from kvstore.keys import BlockKey, keys_to_array
from kvstore.slot import Rows, SlotCodec, Slots
from kvstore.tiers.base import FoundChunks, LowerTier, SealedChunks, TierStats
from kvstore.tiers.chunk_file import FileFormat, file_format
from kvstore.tiers.health import TierHealth
from kvstore.tiers.shared_gc import GcReport, collect_garbage
from kvstore.tiers.shared_gc_thread import GcThread
from kvstore.tiers.shared_lookup import Place, SharedLookup
from kvstore.tiers.shared_read import ReadRequest, SharedReader, SharedReadJob
from kvstore.tiers.shared_tree import SharedRoot, SharedTree
from kvstore.tiers.shared_write import SharedWriter

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S: Final = 10.0
_LOG_EVERY_S: Final = 60.0
_GC_SLACK: Final = 32  # gc by itself goes this part of the capacity below it, so that it need not run again at once
_WRITES_OFF: Final = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
_TIER_OFF: Final = {
    errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ETIMEDOUT,
    errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH, errno.ECONNREFUSED, errno.ECONNRESET,
    errno.ECONNABORTED, errno.EREMOTEIO, errno.ESHUTDOWN, errno.EUCLEAN,
}  # fmt: skip


class SharedTier(LowerTier):
    """See `LowerTier`. On a full or read-only file system it goes on reading."""

    name = "shared"

    def __init__(
        self,
        config: SharedTierConfig,
        identity: KVIdentity,
        blocks_per_chunk: int,
        rows: Rows,
        codec: SlotCodec,
        namespace: bytes,
        events: TierEvents | None = None,
    ) -> None:
        """Open the directory, making it if need be.

        Raises:
            ConfigError: shared.path can't be a directory or may not be used. One that is out
                of reach, full or read-only is no error: the tier comes back by itself.
        """
        self.config = config
        self._identity, self._codec, self._namespace = identity, codec, namespace
        self._blocks_per_chunk, self._events = blocks_per_chunk, events
        self._formats: dict[bytes, FileFormat] = {}
        self._health = TierHealth(f"shared tier {config.path}")
        self._writes = TierHealth(f"shared tier {config.path}", effect="read-only")
        self._stats = TierStats(name=self.name, capacity_nbytes=config.capacity_nbytes)
        self._lock = threading.Lock()  # counters
        self._complaint: tuple[float, int] = (float("-inf"), 0)  # when logged last, corrupt chunks since
        self._write_lock = threading.Lock()
        self._closed = False
        root = SharedRoot(config.path)
        self._tree = SharedTree(root, identity, blocks_per_chunk)
        self._lookup = SharedLookup(self._tree)
        try:
            root.create()
        except OSError as e:
            self._health.fail(e)
        header_nbytes = self._format(namespace).header.nbytes
        self._pool = IoPool("kvstore-shared", config.num_threads)
        self._reader = SharedReader(self._tree, self._pool, rows, codec, header_nbytes)
        self._writer = SharedWriter(self._tree, self._pool, rows, config.fsync)
        if blocks_per_chunk > 1 and self._health.on:
            self._writer.probe_links()
        self._gc = GcThread(self._collect, config.gc_interval_s)

    def find_prefix(self, keys: Sequence[BlockKey]) -> FoundChunks:
        places: list[Place] = []
        num_found, namespace = 0, self._namespace
        try:
            while num_found < len(keys) and self._usable():
                part = keys[num_found : num_found + self._blocks_per_chunk]
                place = self._lookup.find(namespace, part, has_links=self._writer.has_links)
                if place is None:
                    break
                places.append(place)
                num_found += len(place.keys)
        except OSError as e:
            self.on_error(e)
        with self._lock:
            self._stats.miss_blocks += len(keys) - num_found
        num_keys = np.array([len(place.keys) for place in places], dtype=np.int64)
        return FoundChunks(places, num_keys, np.zeros(len(places), dtype=np.uint64))

    def read(self, chunks: FoundChunks, host_slots: Slots, deadline: float) -> ReadJob:
        places, namespace = list(chunks.places), self._namespace
        if not self._usable():
            for place in places:
                self.on_miss("off", place)
            return NothingRead(len(places))
        request = ReadRequest(self._format(namespace), namespace, places, host_slots)
        return SharedReadJob(self._reader, self, request, deadline)

    def write(self, chunks: SealedChunks) -> NDArray[np.bool_]:
        n, start = len(chunks.host_slots), time.monotonic()
        with self._write_lock:
            if not self._usable() or not self._writes.allow():
                with self._lock:
                    self._stats.dropped_blocks += n * self._blocks_per_chunk
                return np.zeros(n, dtype=np.bool_)
            written = self._writer.write(chunks, self._format(chunks.namespace))
        if isinstance(written.error, OSError):
            self._write_failed(written.error)
        elif written.new_nbytes:
            self._writes.recover()
        if self._events is not None and chunks.namespace == self._namespace:
            self._events.stored(chunks.keys[written.stored])
        with self._lock:
            stats = self._stats
            stats.write_s += time.monotonic() - start
            stats.written_nbytes += written.new_nbytes
            stats.used_nbytes += written.new_nbytes
            stats.failed_chunks += int(np.count_nonzero(~written.stored))
            too_much = stats.used_nbytes > self.config.capacity_nbytes
        if too_much:
            self._gc.wake()
        return written.stored

    def flush(self, deadline: float) -> bool:
        if not self._usable():
            return False
        try:
            return self._writer.flush(deadline)
        except OSError as e:
            self._write_failed(e)
            return False

    def set_namespace(self, namespace: bytes) -> None:
        self._namespace = namespace

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete the chunks that hold these keys, under all of their names; returns how many."""
        namespace, fmt, purged = self._namespace, self._format(self._namespace), 0
        self._lookup.forget(namespace, keys)
        try:
            for key in keys:
                inode = self._lookup.inode(namespace, key) if self._usable() else None
                if inode is None:
                    continue
                others = self._reader.trailer_keys(self._tree.path_of(namespace, key), fmt)
                purged += self._reader.drop(Place(namespace, inode, 0, (key,)), inode, [key, *others]) > 0
                self._lookup.forget(namespace, [key, *others])
                self._tell_removed([key, *others], "purged")
        except OSError as e:
            self._write_failed(e)
        return purged

    def gc(self, now: float | None = None) -> GcReport:
        """Bound the whole path by size and age; `collect_garbage` at ``now`` (default: now).

        Raises:
            OSError: the path can't be read.
        """
        return self._collect(lambda: False, now, self.config.capacity_nbytes)

    def stats(self) -> TierStats:
        with self._lock:
            stats = replace(self._stats, misses_by_reason=dict(self._stats.misses_by_reason))
        if self._closed or not self._health.on:
            stats.state = "off"
            stats.problem = "closed" if self._closed else str(self._health.last_error)
        elif not self._writes.on:
            stats.state, stats.problem = "read-only", str(self._writes.last_error)
        elif not self._gc.alive or self._gc.last_error is not None:
            stats.problem = f"gc does not run: {self._gc.last_error or 'its thread died'}"
        return stats

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._gc.close(_CLOSE_TIMEOUT_S)
        idle = self._write_lock.acquire(timeout=_CLOSE_TIMEOUT_S)
        if not (self._pool.close(_CLOSE_TIMEOUT_S) and idle):
            logger.warning("shared tier %s: closed while the file system does not answer", self.config.path)
        if idle:
            self._write_lock.release()

    # -- what reads tell (ReadObserver); any thread

    def namespace(self) -> bytes:
        return self._namespace

    def on_read(self, nbytes: int, num_blocks: int) -> None:
        with self._lock:
            self._stats.read_nbytes += nbytes
            self._stats.hit_blocks += num_blocks

    def on_miss(self, reason: str, place: Place) -> None:
        self._lookup.forget(place.namespace, place.keys)
        if reason == "corrupt" and place.namespace == self._namespace:
            self._tell_removed(place.keys, "corrupt")
        with self._lock:
            self._stats.miss_blocks += len(place.keys)
            reasons = self._stats.misses_by_reason
            reasons[reason] = reasons.get(reason, 0) + len(place.keys)
            self._stats.failed_chunks += reason == "error"
            self._stats.corrupt_chunks += reason == "corrupt"
            since, num = self._complaint
            num += reason == "corrupt"
            is_due = num > 0 and time.monotonic() - since >= _LOG_EVERY_S
            self._complaint = (time.monotonic(), 0) if is_due else (since, num)
        if is_due:
            path = self._tree.path_of(place.namespace, place.name)
            logger.warning("shared tier: %d chunks failed to verify and were dropped, the last was %s", num, path)

    def on_error(self, error: OSError) -> None:
        if error.errno in _TIER_OFF:
            self._health.fail(error)
        elif error.errno == errno.ENOENT:
            try:
                self._tree.root.check()
            except OSError as e:
                self._health.fail(e)

    def on_end(self, seconds: float, num_late: int) -> None:
        with self._lock:
            self._stats.read_s += seconds
            self._stats.late_chunks += num_late

    # -- inside

    def _on_gc(self, namespace: str, name: str) -> None:
        if namespace == self._namespace.hex():
            self._tell_removed([BlockKey.parse(name.removesuffix(".safetensors"))], "evicted")

    def _tell_removed(self, keys: Sequence[BlockKey], why: RemovedWhy) -> None:
        if self._events is not None:
            self._events.removed(keys_to_array(keys), why)

    def _usable(self) -> bool:
        """Whether to ask the file system; looks for the root again where it is time to try."""
        if self._closed or not self._health.allow():
            return False
        if not self._health.on:
            try:
                self._tree.root.check()
            except OSError as e:
                self._health.fail(e)
                return False
            self._tree.forget()
            self._health.recover()
        return True

    def _write_failed(self, error: OSError) -> None:
        if error.errno in _WRITES_OFF:
            self._writes.fail(error)
        else:
            self.on_error(error)

    def _format(self, namespace: bytes) -> FileFormat:
        fmt = self._formats.get(namespace)
        if fmt is None:
            identity, placement = self._identity, self._identity.placement
            fmt = file_format(identity.layout, self._codec.fmt, namespace, placement.byte_layout, placement.tp_size)
            self._formats = {self._namespace: self._formats.get(self._namespace, fmt), namespace: fmt}
        return fmt

    def _collect(self, stop: Callable[[], bool], now: float | None = None, target: int | None = None) -> GcReport:
        capacity = self.config.capacity_nbytes
        blocks_per_name = 1 if self._writer.has_links else self._blocks_per_chunk
        if not self._usable():
            return GcReport(stopped=True)
        with self._lock:
            used_before = self._stats.used_nbytes
        try:
            report = collect_garbage(
                self.config.path,
                capacity_nbytes=capacity,
                max_age_s=self.config.max_age_s,
                now=time.time() if now is None else now,
                target_nbytes=capacity - capacity // _GC_SLACK if target is None else target,
                stop=stop,
                on_removed=self._on_gc,
            )
        except OSError as e:
            self.on_error(e)
            raise
        with self._lock:
            if not report.stopped:  # what was written meanwhile may have been seen or not
                self._stats.used_nbytes += report.nbytes - used_before
            self._stats.evicted_blocks += report.removed_names * blocks_per_name
        return report
