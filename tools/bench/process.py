"""The calling process: what `put` costs it, and what a busy Python loop and write-behind cost each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from kvstore import TieredStore
from tools.bench.common import Figure, Row, Scale, expect, open_store, random_blocks, random_keys
from tools.bench.raw import RawMemory

_SLOT_NBYTES: Final = 368_640
_LOOP_S: Final = 0.3
_FAR_S: Final = 120.0
_BATCH: Final = 256


def run(path: Path, scale: Scale) -> Iterator[Row]:
    n = 2 * scale.nbytes // _SLOT_NBYTES
    loops, writes, costs = [], [], []
    with open_store(_SLOT_NBYTES, n, path / "process", io="process") as store:
        blocks = random_blocks(store.layout, n)
        raw = RawMemory(_SLOT_NBYTES, n, _BATCH)
        memcpy = raw.into(blocks)
        for _ in range(scale.rounds + 1):
            costs.append((_cpu_rate_of_put(store, blocks), memcpy()))
            store.flush(_FAR_S)
            quiet = _write(store, blocks, loop=False)
            alone = _loop(threading.Event(), _LOOP_S)
            turns: list[float] = []
            busy = _write(store, blocks, loop=True, turns=turns)
            writes.append((busy, quiet))
            loops.append((turns[0], alone))
        raw.close()
    figure = Figure(name="put, by this process's CPU time", slot_nbytes=_SLOT_NBYTES, floor=0.6,
                    raw_is="memcpy, one thread, beside the same write-behind")  # fmt: skip
    yield figure.row(costs[1:])
    figure = Figure(name="a Python loop beside write-behind", slot_nbytes=_SLOT_NBYTES, floor=0.9,
                    raw_is="the same loop alone", unit="M turns/s")  # fmt: skip
    yield figure.row(loops[1:])
    figure = Figure(name="write-behind beside a Python loop", slot_nbytes=_SLOT_NBYTES, floor=0.7,
                    raw_is="write-behind alone")  # fmt: skip
    yield figure.row(writes[1:])


def _cpu_rate_of_put(store: TieredStore, blocks: torch.Tensor) -> float:
    """GB a second of CPU that this process spends, in all its threads, until put returns."""
    keys = random_keys(len(blocks))
    start = time.process_time()
    expect(store.put(keys, blocks), len(keys))
    return blocks.nbytes / (time.process_time() - start) / 1e9


def _write(store: TieredStore, blocks: torch.Tensor, *, loop: bool, turns: list[float] | None = None) -> float:
    """Write-behind's GB/s once all is put."""
    keys = random_keys(len(blocks))
    expect(store.put(keys, blocks), len(keys))
    start, before = time.perf_counter(), _written(store)
    done = threading.Event()
    ended: list[float] = []

    def flush() -> None:
        store.flush(_FAR_S)
        ended.append(time.perf_counter())
        done.set()

    flusher = threading.Thread(target=flush)
    flusher.start()
    if loop and turns is not None:
        turns.append(_loop(done, _FAR_S))
    flusher.join(_FAR_S)
    return (_written(store) - before) / (ended[0] - start) / 1e9


def _written(store: TieredStore) -> int:
    return store.stats().tiers["disk"].written_nbytes


def _loop(stop: threading.Event, seconds: float) -> float:
    """Million turns a second of a loop in pure Python."""
    turns, start = 0, time.perf_counter()
    while not stop.is_set() and time.perf_counter() - start < seconds:
        for _ in range(1000):
            turns += 1
    return turns / (time.perf_counter() - start) / 1e6
