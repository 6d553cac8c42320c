"""Host memory: put and get against one thread's memcpy of the same blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvstore import BlockKey, TieredStore
from tools.bench.common import (
    SLOT_SIZES,
    Figure,
    Measure,
    Row,
    Scale,
    expect,
    open_store,
    random_blocks,
    random_keys,
    rate_of,
)
from tools.bench.raw import RawMemory

_MIN_BATCH: Final = 16
_BATCH_NBYTES: Final = 32 << 20
_RAW: Final = "memcpy, one thread, idle, same slots and batches, contiguous"


def run(path: Path, scale: Scale) -> Iterator[Row]:
    for slot_nbytes in SLOT_SIZES:
        n = scale.nbytes // slot_nbytes // 2 * 2
        for batch in sorted({_MIN_BATCH, max(_MIN_BATCH, _BATCH_NBYTES // slot_nbytes)}):
            with open_store(slot_nbytes, n) as store:
                yield from _Bench(store, batch, scale.rounds).bare()
        for io in ("thread", "process"):
            folder = path / f"host-{slot_nbytes}-{io}"
            with open_store(slot_nbytes, 2 * n, folder, disk_blocks=2 * n, io=io) as store:
                yield from _Bench(store, batch, scale.rounds).beside_write_behind(n // 2, io)


class _Bench:
    """One store, one size of batches."""

    def __init__(self, store: TieredStore, batch: int, rounds: int) -> None:
        self._store, self._batch, self._rounds = store, batch, rounds
        self._slot_nbytes = store._planes.fmt.slot_nbytes

    def bare(self) -> Iterator[Row]:
        """Nothing below host memory."""
        store, n = self._store, self._store.config.host.num_blocks
        blocks, out = random_blocks(store.layout, n), random_blocks(store.layout, n)
        raw = RawMemory(self._slot_nbytes, n, self._batch)
        keys = random_keys(n)
        self._put(keys, blocks)
        mixed = [keys[i] for i in np.random.default_rng(0).permutation(n)]
        yield self._row("get, contiguous slots", 1.0, lambda: self._get(keys, out), raw.out_to(out))
        yield self._row("get, scattered slots", 0.9, lambda: self._get(mixed, out), raw.out_to(out))

        def renew(at: slice) -> float:
            store.purge(keys[at])
            keys[at] = random_keys(len(keys[at]))
            return self._put(keys[at], blocks)

        half = blocks[: n // 2]
        yield self._row("put, contiguous slots", 1.0, lambda: renew(slice(None)), raw.into(blocks))
        yield self._row("put, scattered slots", 0.9, lambda: renew(slice(0, None, 2)), raw.into(half))
        raw.close()

    def beside_write_behind(self, n: int, io: str) -> Iterator[Row]:
        """n blocks are being written while other n are put, or read back."""
        store = self._store
        blocks = random_blocks(store.layout, n)
        other, out = blocks.clone(), blocks.clone()
        raw = RawMemory(self._slot_nbytes, n, self._batch)

        def put() -> float:
            expect(store.put(random_keys(n), other), n)
            rate = self._put(random_keys(n), blocks)
            store.flush(120)
            return rate

        def get() -> float:
            known = random_keys(n)
            self._put(known, blocks)
            store.flush(120)
            expect(store.put(random_keys(n), other), n)
            rate = self._get(known, out)
            store.flush(120)
            return rate

        where = f"write-behind running (io={io})"
        yield self._row(f"put, {where}", 0.6, put, raw.into(blocks))
        yield self._row(f"get, {where}", 0.6, get, raw.out_to(out))
        raw.close()

    def _row(self, name: str, floor: float, ours: Measure, raw: Measure) -> Row:
        name = f"{name}, batches of {self._batch}"
        figure = Figure(name=name, slot_nbytes=self._slot_nbytes, floor=floor, raw_is=_RAW)
        return figure.compare(self._rounds, ours=ours, raw=raw)

    def _put(self, keys: list[BlockKey], blocks: torch.Tensor) -> float:
        return self._batched(self._store.put, keys, blocks)

    def _get(self, keys: list[BlockKey], out: torch.Tensor) -> float:
        return self._batched(self._store.get, keys, out)

    def _batched(self, call, keys: list[BlockKey], blocks: torch.Tensor) -> float:  # type: ignore[no-untyped-def]
        step = self._batch
        pieces = [(keys[i : i + step], blocks[i : min(i + step, len(keys))]) for i in range(0, len(keys), step)]
        done: list[int] = []
        rate = rate_of(
            len(keys) * self._store.layout.block_nbytes, lambda: done.extend(call(part, out) for part, out in pieces)
        )
        expect(sum(done), len(keys))
        return rate
