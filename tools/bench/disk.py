"""The disk tier against bare O_DIRECT calls of the same size, by as many threads, on the same file."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
import xxhash

from kvstore import BlockKey, TieredStore
from kvstore.direct_io import open_direct
from kvstore.jobs import IoPool
from kvstore.tiers.disk_dir import EXTENT_NBYTES
from kvstore.tiers.slot_io import SlotIo
from tools.bench.common import (
    SLOT_SIZES,
    Measure,
    Row,
    Scale,
    compare,
    open_store,
    random_blocks,
    random_keys,
    rate_of,
    warm_rows,
)

_THREADS: Final = 8
_FAR_S: Final = 3600.0
_PIECE_NBYTES: Final = 64 << 20
_GET_FLOORS: Final = {64 << 10: (0.93, 0.6), 368_640: (0.97, 0.9), 2 << 20: (0.97, 0.95)}
_RAW_READ: Final = "O_DIRECT preadv, same file, slots, threads and calls"


class Raw:
    """Bare reads and writes of whole slots of one file."""

    def __init__(self, path: Path, slot_nbytes: int, n: int) -> None:
        self.fd = open_direct(path, os.O_RDWR | os.O_CREAT)
        self.rows = warm_rows(n, slot_nbytes)
        self.slot_nbytes, self.n = slot_nbytes, n
        self._io, self._pool = SlotIo(self.rows, _THREADS), IoPool("bench", _THREADS)

    def read(self, slots: np.ndarray) -> Measure:
        calls = self._io.reads(self.fd, slots, np.arange(len(slots)))
        return lambda: rate_of(len(slots) * self.slot_nbytes, lambda: self._run(calls))

    def grow(self) -> None:
        """Write all rows to an empty file, extent by extent, durably."""
        os.ftruncate(self.fd, 0)
        step = max(1, EXTENT_NBYTES // self.slot_nbytes)
        for first in range(0, self.n, step):
            slots = np.arange(first, min(first + step, self.n))
            os.posix_fallocate(self.fd, 0, int(slots[-1] + 1) * self.slot_nbytes)
            self._run(self._io.writes(self.fd, slots, slots))
        os.fdatasync(self.fd)

    def copy_hash_write(self, source: np.ndarray) -> None:
        """What a store can't do without: copy, hash, and write in place, overlapped; durably."""
        step, futures = max(1, _PIECE_NBYTES // self.slot_nbytes), []
        for first in range(0, self.n, step):
            slots = np.arange(first, min(first + step, self.n))
            np.copyto(self.rows[slots[0] : slots[-1] + 1, : source.shape[1]], source[slots[0] : slots[-1] + 1])
            for slot in slots.tolist():
                xxhash.xxh3_128_digest(self.rows[slot].data)
            for call in self._io.writes(self.fd, slots, slots):
                futures.append(self._pool.submit(call.run, time.monotonic() + _FAR_S))
        for future in futures:
            future.result(_FAR_S)
        os.fdatasync(self.fd)

    def close(self) -> None:
        self._pool.close(_FAR_S)
        os.close(self.fd)

    def _run(self, calls) -> None:  # type: ignore[no-untyped-def]
        for error in self._pool.run_all([call.run for call in calls], time.monotonic() + _FAR_S):
            if error is not None:
                raise error


def run(path: Path, scale: Scale) -> Iterator[Row]:
    for slot_nbytes in SLOT_SIZES:
        n = scale.nbytes // slot_nbytes
        yield from _gets(path / f"get-{slot_nbytes}", slot_nbytes, n, scale.rounds)
        yield from _puts(path / f"put-{slot_nbytes}", slot_nbytes, n, scale.rounds)


def _gets(path: Path, slot_nbytes: int, n: int, rounds: int) -> Iterator[Row]:
    contiguous, scattered = _GET_FLOORS[slot_nbytes]
    keys, order = random_keys(n), np.random.default_rng(0).permutation(n)
    with open_store(slot_nbytes, n, path, disk_blocks=2 * n) as store:
        blocks = random_blocks(store.layout, n)
        _put(store, keys, blocks)
        raw = Raw(path / "data", slot_nbytes, n)
        slots = store._io._tiers[0]._volume.find(keys)[0]  # type: ignore[union-attr]
        get = {"ours": _get(store, keys, blocks), "raw": raw.read(slots)}
        yield compare("get, contiguous", slot_nbytes, get, rounds, contiguous, _RAW_READ)
        mixed = {"ours": _get(store, [keys[i] for i in order], blocks), "raw": raw.read(slots[order])}
        yield compare("get, scattered single slots", slot_nbytes, mixed, rounds, scattered, _RAW_READ)
        kept = _churn(store, blocks, n)
        churned = {"ours": _get(store, kept, blocks), "raw": raw.read(slots[: len(kept)])}
        yield compare("get, after churn", slot_nbytes, churned, rounds, 0.85, f"contiguous {_RAW_READ}")
        raw.close()


def _churn(store: TieredStore, blocks: torch.Tensor, n: int) -> list[BlockKey]:
    """Evict by putting many prefixes of mixed lengths; the last ones put, as one list."""
    rng, last = np.random.default_rng(1), list[BlockKey]()
    length = max(2, n // 16)
    for _ in range(8 * 16):
        keys = random_keys(int(rng.integers(1, 2 * length)))[: len(blocks)]
        _put(store, keys, blocks[: len(keys)])
        last = [*last, *keys][-n:]
    return last


def _puts(path: Path, slot_nbytes: int, n: int, rounds: int) -> Iterator[Row]:
    raw = Raw(path.with_suffix(".raw"), slot_nbytes, n)
    blocks, number = random_blocks(open_layout(slot_nbytes), n), 0
    source = blocks.numpy().reshape(n, -1)
    nbytes = source.nbytes

    def grow() -> float:
        nonlocal number
        number += 1
        with open_store(slot_nbytes, n, path / str(number), disk_blocks=n) as store:
            return rate_of(nbytes, lambda: _put(store, random_keys(n), blocks))

    grown = {"ours": grow, "raw": lambda: rate_of(nbytes, raw.grow)}
    yield compare("put, growing, durable", slot_nbytes, grown, rounds, 0.9, "O_DIRECT pwritev into fallocated extents")
    with open_store(slot_nbytes, n, path / "0", disk_blocks=n) as store:
        keys = random_keys(n)
        _put(store, keys, blocks)

        def rewrite() -> float:
            nonlocal keys
            store.purge(keys)
            keys = random_keys(n)
            return rate_of(nbytes, lambda: _put(store, keys, blocks))

        def evict() -> float:
            nonlocal keys
            keys = random_keys(n)
            return rate_of(nbytes, lambda: _put(store, keys, blocks))

        together = lambda: rate_of(nbytes, lambda: raw.copy_hash_write(source))  # noqa: E731
        rewritten = {"ours": rewrite, "raw": together}
        yield compare(
            "put, rewriting, durable", slot_nbytes, rewritten, rounds, 0.85, "memcpy + xxh3 + O_DIRECT, together"
        )
        full = {"ours": evict, "raw": rewrite}
        yield compare("put, full and evicting", slot_nbytes, full, rounds, 0.9, "our own put where there is room")
    raw.close()


def open_layout(slot_nbytes: int):  # type: ignore[no-untyped-def]
    from tools.bench.common import layout_of

    return layout_of(slot_nbytes)


def _put(store: TieredStore, keys: list[BlockKey], blocks: torch.Tensor) -> None:
    if store.put(keys, blocks) != len(keys) or not store.flush(120):
        raise RuntimeError("not every block was stored: the figure would mean nothing")


def _get(store: TieredStore, keys: list[BlockKey], blocks: torch.Tensor) -> Measure:
    out = torch.empty_like(blocks[: len(keys)]).fill_(1)

    def work() -> float:
        store._manager.reset()  # nothing is served from host memory
        store._lower_epoch = store._manager.epoch
        rate = rate_of(out.nbytes, lambda: check(store.get(keys, out)))
        if not torch.equal(out[-1], blocks[len(keys) - 1]):
            raise RuntimeError("wrong bytes")
        return rate

    def check(n: int) -> None:
        if n != len(keys):
            raise RuntimeError(f"{len(keys) - n} blocks were missing: the figure would mean nothing")

    return work
