"""The index: look-ups a second, bytes a key, and how long a full directory takes to open."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from kvstore import BlockKey, KVIdentity
from kvstore.config import DiskTierConfig
from kvstore.keys import KEY_NBYTES, array_to_keys
from kvstore.manager import TierManager
from kvstore.slot import SlotCodec, SlotFormat
from kvstore.tiers.disk_index import Records, empty_records
from kvstore.tiers.disk_volume import DiskVolume, VolumeConfig
from tools.bench.common import Figure, Row, Scale, interleaved, layout_of

_BATCH: Final = 256
_LOOKUPS: Final = 400_000
_SLOT_NBYTES: Final = 4096
_TARGET_LOOKUPS: Final = 1.2
_TARGET_NBYTES: Final = 200.0
_TARGET_KEYS: Final = 1.0
_POLICIES: Final = ("lru", "arc", "s3fifo")


def run(path: Path, scale: Scale) -> Iterator[Row]:
    """What a figure is held against is the target itself."""
    n = scale.num_keys
    keys = np.random.default_rng(0).integers(0, 256, (n, 1, KEY_NBYTES), dtype=np.uint8)
    manager = _manager("lru", keys)
    asked = array_to_keys(keys[np.random.default_rng(1).permutation(n)[:_LOOKUPS]])
    rates = interleaved(scale.rounds, {"ours": lambda: _lookups(manager, asked)})
    yield _row(f"look-ups of {n:,} keys, {_BATCH} at a time", "M/s", [r["ours"] for r in rates], _TARGET_LOOKUPS)
    for policy in _POLICIES:
        yield _row(f"keys in {_TARGET_NBYTES:g} bytes, host tier, {policy}", "", [_density(policy, keys)], 1.0)
        config = _filled(path / policy, keys, policy)
        yield _row(f"keys in {_TARGET_NBYTES:g} bytes, disk tier, {policy}", "", [_open_density(config)], 1.0)
    rates = interleaved(scale.rounds, {"ours": lambda: _open(config)})
    yield _row(f"reopening {n:,} keys", "M keys/s", [r["ours"] for r in rates], _TARGET_KEYS)


def _manager(policy: str, keys: np.ndarray) -> TierManager:
    manager = TierManager(len(keys), 1, policy)
    slots = manager.reserve(len(keys), time.monotonic())
    manager.publish(slots, keys, manager.epoch, pins=0)
    return manager


def _lookups(manager: TierManager, asked: list[BlockKey]) -> float:
    """Million look-ups a second, of keys in random order."""
    batches = [asked[i : i + _BATCH] for i in range(0, len(asked), _BATCH)]
    start = time.perf_counter()
    found = sum(map(manager.prefix_hit, batches))
    seconds = time.perf_counter() - start
    if found != len(asked):
        raise RuntimeError("not every key was there: the figure would mean nothing")
    return found / seconds / 1e6


def _density(policy: str, keys: np.ndarray) -> float:
    """Keys in `_TARGET_NBYTES` of a host tier's control plane, all that Python allocates for it."""
    tracemalloc.start()
    try:
        manager = _manager(policy, keys)
        nbytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    return _TARGET_NBYTES * manager.usage()[0] / nbytes


def _filled(path: Path, keys: np.ndarray, policy: str) -> VolumeConfig:
    """A directory whose index has these keys; its data file is a hole."""
    identity = KVIdentity(model="bench", revision="index", layout=layout_of(_SLOT_NBYTES))
    codec, n = SlotCodec(SlotFormat.of(identity, 1)), len(keys)
    disk = DiskTierConfig(path=str(path), num_blocks=n, eviction_policy=policy)
    config = VolumeConfig(disk, identity, codec, n)
    volume = DiskVolume(config, identity.namespace())
    os.truncate(path / "data", n * _SLOT_NBYTES)
    namespaces = np.full(n, np.void(identity.namespace()))
    records = Records(np.arange(n), np.arange(1, n + 1, dtype=np.uint64), namespaces, keys)
    step = 10_000
    for first in range(0, n, step):
        volume.index.commit(empty_records(1), records.at(np.arange(first, min(first + step, n))))
    volume.close()
    return config


def _open_density(config: VolumeConfig) -> float:
    """As `_density`, of an opened disk directory; LMDB's map is page cache and not counted."""
    tracemalloc.start()
    try:
        volume = DiskVolume(config, config.identity.namespace())
        nbytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    density = _TARGET_NBYTES * volume.table.num_ready / nbytes
    volume.close()
    return density


def _open(config: VolumeConfig) -> float:
    """Million keys a second."""
    start = time.perf_counter()
    volume = DiskVolume(config, config.identity.namespace())
    seconds = time.perf_counter() - start
    if volume.table.num_ready != config.num_slots:
        raise RuntimeError("not every key was there: the figure would mean nothing")
    volume.close()
    return config.num_slots / seconds / 1e6


def _row(name: str, unit: str, rates: list[float], target: float) -> Row:
    figure = Figure(name=name, slot_nbytes=0, floor=1.0, raw_is=f"the target, {target:g}", unit=unit)
    return figure.row([(rate, target) for rate in rates])
