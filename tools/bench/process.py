"""The calling process: what a busy Python loop and write-behind cost each other, with an I/O process."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tools.bench.common import Row, Scale, open_store, random_blocks, random_keys

_SLOT_NBYTES: Final = 368_640
_LOOP_S: Final = 0.5


def run(path: Path, scale: Scale) -> Iterator[Row]:
    n = 4 * scale.nbytes // _SLOT_NBYTES
    loops, writes = [], []
    with open_store(_SLOT_NBYTES, n, path / "process", disk_blocks=n, io="process") as store:
        blocks = random_blocks(store.layout, n)
        for _ in range(scale.rounds + 1):
            alone = _loop(threading.Event(), _LOOP_S)
            store.put(random_keys(n), blocks)
            start = time.perf_counter()
            store.flush(120)
            quiet_s = time.perf_counter() - start
            store.put(random_keys(n), blocks)
            done = threading.Event()
            flusher = threading.Thread(target=lambda done=done: (store.flush(120), done.set()))
            start = time.perf_counter()
            flusher.start()
            beside = _loop(done, 120.0)
            flusher.join(120)
            writes.append((blocks.nbytes / (time.perf_counter() - start) / 1e9, blocks.nbytes / quiet_s / 1e9))
            loops.append((beside / 1e6, alone / 1e6))
    yield _row("a Python loop beside write-behind", loops[1:], "M turns/s", 0.9, "the same loop alone")
    yield _row("write-behind beside a Python loop", writes[1:], "GB/s", 0.7, "write-behind alone")


def _loop(stop: threading.Event, seconds: float) -> float:
    """Turns a second of a loop in pure Python."""
    turns, start = 0, time.perf_counter()
    while not stop.is_set() and time.perf_counter() - start < seconds:
        for _ in range(1000):
            turns += 1
    return turns / (time.perf_counter() - start)


def _row(name: str, pairs: list[tuple[float, float]], unit: str, floor: float, raw_is: str) -> Row:
    ratios = [ours / raw for ours, raw in pairs]
    return Row(
        name=name, slot_nbytes=_SLOT_NBYTES, rate=statistics.median(p[0] for p in pairs),
        raw_rate=statistics.median(p[1] for p in pairs), unit=unit, ratio=statistics.median(ratios),
        spread=(min(ratios), max(ratios)), floor=floor, raw_is=raw_is,
    )  # fmt: skip
