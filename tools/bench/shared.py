"""The shared path against whole-file O_DIRECT I/O by as many threads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch

from kvstore import SharedTierConfig
from kvstore.arena import HostArena
from kvstore.direct_io import open_direct
from tools.bench.common import (
    Figure,
    Row,
    Scale,
    expect,
    forget_host,
    open_store,
    put_durably,
    random_blocks,
    random_keys,
    rate_of,
)
from tools.bench.raw import THREADS, RawThreads

_SLOT_NBYTES: Final = 2 << 20
_HEADER_NBYTES: Final = 4096
_RAW: Final = f"whole files of the same size, O_DIRECT, {THREADS} threads"


def run(path: Path, scale: Scale) -> Iterator[Row]:
    n, rounds = scale.nbytes // _SLOT_NBYTES, scale.rounds
    shared = SharedTierConfig(path=str(path / "shared"), capacity_nbytes=64 * scale.nbytes, num_threads=THREADS)
    raw = _RawFiles(path / "raw", n)
    with open_store(_SLOT_NBYTES, n, shared=shared) as store:
        blocks, keys = random_blocks(store.layout, n), random_keys(n)
        out = torch.empty_like(blocks).fill_(1)

        def put() -> float:
            nonlocal keys
            store.purge(keys)
            keys = random_keys(n)
            return rate_of(blocks.nbytes, lambda: put_durably(store, keys, blocks))

        def get() -> float:
            forget_host(store)
            return rate_of(blocks.nbytes, lambda: expect(store.get(keys, out), n))

        figure = Figure(name="put, durable", slot_nbytes=_SLOT_NBYTES, floor=0.8, raw_is=f"{_RAW}, fdatasync")
        yield figure.compare(rounds, ours=put, raw=raw.write)
        figure = Figure(name="get", slot_nbytes=_SLOT_NBYTES, floor=0.85, raw_is=_RAW)
        yield figure.compare(rounds, ours=get, raw=raw.read)
    raw.close()


class _RawFiles:
    """n files, each of a header's and a slot's size, and a buffer for each."""

    def __init__(self, folder: Path, n: int) -> None:
        self._folder, self._threads = folder, RawThreads()
        self._arena = HostArena(n, _SLOT_NBYTES + _HEADER_NBYTES)

    def write(self) -> float:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        return self._run(_write)

    def read(self) -> float:
        return self._run(_read)

    def close(self) -> None:
        self._threads.close()
        self._arena.close()

    def _run(self, call: Callable[[Path, np.ndarray], None]) -> float:
        rows = self._arena.rows
        calls = [lambda i=i, row=row: call(self._folder / str(i), row) for i, row in enumerate(rows)]
        return rate_of(len(rows) * _SLOT_NBYTES, lambda: self._threads.run(calls))


def _write(path: Path, row: np.ndarray) -> None:
    fd = open_direct(path, os.O_WRONLY | os.O_CREAT)
    os.pwritev(fd, [row.data], 0)
    os.fdatasync(fd)
    os.close(fd)


def _read(path: Path, row: np.ndarray) -> None:
    fd = open_direct(path, os.O_RDONLY)
    os.preadv(fd, [row.data], 0)
    os.close(fd)
