"""The disk tier: slots in one preallocated file, read and written around the page cache.

Runs of neighbouring slots go in one system call of about 2 MiB. Threads only wait for the
kernel; the thread that collects a read verifies it. What the directory holds, and beside
whom, is `disk_volume`'s; this module moves bytes and keeps the tier alive.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.config import DiskTierConfig
from kvstore.direct_io import preadv_full, pwritev_full
from kvstore.errors import ConfigError, TierUnavailableError
from kvstore.identity import KVIdentity
from kvstore.jobs import Indices, IoPool, PooledReadJob, ReadJob, ReadOperation
from kvstore.keys import KEY_NBYTES, BlockKey
from kvstore.slot import Rows, SlotCodec, SlotFormat, Slots
from kvstore.tiers.base import FoundChunk, LowerTier, SealedChunks, TierStats
from kvstore.tiers.disk_index import Records
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

CALL_NBYTES: Final = 2 << 20
_INDEX_NBYTES_PER_KEY: Final = 512
_CLOSE_TIMEOUT_S: Final = 10.0
_NO_DEADLINE_S: Final = 3600.0


def num_disk_slots(config: DiskTierConfig, fmt: SlotFormat) -> int:
    """Chunks that a capacity has room for, the index's share taken off.

    Raises:
        ConfigError: not even one.
    """
    if config.num_blocks is not None:
        return config.num_blocks // fmt.blocks_per_chunk
    assert config.capacity_nbytes is not None
    usable = config.capacity_nbytes - min(1 << 20, config.capacity_nbytes // 64)
    num_slots = usable // (fmt.slot_nbytes + _INDEX_NBYTES_PER_KEY * fmt.blocks_per_chunk)
    if num_slots < 1:
        raise ConfigError(
            f"disk.capacity_nbytes: {config.capacity_nbytes} has no room for one chunk of {fmt.slot_nbytes} bytes; "
            f"give at least {2 * fmt.slot_nbytes}"
        )
    return num_slots


class DiskTier(LowerTier):
    """See `LowerTier`. Files: `disk_dir`."""

    name = "disk"

    def __init__(
        self, config: DiskTierConfig, identity: KVIdentity, rows: Rows, codec: SlotCodec, namespace: bytes
    ) -> None:
        """Open the directory.

        Raises:
            ConfigError: a wrong setting. A directory that is merely out of reach, full or
                read-only is no error: the tier starts off and comes back by itself.
        """
        self.config = config
        self._rows = rows
        self._codec = codec
        self._namespace = namespace
        self._volume_config = VolumeConfig(config, identity, codec, num_disk_slots(config, codec.fmt))
        self._pool = IoPool("kvstore-disk", config.num_threads)
        self._health = TierHealth(f"disk tier {config.path}")
        self._write_lock = threading.RLock()  # held by who writes, or opens again
        self._retired: list[DiskVolume] = []  # given up while reads of them were in flight
        self._stats = TierStats(name=self.name)
        self._stats_lock = threading.Lock()
        self._closed = False
        self._volume: DiskVolume | None = None
        try:
            self._volume = DiskVolume(self._volume_config, namespace)
        except ConfigError:
            self._pool.close(_CLOSE_TIMEOUT_S)
            raise
        except (OSError, lmdb.Error) as e:
            self._health.fail(e)

    def find_prefix(self, keys: Sequence[BlockKey]) -> list[FoundChunk]:
        volume = self._usable()
        if volume is None or not keys:
            return []
        try:
            locations, generations = volume.find(keys)
        except (OSError, lmdb.Error) as e:
            self._fail(volume, e)
            return []
        slots = locations // self._codec.fmt.blocks_per_chunk
        starts = np.flatnonzero(np.diff(slots, prepend=-1))
        counts = np.diff(starts, append=len(slots))
        return [
            FoundChunk(slot, n, generation)
            for slot, n, generation in zip(
                slots[starts].tolist(), counts.tolist(), generations[starts].tolist(), strict=True
            )
        ]

    def read(self, chunks: Sequence[FoundChunk], host_slots: Slots, deadline: float) -> ReadJob:
        volume = self._usable()
        slots = np.array([c.place for c in chunks], dtype=np.int64)
        generations = np.array([c.generation for c in chunks], dtype=np.uint64)
        return _DiskRead(self, volume, slots, host_slots, generations, deadline)

    def write(self, chunks: SealedChunks) -> NDArray[np.bool_]:
        stored = np.zeros(len(chunks.host_slots), dtype=np.bool_)
        with self._write_lock:
            volume = self._usable(intact=True)
            if volume is None or not len(stored):
                return stored
            start = time.monotonic()
            try:
                self._write(volume, chunks, stored)
            except (OSError, lmdb.Error, TierUnavailableError) as e:
                self._fail(volume, e)
            with self._stats_lock:
                self._stats.write_s += time.monotonic() - start
                self._stats.failed_chunks += 0 if self._health.on else int(np.count_nonzero(~stored))
        return stored

    def flush(self, deadline: float) -> bool:
        if not self._write_lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            volume = self._usable(intact=True)
            if volume is None:
                return False
            os.fdatasync(volume.directory.data_fd)
            volume.sync()
        except (OSError, lmdb.Error) as e:
            self._fail(volume, e)
            return False
        finally:
            self._write_lock.release()
        return True

    def set_namespace(self, namespace: bytes) -> None:
        self._namespace = namespace
        volume = self._usable()
        if volume is None:
            return
        try:
            volume.set_namespace(namespace)
        except (OSError, lmdb.Error) as e:  # hidden or not, this volume is of the old namespace
            self._fail(volume, e)

    def purge(self, keys: Sequence[BlockKey]) -> int:
        with self._write_lock:
            volume = self._usable(intact=True)
            if volume is None or not keys:
                return 0
            try:
                return volume.purge(keys)
            except (OSError, lmdb.Error) as e:
                self._fail(volume, e)
                return 0

    def stats(self) -> TierStats:
        fmt, volume = self._codec.fmt, self._volume
        with self._stats_lock:
            stats = self._stats
            stats.state = "on" if self._health.on else "off"
            num_slots = volume.header.num_slots if volume else self._volume_config.num_slots
            used = volume.table.num_ready if volume else 0
            stats.capacity_blocks, stats.used_blocks = num_slots * fmt.blocks_per_chunk, used * fmt.blocks_per_chunk
            stats.capacity_nbytes, stats.used_nbytes = num_slots * fmt.slot_nbytes, used * fmt.slot_nbytes
            stats.pinned_blocks = volume.table.num_pinned * fmt.blocks_per_chunk if volume else 0
            stats.evicted_blocks = volume.table.evicted_slots * fmt.blocks_per_chunk if volume else 0
            return stats

    def close(self) -> None:
        with self._write_lock:
            self._closed = True
            self._pool.close(_CLOSE_TIMEOUT_S)
            volume, self._volume = self._volume, None
            if volume is not None:
                try:
                    volume.sync()
                except (OSError, lmdb.Error) as e:
                    logger.warning("disk tier %s: could not sync at close: %s", self.config.path, e)
                volume.close()

    # -- inside

    def _usable(self, *, intact: bool = False) -> DiskVolume | None:
        """The open volume; opens it again where the tier was off and it is time to try."""
        if self._closed or not self._health.allow():
            return None
        volume = self._volume
        if volume is None or not self._health.on:
            return self._reopen()
        if intact and not volume.is_intact():
            self._fail(volume, FileNotFoundError(f"{self.config.path} vanished"))
            return None
        return volume

    def _reopen(self) -> DiskVolume | None:
        if not self._write_lock.acquire(blocking=False):
            return None
        try:
            if self._volume is not None:
                if not self._volume.directory.may_return():
                    raise FileNotFoundError(f"{self.config.path} is not there")
                self._retired.append(self._volume)
                self._volume = None
            self._retired = [v for v in self._retired if not v.close_when_idle()]
            self._volume = DiskVolume(self._volume_config, self._namespace)
        except (OSError, lmdb.Error, ConfigError) as e:
            self._health.fail(e)
            return None
        finally:
            self._write_lock.release()
        self._health.recover()
        return self._volume

    def _fail(self, volume: DiskVolume | None, error: BaseException) -> None:
        if volume is self._volume:
            self._health.fail(error)

    def _count(self, field: str, n: float) -> None:
        with self._stats_lock:
            setattr(self._stats, field, getattr(self._stats, field) + n)

    def _write(self, volume: DiskVolume, chunks: SealedChunks, stored: NDArray[np.bool_]) -> None:
        """Sets ``stored`` as it goes, so that what was stored before an error counts."""
        volume.refresh()
        if chunks.namespace == volume.namespace:
            stored |= volume.contains(chunks.keys)
        new = np.flatnonzero(~stored)
        if not len(new):
            return
        slots = volume.reserve(len(new))
        new = new[: len(slots)]  # prefix first: what has no room is the tail
        operations, covered = self._write_operations(volume, slots, chunks.host_slots[new])
        outcomes = self._pool.run_all(operations, time.monotonic() + _NO_DEADLINE_S)
        good = np.ones(len(slots), dtype=np.bool_)
        for indices, error in zip(covered, outcomes, strict=True):
            good[indices] = error is None
        namespaces = np.full(len(new), np.void(chunks.namespace))
        records = Records(slots, chunks.generations[new], namespaces, chunks.keys[new])
        volume.commit(records.at(good), slots[~good])
        stored[new[good]] = True
        self._count("written_nbytes", int(np.count_nonzero(good)) * self._codec.fmt.slot_nbytes)
        for error in outcomes:
            if error is not None:
                raise TierUnavailableError(str(error)) from error

    def _write_operations(
        self, volume: DiskVolume, slots: Slots, host_slots: Slots
    ) -> tuple[list[Callable[[], None]], list[Indices]]:
        calls = [
            (indices, slots[indices[0]] * self._codec.fmt.slot_nbytes, self._buffers(host_slots[indices]))
            for indices in _calls(slots, self._codec.fmt.slot_nbytes, self.config.num_threads)
        ]
        fd = volume.directory.data_fd
        return [_writer(fd, buffers, offset) for _, offset, buffers in calls], [indices for indices, _, _ in calls]

    def _buffers(self, host_slots: Slots) -> list[NDArray[np.uint8]]:
        """The arena's rows of these slots, neighbours joined."""
        breaks = np.flatnonzero(np.diff(host_slots) != 1) + 1
        starts = [0, *breaks.tolist()]
        ends = [*breaks.tolist(), len(host_slots)]
        firsts = host_slots[starts].tolist()
        rows = self._rows
        return [rows[f : f + e - s].reshape(-1) for f, s, e in zip(firsts, starts, ends, strict=True)]


class _DiskRead(ReadJob):
    """Reads slots that are pinned until they have been verified or have returned."""

    def __init__(
        self,
        tier: DiskTier,
        volume: DiskVolume | None,
        slots: Slots,
        host_slots: Slots,
        generations: NDArray[np.uint64],
        deadline: float,
    ) -> None:
        self._tier, self._volume, self._slots, self._host_slots = tier, volume, slots, host_slots
        self._generations = generations
        self._namespace = b"" if volume is None else volume.namespace
        fmt = tier._codec.fmt
        current = np.zeros(len(slots), dtype=np.bool_)
        self._keys = np.empty((len(slots), fmt.blocks_per_chunk, KEY_NBYTES), dtype=np.uint8)
        if volume is not None:
            current, self._keys = volume.pin_current(slots, generations)
        self._gone = np.flatnonzero(~current).tolist()
        self._pinned = current.copy()
        at = np.flatnonzero(current)
        self._start = time.monotonic()
        operations = []
        for part in _calls(slots[at], fmt.slot_nbytes, tier.config.num_threads):
            indices = at[part]
            operations.append(ReadOperation(indices.tolist(), self._reader(indices)))
        self._job = PooledReadJob(tier._pool, operations, self._verify, self._error, deadline)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        while self._gone:
            yield self._gone.pop(), False
        yield from self._job
        self._tier._count("read_s", time.monotonic() - self._start)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        def returned(indices: Indices) -> None:
            self._unpin(indices)
            self._tier._count("late_chunks", len(indices))
            release(indices)

        self._job.abandon(returned)
        gone, self._gone = self._gone, []
        if gone:
            release(gone)

    def _reader(self, indices: NDArray[np.int64]) -> Callable[[], None]:
        tier, volume = self._tier, self._volume
        assert volume is not None
        buffers = tier._buffers(self._host_slots[indices])
        fd, offset = volume.directory.data_fd, int(self._slots[indices[0]]) * tier._codec.fmt.slot_nbytes

        def read() -> None:
            preadv_full(fd, buffers, offset)

        return read

    def _verify(self, indices: Indices) -> NDArray[np.bool_]:
        tier, volume = self._tier, self._volume
        assert volume is not None
        found = tier._codec.verify(tier._rows, self._host_slots[indices], self._namespace)
        ok = found.valid & (found.generations == self._generations[indices])
        ok &= (found.keys == self._keys[indices]).all(axis=(1, 2))
        tier._count("read_nbytes", len(indices) * tier._codec.fmt.slot_nbytes)
        if not ok.all():
            self._reject(np.asarray(indices)[~ok])
        self._unpin(indices)
        return ok

    def _reject(self, indices: NDArray[np.int64]) -> None:
        tier, volume = self._tier, self._volume
        assert volume is not None
        try:
            corrupt = volume.reject(self._slots[indices], self._generations[indices])
        except (OSError, lmdb.Error) as e:
            tier._fail(volume, e)
            return
        tier._count("corrupt_chunks", corrupt)
        if corrupt:
            logger.warning("disk tier %s: %d chunks failed to verify and were dropped", tier.config.path, corrupt)

    def _error(self, error: BaseException, indices: Indices) -> None:
        self._unpin(indices)
        self._tier._count("failed_chunks", len(indices))
        self._tier._fail(self._volume, error)

    def _unpin(self, indices: Indices) -> None:
        if self._volume is not None:
            held = np.asarray(indices)[self._pinned[indices]]  # once: what was verified may still be abandoned
            self._pinned[held] = False
            self._volume.unpin(self._slots[held])


def _writer(fd: int, buffers: list[NDArray[np.uint8]], offset: int) -> Callable[[], None]:
    return lambda: pwritev_full(fd, buffers, int(offset))


def _calls(slots: Slots, slot_nbytes: int, num_threads: int) -> list[NDArray[np.int64]]:
    """Positions in ``slots``, cut into runs of neighbouring slots for one system call each.

    Calls have up to `CALL_NBYTES`, less where all threads could not be kept busy otherwise;
    the call that holds the head of the prefix comes first.
    """
    if not len(slots):
        return []
    order = np.argsort(slots, kind="stable")
    share = max(1, len(slots) // num_threads)
    longest = max(1, min(CALL_NBYTES // slot_nbytes, share))
    ordered = slots[order]
    new_run = np.diff(ordered, prepend=ordered[0] - 2) != 1
    starts = np.flatnonzero(new_run)
    within = np.arange(len(ordered)) - starts[np.cumsum(new_run) - 1]
    cuts = np.flatnonzero(within % longest == 0)
    calls = np.split(order, cuts[1:])
    return sorted(calls, key=lambda part: int(part.min()))
