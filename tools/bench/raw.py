"""The bare hardware: memcpy by one thread, and O_DIRECT calls on one file by some threads.

Buffers are arenas, so that pages are of the kind and as warm as the store's own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xxhash

from kvstore.arena import HostArena
from kvstore.direct_io import open_direct
from kvstore.tiers.disk_dir import EXTENT_NBYTES
from kvstore.tiers.slot_io import neighbouring_slots
from tools.bench.common import Measure, rate_of

THREADS: Final = 8
Call = Callable[[], object]


class RawThreads:
    """Threads that take calls one after the other and wait for nothing else."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS + 1)

    def start(self, calls: Iterable[Call]) -> Call:
        """Begin; what is returned waits for the end."""
        queue = iter(list(calls))

        def drain() -> None:
            for call in queue:
                call()

        futures = [self._pool.submit(drain) for _ in range(THREADS)]
        return lambda: [future.result() for future in futures]

    def run(self, calls: Iterable[Call]) -> None:
        self.start(calls)()

    def close(self) -> None:
        self._pool.shutdown()


class RawFile:
    """One file of n slots, and a buffer of the same size."""

    def __init__(self, path: Path, slot_nbytes: int, n: int) -> None:
        self.threads = RawThreads()
        self._fd = open_direct(path, os.O_RDWR | os.O_CREAT)
        self._arena = HostArena(n, slot_nbytes)
        self._rows, self._slot_nbytes, self._n = self._arena.rows, slot_nbytes, n

    def read(self, slots: np.ndarray) -> Measure:
        """These slots, neighbours in one call, each call into neighbouring rows."""
        calls = [self._reader(slots[part], part) for part in neighbouring_slots(slots, self._slot_nbytes, THREADS)]
        return lambda: rate_of(len(slots) * self._slot_nbytes, lambda: self.threads.run(calls))

    def grow(self) -> float:
        """Write all rows to an empty file, extent by extent, durably."""
        os.ftruncate(self._fd, 0)
        os.fsync(self._fd)
        return rate_of(self._rows.nbytes, self._grow)

    def copy_hash_write(self, source: np.ndarray) -> float:
        """What no store can do without: copy and hash all rows, and write them in place, all three at once."""
        return rate_of(source.nbytes, lambda: self._copy_hash_write(source))

    def close(self) -> None:
        self.threads.close()
        self._arena.close()
        os.close(self._fd)

    def _grow(self) -> None:
        step = max(1, EXTENT_NBYTES // self._slot_nbytes)
        for first in range(0, self._n, step):
            end = min(first + step, self._n)
            os.posix_fallocate(self._fd, 0, end * self._slot_nbytes)
            self.threads.run(self._writers(first, end))
        os.fdatasync(self._fd)

    def _copy_hash_write(self, source: np.ndarray) -> None:
        written = self.threads.start(self._writers(0, self._n))
        hashed = self.threads._pool.submit(lambda: [xxhash.xxh3_128_digest(row.data) for row in source])
        for first in range(0, self._n, 16):
            np.copyto(self._rows[first : first + 16, : source.shape[1]], source[first : first + 16])
        hashed.result()
        written()
        os.fdatasync(self._fd)

    def _reader(self, slots: np.ndarray, rows: np.ndarray) -> Call:
        offset, buffers = int(slots[0]) * self._slot_nbytes, [self._rows[row].data for row in rows.tolist()]
        return lambda: os.preadv(self._fd, buffers, offset)

    def _writers(self, first: int, end: int) -> list[Call]:
        slots = np.arange(first, end)
        return [self._writer(slots[part]) for part in neighbouring_slots(slots, self._slot_nbytes, THREADS)]

    def _writer(self, slots: np.ndarray) -> Call:
        first, end = int(slots[0]), int(slots[-1]) + 1
        buffer = self._rows[first:end].reshape(-1).data
        return lambda: os.pwritev(self._fd, [buffer], first * self._slot_nbytes)


class RawMemory:
    """One thread's memcpy between blocks and a buffer of as many slots, in batches."""

    def __init__(self, slot_nbytes: int, n: int, batch: int) -> None:
        self._arena, self._batch = HostArena(n, slot_nbytes), batch

    def into(self, blocks: torch.Tensor) -> Measure:
        source = blocks.numpy().reshape(len(blocks), -1)
        return self._copy(self._arena.rows[: len(source), : source.shape[1]], source)

    def out_to(self, blocks: torch.Tensor) -> Measure:
        target = blocks.numpy().reshape(len(blocks), -1)
        return self._copy(target, self._arena.rows[: len(target), : target.shape[1]])

    def close(self) -> None:
        self._arena.close()

    def _copy(self, target: np.ndarray, source: np.ndarray) -> Measure:
        starts = range(0, len(source), self._batch)
        pieces = [(target[i : i + self._batch], source[i : i + self._batch]) for i in starts]
        return lambda: rate_of(source.nbytes, lambda: list(itertools.starmap(np.copyto, pieces)))
