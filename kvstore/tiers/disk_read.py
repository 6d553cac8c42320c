"""A read from the disk tier: pool threads read, whoever collects verifies.

Slots are pinned in this process until they have been verified or have returned. Another
process may overwrite one that it evicted: that fails to verify, and is a plain miss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray

from kvstore.jobs import Indices, IoPool, PooledReadJob, ReadJob, ReadOperation
from kvstore.slot import SlotCodec, Slots
from kvstore.tiers.disk_volume import DiskVolume
from kvstore.tiers.slot_io import SlotIo


class DiskReadObserver(Protocol):
    """What a tier is told of its reads, from whichever thread sees it."""

    def on_read(self, seconds: float) -> None: ...
    def on_verified(self, num_chunks: int, num_blocks: int) -> None: ...
    def on_corrupt(self, num_chunks: int) -> None: ...
    def on_missed(self, num_blocks: int) -> None: ...
    def on_late(self, num_chunks: int) -> None: ...
    def on_error(self, volume: DiskVolume, error: BaseException, num_chunks: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """n slots of the disk, where they go, and how many asked-for blocks each holds."""

    slots: Slots
    generations: NDArray[np.uint64]
    host_slots: Slots
    num_blocks: NDArray[np.int64]


class DiskReadJob(ReadJob):
    """Starts when it is made."""

    def __init__(
        self,
        observer: DiskReadObserver,
        volume: DiskVolume,
        io: SlotIo,
        pool: IoPool,
        wanted: Wanted,
        deadline: float,
    ) -> None:
        self._observer, self._volume, self._io, self._wanted = observer, volume, io, wanted
        self._codec: SlotCodec = volume.codec
        pins = volume.pin_current(wanted.slots, wanted.generations)
        self._namespace, self._keys, self._pinned = pins.namespace, pins.keys, pins.current
        self._gone: Indices = np.flatnonzero(~pins.current).tolist()
        at = np.flatnonzero(pins.current)
        calls = io.reads(volume.directory.data_fd, wanted.slots[at], wanted.host_slots[at])
        operations = [ReadOperation(at[call.indices].tolist(), call.run) for call in calls]
        self._start = time.monotonic()
        self._job = PooledReadJob(pool, operations, self._verify, self._failed, deadline)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        while self._gone:
            i = self._gone.pop()
            self._observer.on_missed(int(self._wanted.num_blocks[i]))
            yield i, False
        yield from self._job
        self._observer.on_read(time.monotonic() - self._start)

    def abandon(self, release: Callable[[Indices], None]) -> None:
        def returned(indices: Indices) -> None:
            self._observer.on_late(self._unpin(indices))
            release(indices)

        self._job.abandon(returned)
        gone, self._gone = self._gone, []
        if gone:
            release(gone)

    def _verify(self, indices: Indices) -> list[bool]:
        wanted = self._wanted
        found = self._codec.verify(self._io.rows, wanted.host_slots[indices], self._namespace)
        ok: NDArray[np.bool_] = found.valid & (found.generations == wanted.generations[indices])
        ok &= (found.keys == self._keys[indices]).all(axis=(1, 2))
        if not ok.all():
            self._reject(np.asarray(indices)[~ok])
        self._observer.on_verified(len(indices), int(wanted.num_blocks[indices][ok].sum()))
        self._unpin(indices)
        good: list[bool] = ok.tolist()
        return good

    def _reject(self, bad: NDArray[np.int64]) -> None:
        wanted = self._wanted
        self._observer.on_missed(int(wanted.num_blocks[bad].sum()))
        try:
            self._observer.on_corrupt(self._volume.view.reject(wanted.slots[bad], wanted.generations[bad]))
        except (OSError, lmdb.Error) as e:
            self._observer.on_error(self._volume, e, len(bad))

    def _failed(self, error: BaseException, indices: Indices) -> None:
        self._unpin(indices)
        self._observer.on_missed(int(self._wanted.num_blocks[indices].sum()))
        self._observer.on_error(self._volume, error, len(indices))

    def _unpin(self, indices: Indices) -> int:
        """Unpin each slot once: what was verified may still be abandoned. How many were pinned."""
        held = np.asarray(indices, dtype=np.int64)[self._pinned[indices]]
        self._pinned[held] = False
        self._volume.unpin(self._wanted.slots[held])
        return len(held)
