"""The disk tier against bare O_DIRECT calls of the same size, by as many threads, on the same file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvstore import BlockKey, TieredStore
from kvstore.tiers.disk import DiskTier
from tools.bench.common import (
    SLOT_SIZES,
    Figure,
    Measure,
    Row,
    Scale,
    expect,
    forget_host,
    interleaved,
    open_store,
    put_durably,
    random_blocks,
    random_keys,
    rate_of,
)
from tools.bench.raw import THREADS, RawFile

_GET_FLOORS: Final = {64 << 10: (0.93, 0.6), 368_640: (0.97, 0.9), 2 << 20: (0.97, 0.95)}
_CHURN_TURNOVERS: Final = 16
_CHURN_HIT_RATIO: Final = 0.3
_READ: Final = f"O_DIRECT preadv, {THREADS} threads, same file, slots and calls"
_GROW: Final = f"O_DIRECT pwritev, {THREADS} threads, 2 MiB calls, into fallocated extents, fdatasync"
_REWRITE: Final = f"memcpy + xxh3 + O_DIRECT pwritev in place ({THREADS} threads, 2 MiB calls), all at once, fdatasync"


def run(path: Path, scale: Scale) -> Iterator[Row]:
    for slot_nbytes in SLOT_SIZES:
        n = scale.nbytes // slot_nbytes
        yield from _gets(path / f"get-{slot_nbytes}", slot_nbytes, n, scale.rounds)
        yield _churn(path / f"churn-{slot_nbytes}", slot_nbytes, n, scale.rounds)
        yield _growing(path / f"grow-{slot_nbytes}", slot_nbytes, n, scale.rounds)
        yield from _rewriting(path / f"put-{slot_nbytes}", slot_nbytes, n, scale.rounds)


def _gets(path: Path, slot_nbytes: int, n: int, rounds: int) -> Iterator[Row]:
    contiguous, scattered = _GET_FLOORS[slot_nbytes]
    keys = random_keys(n)
    with open_store(slot_nbytes, n, path) as store:
        blocks = random_blocks(store.layout, n)
        put_durably(store, keys, blocks)
        raw, slots = RawFile(path / "data", slot_nbytes, n), _slots(store, keys)
        figure = Figure(name="get, contiguous", slot_nbytes=slot_nbytes, floor=contiguous, raw_is=_READ)
        yield figure.compare(rounds, ours=_get(store, keys, blocks), raw=raw.read(slots))
        order = np.random.default_rng(0).permutation(n // 2) * 2  # every other one: no two are neighbours
        mixed = [keys[i] for i in order]
        figure = Figure(name="get, scattered single slots", slot_nbytes=slot_nbytes, floor=scattered, raw_is=_READ)
        yield figure.compare(rounds, ours=_get(store, mixed, blocks), raw=raw.read(slots[order]))
        raw.close()


def _churn(path: Path, slot_nbytes: int, n: int, rounds: int) -> Row:
    """Prefixes as they lie after much eviction, against one that was put into an empty directory."""
    rng, length = np.random.default_rng(1), max(2, n // 8)
    with (
        open_store(slot_nbytes, n, path / "churned") as store,
        open_store(slot_nbytes, n, path / "fresh") as fresh,
    ):
        blocks, recent = random_blocks(store.layout, n), list[list[BlockKey]]()
        put_so_far = 0
        while put_so_far < _CHURN_TURNOVERS * n:
            if recent and rng.random() < _CHURN_HIT_RATIO:
                store._planes.io.find_prefix(recent[int(rng.integers(len(recent)))])  # type: ignore[union-attr]
                continue
            keys = random_keys(int(rng.integers(1, length)))
            put_durably(store, keys, blocks[: len(keys)])
            recent, put_so_far = [*recent[-8:], keys], put_so_far + len(keys)
        last = recent[-4:]
        whole = [key for keys in last for key in keys]
        contiguous = random_keys(len(whole))
        put_durably(fresh, contiguous, blocks[: len(whole)])
        raw_is = f"our get of a prefix put into an empty directory; here {_CHURN_TURNOVERS} x the capacity was evicted"
        figure = Figure(name="get, after eviction churn", slot_nbytes=slot_nbytes, floor=0.85, raw_is=raw_is)
        return figure.compare(rounds, ours=_get(store, whole, blocks), raw=_get(fresh, contiguous, blocks))


def _growing(path: Path, slot_nbytes: int, n: int, rounds: int) -> Row:
    path.mkdir()
    raw, number = RawFile(path / "raw", slot_nbytes, n), 0

    def grow() -> float:
        nonlocal number
        number += 1
        folder = path / str(number)
        with open_store(slot_nbytes, n, folder) as store:
            keys, blocks = random_keys(n), random_blocks(store.layout, n)
            rate = rate_of(blocks.nbytes, lambda: put_durably(store, keys, blocks))
        (folder / "data").unlink()
        return rate

    figure = Figure(name="put, growing, durable", slot_nbytes=slot_nbytes, floor=0.9, raw_is=_GROW)
    row = figure.compare(rounds, ours=grow, raw=raw.grow)
    raw.close()
    return row


def _rewriting(path: Path, slot_nbytes: int, n: int, rounds: int) -> Iterator[Row]:
    with open_store(slot_nbytes, 3 * n, path, disk_blocks=n) as store:
        raw = RawFile(path.with_suffix(".raw"), slot_nbytes, n)
        blocks, keys = random_blocks(store.layout, n), random_keys(n)
        source = blocks.numpy().reshape(n, -1)
        raw.grow()
        put_durably(store, keys, blocks)

        def evict() -> float:
            nonlocal keys
            keys = random_keys(n)
            return rate_of(blocks.nbytes, lambda: put_durably(store, keys, blocks))

        def rewrite() -> float:
            store.purge(keys)
            return evict()

        measures: dict[str, Measure] = {
            "raw": lambda: raw.copy_hash_write(source), "rewrite": rewrite, "evict": evict,
        }  # fmt: skip
        rates = interleaved(rounds, measures)
        figure = Figure(name="put, rewriting, durable", slot_nbytes=slot_nbytes, floor=0.85, raw_is=_REWRITE)
        yield figure.row([(r["rewrite"], r["raw"]) for r in rates])
        room = "our put into free slots that were written before"
        figure = Figure(name="put, full and evicting", slot_nbytes=slot_nbytes, floor=0.9, raw_is=room)
        yield figure.row([(r["evict"], r["rewrite"]) for r in rates])
        raw.close()


def _get(store: TieredStore, keys: list[BlockKey], blocks: torch.Tensor) -> Measure:
    out = torch.empty_like(blocks[: len(keys)]).fill_(1)
    done: list[int] = []

    def work() -> float:
        forget_host(store)
        rate = rate_of(out.nbytes, lambda: done.append(store.get(keys, out)))
        expect(done.pop(), len(keys))
        if not torch.equal(out[-1], blocks[-1]):
            raise RuntimeError("wrong bytes: the figure would mean nothing")
        return rate

    return work


def _slots(store: TieredStore, keys: list[BlockKey]) -> np.ndarray:
    tier = store._planes.io._tiers[0]  # type: ignore[union-attr]
    assert isinstance(tier, DiskTier)
    assert tier._keeper.volume is not None
    return tier._keeper.volume.view.find(keys)[0]
