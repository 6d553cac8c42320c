"""The shared path against whole-file O_DIRECT I/O by as many threads."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from kvstore import SharedTierConfig
from kvstore.direct_io import open_direct, preadv_full, pwritev_full
from kvstore.jobs import IoPool
from tools.bench.common import Row, Scale, compare, open_store, random_blocks, random_keys, rate_of, warm_rows

_SLOT_NBYTES: Final = 2 << 20
_HEADER_NBYTES: Final = 4096
_THREADS: Final = 8
_FAR_S: Final = 3600.0


def run(path: Path, scale: Scale) -> Iterator[Row]:
    n, rounds = scale.nbytes // _SLOT_NBYTES, scale.rounds
    shared = SharedTierConfig(path=str(path / "shared"), capacity_nbytes=64 * scale.nbytes, num_threads=_THREADS)
    raw = path / "raw"
    pool = IoPool("bench", _THREADS)
    rows = warm_rows(n, _SLOT_NBYTES + _HEADER_NBYTES)
    with open_store(_SLOT_NBYTES, n, shared=shared) as store:
        blocks, keys = random_blocks(store.layout, n), random_keys(n)
        out = torch.empty_like(blocks).fill_(1)

        def store_all() -> None:
            _expect(store.put(keys, blocks), n)
            store.flush(120)

        def put() -> float:
            nonlocal keys
            store.purge(keys)
            keys = random_keys(n)
            return rate_of(blocks.nbytes, store_all)

        def get() -> float:
            store._manager.reset()  # nothing is served from host memory
            store._lower_epoch = store._manager.epoch
            return rate_of(blocks.nbytes, lambda: _expect(store.get(keys, out), n))

        def write_all() -> float:
            shutil.rmtree(raw, ignore_errors=True)
            raw.mkdir()
            return rate_of(
                blocks.nbytes, lambda: _run(pool, [_writer(raw / str(i), row) for i, row in enumerate(rows)])
            )

        def read_all() -> float:
            return rate_of(
                blocks.nbytes, lambda: _run(pool, [_reader(raw / str(i), row) for i, row in enumerate(rows)])
            )

        is_raw = "whole files, O_DIRECT, same threads"
        yield compare(
            "put, durable", _SLOT_NBYTES, {"ours": put, "raw": write_all}, rounds, 0.8, f"{is_raw}, fdatasync"
        )
        yield compare("get", _SLOT_NBYTES, {"ours": get, "raw": read_all}, rounds, 0.85, is_raw)
    pool.close(_FAR_S)


def _expect(got: int, n: int) -> None:
    if got != n:
        raise RuntimeError(f"{n - got} blocks were missing: the figure would mean nothing")


def _run(pool: IoPool, operations: list[Callable[[], None]]) -> None:
    for error in pool.run_all(operations, time.monotonic() + _FAR_S):
        if error is not None:
            raise error


def _writer(path: Path, row):  # type: ignore[no-untyped-def]
    def write() -> None:
        fd = open_direct(path, os.O_WRONLY | os.O_CREAT)
        pwritev_full(fd, [row], 0)
        os.fdatasync(fd)
        os.close(fd)

    return write


def _reader(path: Path, row):  # type: ignore[no-untyped-def]
    def read() -> None:
        fd = open_direct(path, os.O_RDONLY)
        preadv_full(fd, [row], 0)
        os.close(fd)

    return read
