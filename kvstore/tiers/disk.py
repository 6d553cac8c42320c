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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.config import DiskTierConfig
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.events import TierEvents
from kvstore.identity import KVIdentity
from kvstore.jobs import IoPool, NothingRead, ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import Rows, SlotCodec, SlotFormat, Slots
from kvstore.tiers.base import NO_CHUNKS, FoundChunks, LowerTier, SealedChunks, TierStats
from kvstore.tiers.disk_index import FIXED_NBYTES, NBYTES_PER_KEY, Records
from kvstore.tiers.disk_keeper import STORAGE_ERRORS, Purge, VolumeKeeper
from kvstore.tiers.disk_read import DiskReadJob, Wanted
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from kvstore.tiers.slot_io import SlotCall, SlotIo

logger = logging.getLogger(__name__)

_OVERHEAD_NBYTES: Final = 128 << 10  # LMDB's lock file, store.json, folders
_CLOSE_TIMEOUT_S: Final = 10.0
_DELETE_TIMEOUT_S: Final = 10.0
_PART_NBYTES: Final = 32 << 20  # reserved, written and committed as one
_NO_DEADLINE_S: Final = 3600.0


def num_disk_slots(config: DiskTierConfig, fmt: SlotFormat) -> int:
    """Chunks that a capacity has room for, the index's share taken off.

    Raises:
        ConfigError: not even one.
    """
    if config.num_blocks is not None:
        return config.num_blocks // fmt.blocks_per_chunk
    assert config.capacity_nbytes is not None
    shares = min(_OVERHEAD_NBYTES + FIXED_NBYTES, config.capacity_nbytes // 16)
    per_slot = fmt.slot_nbytes + NBYTES_PER_KEY * fmt.blocks_per_chunk
    num_slots = (config.capacity_nbytes - shares) // per_slot
    if num_slots < 1:
        raise ConfigError(
            f"disk.capacity_nbytes: {config.capacity_nbytes} has no room for one chunk of {fmt.slot_nbytes} bytes; "
            f"give at least {2 * fmt.slot_nbytes}"
        )
    return num_slots


def capacity_for(num_chunks: int, fmt: SlotFormat) -> int:
    """The smallest ``capacity_nbytes`` with room for so many, or little more."""
    return num_chunks * (fmt.slot_nbytes + NBYTES_PER_KEY * fmt.blocks_per_chunk) + _OVERHEAD_NBYTES + FIXED_NBYTES


class DiskTier(LowerTier):
    """See `LowerTier`. Files: `disk_dir`."""

    name = "disk"

    def __init__(
        self,
        config: DiskTierConfig,
        identity: KVIdentity,
        rows: Rows,
        codec: SlotCodec,
        namespace: bytes,
        events: TierEvents | None = None,
    ) -> None:
        """Open the directory.

        Raises:
            ConfigError: a wrong setting. A directory that is merely out of reach, full or
                read-only is no error: the tier starts off and comes back by itself.
        """
        self.config = config
        self._io = SlotIo(rows, config.num_threads)
        self._codec = codec
        self._volume_config = VolumeConfig(config, identity, codec, num_disk_slots(config, codec.fmt), events)
        self._stats = TierStats(name=self.name)
        self._stats_lock = threading.Lock()
        self._keeper = VolumeKeeper(self._volume_config, namespace)
        self._pool = IoPool("kvstore-disk", config.num_threads)

    def find_prefix(self, keys: Sequence[BlockKey]) -> FoundChunks:
        volume = self._keeper.usable()
        if volume is None or not keys:
            return NO_CHUNKS
        try:
            locations, generations = volume.view.find(keys)
        except STORAGE_ERRORS as e:
            self._keeper.fail(volume, e)
            return NO_CHUNKS
        self._count(miss_blocks=len(keys) - len(locations))
        slots = locations // self._codec.fmt.blocks_per_chunk
        starts = np.flatnonzero(np.diff(slots, prepend=-1))
        return FoundChunks(slots[starts], np.diff(starts, append=len(slots)), generations[starts])

    def read(self, chunks: FoundChunks, host_slots: Slots, deadline: float) -> ReadJob:
        volume = self._keeper.usable()
        if volume is None:
            return NothingRead(len(chunks))
        wanted = Wanted(np.asarray(chunks.places), chunks.generations, host_slots, chunks.num_keys)
        return DiskReadJob(self, volume, self._io, self._pool, wanted, deadline)

    def write(self, chunks: SealedChunks) -> NDArray[np.bool_]:
        """Chunks of a namespace that a reset has ended are through, and not stored."""
        stored = np.zeros(len(chunks.host_slots), dtype=np.bool_)
        start = time.monotonic()
        self._keeper.write(lambda volume: self._write(volume, chunks, stored))
        self._count(write_s=time.monotonic() - start)
        return stored

    def flush(self, deadline: float) -> bool:
        def sync(volume: DiskVolume) -> bool:
            os.fdatasync(volume.directory.data_fd)
            volume.sync()
            return True

        return self._keeper.write_by(deadline, sync) is True

    def set_namespace(self, namespace: bytes) -> None:
        self._keeper.set_namespace(namespace)
        self._keeper.write_by(time.monotonic() + _DELETE_TIMEOUT_S, lambda volume: None)

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Where the storage is away, the keys are deleted there before it is used again."""
        if not keys:
            return 0
        purge = Purge(list(keys))
        self._keeper.owe(purge)
        self._keeper.write_by(time.monotonic() + _DELETE_TIMEOUT_S, lambda volume: None)
        return purge.num_deleted

    def stats(self) -> TierStats:
        fmt, volume, num_slots = self._codec.fmt, self._keeper.volume, self._volume_config.num_slots
        with self._stats_lock:
            stats = replace(self._stats, misses_by_reason=dict(self._stats.misses_by_reason))
        stats.state = "on" if self._keeper.health.on else "off"
        stats.problem = "" if stats.state == "on" else str(self._keeper.health.last_error)
        stats.capacity_blocks, stats.capacity_nbytes = num_slots * fmt.blocks_per_chunk, num_slots * fmt.slot_nbytes
        if volume is not None:
            used = volume.table.num_ready
            stats.used_blocks, stats.used_nbytes = used * fmt.blocks_per_chunk, used * fmt.slot_nbytes
            stats.pinned_blocks = volume.table.num_pinned * fmt.blocks_per_chunk
            stats.evicted_blocks = volume.table.evicted_slots * fmt.blocks_per_chunk
        return stats

    def close(self) -> None:
        self._pool.close(_CLOSE_TIMEOUT_S)
        self._keeper.close(_CLOSE_TIMEOUT_S)

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
            self._keeper.fail(volume, error)

    # -- inside

    def _count(self, **amounts: float) -> None:
        with self._stats_lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    def _write(self, volume: DiskVolume, chunks: SealedChunks, stored: NDArray[np.bool_]) -> None:
        """Sets ``stored`` as it goes, so that what was stored before an error counts."""
        if chunks.namespace != self._keeper.namespace:  # asked here, where no reset comes between
            stored[:] = True
            return
        try:
            volume.view.refresh()
            stored |= volume.view.contains(chunks.keys)
            self._write_parts(volume, chunks, np.flatnonzero(~stored), stored)
        except BaseException:
            self._count(failed_chunks=int(np.count_nonzero(~stored)))
            raise

    def _write_parts(
        self, volume: DiskVolume, chunks: SealedChunks, new: NDArray[np.int64], stored: NDArray[np.bool_]
    ) -> None:
        """Slots for a part are reserved, and the part before it is committed, while another one is written."""
        step = max(1, _PART_NBYTES // self._codec.fmt.slot_nbytes)
        under_way: _Part | None = None
        try:
            for start in range(0, len(new), step):
                wanted = new[start : start + step]
                slots = volume.writer.reserve(len(wanted))
                before, under_way = under_way, self._begin(volume, slots, chunks, wanted[: len(slots)])
                if before is not None:
                    self._end(volume, before, chunks, stored)
                if len(slots) < len(wanted):  # what has no room is the tail
                    break
        finally:
            if under_way is not None:
                self._end(volume, under_way, chunks, stored)

    def _begin(self, volume: DiskVolume, slots: Slots, chunks: SealedChunks, which: NDArray[np.int64]) -> _Part:
        """Start to write some of the chunks to reserved slots."""
        try:
            calls = self._io.writes(volume.directory.data_fd, slots, chunks.host_slots[which])
        except BaseException:
            volume.writer.give_back(slots)
            raise
        wait = self._pool.start_all([call.run for call in calls], time.monotonic() + _NO_DEADLINE_S)
        return _Part(slots, which, calls, wait)

    def _end(self, volume: DiskVolume, part: _Part, chunks: SealedChunks, stored: NDArray[np.bool_]) -> None:
        """Wait for a part, and commit what could be written."""
        good = np.zeros(len(part.slots), dtype=np.bool_)
        error: BaseException | None = None
        for call, outcome in zip(part.calls, part.wait(), strict=True):
            good[call.indices] = outcome is None
            error = error or outcome
        namespaces = np.full(len(part.slots), np.void(chunks.namespace))
        records = Records(part.slots, chunks.generations[part.which], namespaces, chunks.keys[part.which])
        volume.writer.commit(records.at(good), part.slots[~good])
        stored[part.which[good]] = True
        self._count(written_nbytes=int(np.count_nonzero(good)) * self._codec.fmt.slot_nbytes)
        if error is not None:
            raise error if isinstance(error, OSError) else OSError(str(error))


@dataclass(frozen=True, slots=True)
class _Part:
    """Chunks that are being written: ``slots[i]`` gets chunk ``which[i]``."""

    slots: Slots
    which: NDArray[np.int64]
    calls: Sequence[SlotCall]
    wait: Callable[[], list[BaseException | None]]
