"""The index: look-ups a second, bytes a key, and how long a full directory takes to open."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from kvstore import KVIdentity
from kvstore.config import DiskTierConfig
from kvstore.keys import KEY_NBYTES, array_to_keys
from kvstore.slot import SlotCodec, SlotFormat
from kvstore.slot_table import SlotTable
from kvstore.tiers.disk_index import Records, empty_records
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from tools.bench.common import Row, Scale, layout_of

_BATCH: Final = 256
_LOOKUPS: Final = 200_000
_SLOT_NBYTES: Final = 4096
_TARGET_LOOKUPS: Final = 1.2e6
_TARGET_NBYTES: Final = 200.0
_TARGET_OPEN_S: Final = 1.0


def run(path: Path, scale: Scale) -> Iterator[Row]:
    n = scale.num_keys
    keys = np.random.default_rng(0).integers(0, 256, (n, 1, KEY_NBYTES), dtype=np.uint8)
    for policy in ("lru", "arc", "s3fifo"):
        table = SlotTable(n, 1, policy)
        table.publish(np.arange(n), keys)
        if policy == "lru":
            yield _row("look-ups, batches of 256", "M/s", scale.rounds, lambda t=table: _lookups(t, keys), 1.2)  # type: ignore[misc]
        nbytes = table.nbytes / n
        yield _row(f"keys a 200 bytes, {policy}", "", 1, lambda nbytes=nbytes: _TARGET_NBYTES / nbytes, 1.0)  # type: ignore[misc]
    volume = _filled(path / "index", keys)
    yield _row(f"opens a second, {n:,} keys", "/s", scale.rounds, lambda: _open(volume), 1.0 if n >= 1_000_000 else 0.0)


def _lookups(table: SlotTable, keys: np.ndarray) -> float:
    """Million look-ups a second, of keys in random order."""
    n = min(_LOOKUPS, len(keys))
    asked = array_to_keys(keys[np.random.default_rng(1).permutation(len(keys))[:n]])
    start = time.perf_counter()
    for i in range(0, n, _BATCH):
        table.find_prefix(asked[i : i + _BATCH])
    return n / (time.perf_counter() - start) / 1e6


def _filled(path: Path, keys: np.ndarray) -> VolumeConfig:
    """A directory whose index has these keys; its data file is a hole."""
    identity = KVIdentity(model="bench", revision="index", layout=layout_of(_SLOT_NBYTES))
    codec, n = SlotCodec(SlotFormat.of(identity, 1)), len(keys)
    config = VolumeConfig(DiskTierConfig(path=str(path), num_blocks=n), identity, codec, n)
    volume = DiskVolume(config, identity.namespace())
    os.truncate(path / "data", n * _SLOT_NBYTES)
    namespaces = np.full(n, np.void(identity.namespace()))
    records = Records(np.arange(n), np.arange(1, n + 1, dtype=np.uint64), namespaces, keys)
    step = 10_000
    for first in range(0, n, step):
        volume.index.commit(empty_records(1), records.at(np.arange(first, min(first + step, n))))
    volume.close()
    return config


def _open(config: VolumeConfig) -> float:
    start = time.perf_counter()
    volume = DiskVolume(config, config.identity.namespace())
    seconds = time.perf_counter() - start
    if volume.table.num_ready != config.num_slots:
        raise RuntimeError("not every key was there: the figure would mean nothing")
    volume.close()
    return 1 / seconds


def _row(name: str, unit: str, rounds: int, measure: Callable[[], float], floor: float) -> Row:
    rates = [measure() for _ in range(rounds + 1)][1:]
    rate = statistics.median(rates)
    return Row(
        name=name, slot_nbytes=0, rate=rate, raw_rate=1.0, unit=unit, ratio=rate,
        spread=(min(rates), max(rates)), floor=floor, raw_is="the target itself",
    )  # fmt: skip
