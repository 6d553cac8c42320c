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
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.config import DiskTierConfig
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.identity import KVIdentity
from kvstore.jobs import IoPool, NothingRead, ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import Rows, SlotCodec, SlotFormat, Slots
from kvstore.tiers.base import FoundChunk, LowerTier, SealedChunks, TierStats
from kvstore.tiers.disk_index import Records
from kvstore.tiers.disk_read import DiskReadJob, Wanted
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from kvstore.tiers.health import TierHealth
from kvstore.tiers.slot_io import SlotIo

logger = logging.getLogger(__name__)

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
        self._io = SlotIo(rows, config.num_threads)
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
        self._count(miss_blocks=len(keys) - len(locations))
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
        if volume is None:
            return NothingRead(len(chunks))
        wanted = Wanted(
            slots=np.array([c.place for c in chunks], dtype=np.int64),
            generations=np.array([c.generation for c in chunks], dtype=np.uint64),
            host_slots=host_slots,
            num_blocks=np.array([c.num_keys for c in chunks], dtype=np.int64),
        )
        return DiskReadJob(self, volume, self._io, self._pool, wanted, deadline)

    def write(self, chunks: SealedChunks) -> NDArray[np.bool_]:
        stored = np.zeros(len(chunks.host_slots), dtype=np.bool_)
        with self._write_lock:
            volume = self._usable(intact=True)
            if volume is None or not len(stored):
                return stored
            start = time.monotonic()
            try:
                self._write(volume, chunks, stored)
            except (OSError, lmdb.Error) as e:
                self._count(failed_chunks=int(np.count_nonzero(~stored)))
                self._fail(volume, e)
            self._count(write_s=time.monotonic() - start)
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
            if stats.state == "off":
                stats.problem = str(self._health.last_error)
            return replace(stats, misses_by_reason=dict(stats.misses_by_reason))

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

    # -- what reads tell (DiskReadObserver); any thread

    def on_read(self, seconds: float) -> None:
        self._count(read_s=seconds)

    def on_verified(self, num_chunks: int, num_blocks: int) -> None:
        self._count(read_nbytes=num_chunks * self._codec.fmt.slot_nbytes, hit_blocks=num_blocks)

    def on_corrupt(self, num_chunks: int) -> None:
        self._count(corrupt_chunks=num_chunks)
        if num_chunks:
            logger.warning("disk tier %s: %d chunks failed to verify and were dropped", self.config.path, num_chunks)

    def on_missed(self, num_blocks: int) -> None:
        self._count(miss_blocks=num_blocks)

    def on_late(self, num_chunks: int) -> None:
        self._count(late_chunks=num_chunks)

    def on_error(self, volume: DiskVolume, error: BaseException, num_chunks: int) -> None:
        self._count(failed_chunks=num_chunks)
        if not isinstance(error, StoreClosedError):
            self._fail(volume, error)

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

    def _count(self, **amounts: float) -> None:
        with self._stats_lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

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
        good = np.zeros(len(slots), dtype=np.bool_)
        error: BaseException | None = None
        try:
            calls = self._io.writes(volume.directory.data_fd, slots, chunks.host_slots[new])
            outcomes = self._pool.run_all([call.run for call in calls], time.monotonic() + _NO_DEADLINE_S)
            for call, outcome in zip(calls, outcomes, strict=True):
                good[call.indices] = outcome is None
                error = error or outcome
        finally:
            namespaces = np.full(len(new), np.void(chunks.namespace))
            records = Records(slots, chunks.generations[new], namespaces, chunks.keys[new])
            volume.commit(records.at(good), slots[~good])
        stored[new[good]] = True
        self._count(written_nbytes=int(np.count_nonzero(good)) * self._codec.fmt.slot_nbytes)
        if error is not None:
            raise error if isinstance(error, OSError) else OSError(str(error))
