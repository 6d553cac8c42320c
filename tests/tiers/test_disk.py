"""`DiskTier` runs the conformance suite of tiers; what sets it apart has tests of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore import DiskTierConfig, TieredStore
from kvstore.errors import ConfigError
from kvstore.keys import BlockKey, array_to_keys
from kvstore.testing.tier import TierBench, TierTests
from kvstore.tiers.base import LowerTier
from kvstore.tiers.disk import DiskTier
from tests.faults.workload import CAPACITY_NBYTES, blocks_of, check_all, check_bound, keys_of, open_store
from tests.stores import LAYOUT, MIB, Stores, check_get, make_blocks, make_keys


class TestDiskTier(TierTests):
    def make_tier(self, bench: TierBench) -> LowerTier:
        config = DiskTierConfig(path=str(bench.directory), num_blocks=400 * bench.blocks_per_chunk)
        return DiskTier(config, bench.identity, bench.rows, bench.codec, bench.namespace)

    def corrupt(self, bench: TierBench, key: BlockKey, at: float) -> None:
        offset = self._offset(bench, key) + int(at * bench.codec.fmt.slot_nbytes)
        with open(bench.directory / "data", "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, bench: TierBench, key: BlockKey) -> None:
        os.truncate(bench.directory / "data", self._offset(bench, key) + bench.codec.fmt.slot_nbytes // 2)

    def delete(self, bench: TierBench, key: BlockKey) -> None:
        with open(bench.directory / "data", "r+b") as file:
            file.seek(self._offset(bench, key))
            file.write(bytes(bench.codec.fmt.slot_nbytes))
            file.flush()
            os.fsync(file.fileno())

    def _offset(self, bench: TierBench, key: BlockKey) -> int:
        fmt = bench.codec.fmt
        data = np.fromfile(bench.directory / "data", dtype=np.uint8).reshape(-1, fmt.slot_nbytes)
        trailers = bench.codec.parse(data[:, fmt.body_nbytes :])
        for slot in np.flatnonzero(trailers.valid).tolist():
            if key in array_to_keys(trailers.keys[slot]):
                return slot * fmt.slot_nbytes
        raise KeyError(key)


def test_the_bound_holds_over_many_times_its_size(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for round_ in range(2):
            for prefix in range(70):
                store.put(keys_of(prefix), blocks_of(keys_of(prefix)))
            assert store.flush(60)
            check_bound(tmp_path, store)
            assert store.stats().tiers["disk"].used_nbytes > 0.9 * CAPACITY_NBYTES, round_
        assert check_all(store) > 0
    with open_store(tmp_path) as store:
        check_bound(tmp_path, store)


def open_with(path: Path, **disk: object) -> TieredStore:
    config = DiskTierConfig(path=str(path / "disk"), **disk)  # type: ignore[arg-type]
    return Stores(path, 1, "thread").open("", disk=config, host_blocks=64)


def test_a_tail_is_evicted_before_its_head_also_after_a_restart(tmp_path: Path) -> None:
    keys, blocks = make_keys(20), make_blocks(20)
    with open_with(tmp_path, num_blocks=20) as store:
        store.put(keys, blocks)
        store.flush()
    with open_with(tmp_path, num_blocks=20) as store:
        store.put(make_keys(5, 1), make_blocks(5, 1))
        store.flush()
    with open_with(tmp_path, num_blocks=20) as store:
        check_get(store, keys, blocks, 15)
        check_get(store, make_keys(5, 1), make_blocks(5, 1), 5)


@pytest.mark.parametrize("num_blocks", [40, 12])
def test_another_capacity_is_for_one_process_alone(tmp_path: Path, num_blocks: int) -> None:
    keys, blocks = make_keys(20), make_blocks(20)
    with open_with(tmp_path, num_blocks=20) as store:
        store.put(keys, blocks)
        store.flush()
        with pytest.raises(ConfigError, match="room for 20 chunks, this store asks for"):
            open_with(tmp_path, num_blocks=num_blocks)
    with open_with(tmp_path, num_blocks=num_blocks) as store:
        stats = store.stats().tiers["disk"]
        assert stats.capacity_blocks == num_blocks
        assert stats.used_blocks == min(20, num_blocks)
        store.put(make_keys(num_blocks, 2), make_blocks(num_blocks, 2))
        assert store.flush()
        assert (tmp_path / "disk" / "data").stat().st_size <= num_blocks * 4096


def test_too_small_a_capacity_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"disk.capacity_nbytes: 4096 has no room for one chunk .* give at least"):
        open_with(tmp_path, capacity_nbytes=4096)


def test_what_a_file_lacks_is_no_hit_where_memory_still_holds_it(tmp_path: Path) -> None:
    """Rows are filled again that held the same chunks before."""
    with open_with(tmp_path, capacity_nbytes=MIB) as store:
        store.put(make_keys(20), make_blocks(20))
        assert store.flush()
        store._planes.forget_host()
        os.truncate(tmp_path / "disk" / "data", 0)
        check_get(store, make_keys(20), make_blocks(20), 0)
        assert store.stats().tiers["disk"].hit_blocks == 0


def test_two_stores_of_one_process_share_a_directory(tmp_path: Path) -> None:
    keys, blocks = make_keys(20), make_blocks(20)
    with open_with(tmp_path, capacity_nbytes=MIB) as one, open_with(tmp_path, capacity_nbytes=MIB) as other:
        one.put(keys, blocks)
        assert one.flush()
        check_get(other, keys, blocks, 20)
        other.put(make_keys(20, 1), make_blocks(20, 1))
        assert other.flush()
        check_get(one, make_keys(20, 1), make_blocks(20, 1), 20)
        assert one.purge(keys[:1]) == 1
        other._planes.forget_host()  # what it has in host memory is its own affair
        assert other.prefix_hit(keys) == 0
    assert LAYOUT.block_nbytes < 4096


def test_a_second_process_sees_what_the_first_stores(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.stores import check_get, make_blocks, make_keys
from tests.tiers.test_disk import open_with
with open_with(Path({str(tmp_path)!r}), capacity_nbytes=1 << 20) as store:
    for seed in range(3):
        sys.stdin.readline()
        check_get(store, make_keys(16, seed), make_blocks(16, seed), 16)
        print("right", flush=True)
"""
    with (
        open_with(tmp_path, capacity_nbytes=MIB) as store,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as reader,
    ):
        assert reader.stdin is not None
        assert reader.stdout is not None
        for seed in range(3):
            store.put(make_keys(16, seed), make_blocks(16, seed))
            assert store.flush()
            reader.stdin.write("\n")
            reader.stdin.flush()
            assert reader.stdout.readline() == "right\n"
        reader.communicate(timeout=30)
