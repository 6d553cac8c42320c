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
    Row,
    Scale,
    compare,
    open_store,
    random_blocks,
    random_keys,
    rate_of,
    warm_rows,
)

_BATCH_NBYTES: Final = 64 << 20
_MIN_BATCH, _MAX_BATCH = 16, 256  # blocks a call: a prompt of some thousand tokens
_RAW: Final = "one thread's memcpy, same blocks"


def run(path: Path, scale: Scale) -> Iterator[Row]:
    for slot_nbytes in SLOT_SIZES:
        n = scale.nbytes // slot_nbytes
        with open_store(slot_nbytes, n) as store:
            yield from _bare(store, slot_nbytes, n, scale.rounds)
        yield _beside_write_behind(path, slot_nbytes, n, scale.rounds)


def _bare(store: TieredStore, slot_nbytes: int, n: int, rounds: int) -> Iterator[Row]:
    blocks, out = random_blocks(store.layout, n), random_blocks(store.layout, n)
    copy = _memcpy(blocks, slot_nbytes)
    keys = random_keys(n)
    rng = np.random.default_rng(0)

    def put(purged: list[BlockKey], fresh: list[BlockKey]) -> float:
        store.purge(purged)
        return _batched(store, "put", fresh, blocks)

    def renew() -> float:
        nonlocal keys
        gone, keys = keys, random_keys(n)
        return put(gone, keys)

    yield compare("put, contiguous slots", slot_nbytes, {"ours": renew, "raw": copy}, rounds, 1.0, _RAW)
    get = {"ours": lambda: _batched(store, "get", keys, out), "raw": copy}
    yield compare("get, contiguous slots", slot_nbytes, get, rounds, 1.0, _RAW)
    mixed = [keys[i] for i in rng.permutation(n)]
    get = {"ours": lambda: _batched(store, "get", mixed, out), "raw": copy}
    yield compare("get, scattered slots", slot_nbytes, get, rounds, 0.9, _RAW)

    def renew_half() -> float:
        gone = [keys[i] for i in range(0, n, 2)]
        fresh = random_keys(len(gone))
        keys[::2] = fresh
        return put(gone, fresh)

    half = _memcpy(blocks[: (n + 1) // 2], slot_nbytes)
    yield compare("put, scattered slots", slot_nbytes, {"ours": renew_half, "raw": half}, rounds, 0.9, _RAW)


def _beside_write_behind(path: Path, slot_nbytes: int, n: int, rounds: int) -> Row:
    with open_store(slot_nbytes, 2 * n, path / f"host-{slot_nbytes}", disk_blocks=2 * n, io="process") as store:
        blocks = random_blocks(store.layout, n)

        def put() -> float:
            store.put(random_keys(n // 2), blocks[: n // 2])  # being written while the rest is put
            rate = _batched(store, "put", random_keys(n // 2), blocks[n // 2 : n // 2 * 2])
            store.flush(60)
            return rate

        copy = _memcpy(blocks[: n // 2], slot_nbytes)
        return compare("put, write-behind running", slot_nbytes, {"ours": put, "raw": copy}, rounds, 0.6, _RAW)


def _batch(slot_nbytes: int) -> int:
    return min(_MAX_BATCH, max(_MIN_BATCH, _BATCH_NBYTES // slot_nbytes))


def _batched(store: TieredStore, verb: str, keys: list[BlockKey], blocks: torch.Tensor) -> float:
    step = _batch(store.layout.block_nbytes)
    call = store.put if verb == "put" else store.get

    def work() -> None:
        for i in range(0, len(keys), step):
            part = keys[i : i + step]
            if call(part, blocks[i : i + len(part)]) != len(part):
                raise RuntimeError(f"{verb} did not take every block: the figure would mean nothing")

    return rate_of(len(keys) * store.layout.block_nbytes, work)


def _memcpy(blocks: torch.Tensor, slot_nbytes: int):  # type: ignore[no-untyped-def]
    source = blocks.numpy().reshape(len(blocks), -1)
    target = warm_rows(len(blocks), slot_nbytes)[:, : source.shape[1]]
    step = _batch(slot_nbytes)

    def work() -> None:
        for i in range(0, len(source), step):
            np.copyto(target[i : i + step], source[i : i + step])

    return lambda: rate_of(source.nbytes, work)
