"""What was purged, and what a reset has ended, never comes back: not from a rebuilt index either."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore import BlockKey, DiskTierConfig, TieredStore
from kvstore.testing.tier import LONG_S, TierBench
from kvstore.tiers.disk import DiskTier
from tests.stores import LAYOUT, Stores, check_get, make_blocks, make_keys
from tests.waiting import wait_until

NUM_BLOCKS = 64


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.health.FIRST_RETRY_S", 0.05)


def open_store(path: Path, **settings: object) -> TieredStore:
    disk = DiskTierConfig(path=str(path / "disk"), num_blocks=NUM_BLOCKS)
    return Stores(path, 1, "thread").open("", disk=disk, host_blocks=100, **settings)


def delete_index(path: Path) -> None:
    shutil.rmtree(path / "disk" / "index")


def delete_all_but_data(path: Path) -> None:
    for file in (path / "disk").iterdir():
        if file.is_dir():
            shutil.rmtree(file)
        elif file.name != "data":
            file.unlink()


def nothing(path: Path) -> None:
    pass


def present(store: TieredStore, keys: list[BlockKey]) -> int:
    """How many of these keys the store has, wherever they are in their prefix."""
    return sum(store.prefix_hit([key]) for key in keys)


def fill(store: TieredStore, seed: int, n: int) -> list[BlockKey]:
    assert store.put(make_keys(n, seed), make_blocks(n, seed)) == n
    assert store.flush()
    return make_keys(n, seed)


lost = pytest.mark.parametrize("lose", [nothing, delete_index, delete_all_but_data])


@lost
def test_what_is_left_of_purged_and_evicted_chunks(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    with open_store(tmp_path) as store:
        old = fill(store, 0, NUM_BLOCKS)
        new = fill(store, 1, 1)  # evicts several, and overwrites one
    if lose is not nothing:
        lose(tmp_path)
        with open_store(tmp_path) as store:
            assert present(store, old) == NUM_BLOCKS - 1, "or else this tests nothing"
            assert present(store, new) == 1
            fill(store, 2, 1)  # evicts several again
    with open_store(tmp_path) as store:
        evicted = NUM_BLOCKS - present(store, old)
        assert evicted > 1
        store.purge(old)
        assert present(store, old) == 0
    lose(tmp_path)
    with open_store(tmp_path) as store:
        assert present(store, old) == 0
        check_get(store, new, make_blocks(1, 1), 1)
        fill(store, 0, NUM_BLOCKS)
        assert present(store, old) == NUM_BLOCKS  # stored again, it is there again


def test_a_purge_of_what_is_being_read(tmp_path: Path) -> None:
    bench = TierBench(tmp_path / "disk", 1)
    config = DiskTierConfig(path=str(bench.directory), num_blocks=NUM_BLOCKS)

    def open_tier() -> DiskTier:
        return DiskTier(config, bench.identity, bench.rows, bench.codec, bench.namespace)

    keys, tier = bench.chain("a", 8), open_tier()
    bench.put(tier, keys)
    chunks = tier.find_prefix(keys)
    job = tier.read(chunks, bench.read_slots(chunks), time.monotonic() + LONG_S)
    assert tier.purge(keys) == len(keys)
    for _ in job:  # as it was before, or a miss
        pass
    job.abandon(lambda indices: None)
    assert tier.stats().pinned_blocks == 0
    bench.put(tier, bench.chain("b", 1))
    tier.close()
    delete_index(tmp_path)
    tier = open_tier()
    assert [bench.get(tier, [key]) for key in keys] == [0] * len(keys)
    assert bench.get(tier, bench.chain("b", 1)) == 1
    tier.close()
    bench.close()


@lost
def test_a_purge_while_the_directory_is_away(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    """It is carried out before the directory is used again."""
    with open_store(tmp_path) as store:
        keys, kept = fill(store, 0, 12), fill(store, 1, 12)
        os.rename(tmp_path / "disk", tmp_path / "away")
        store.flush(0.1)
        assert store.stats().tiers["disk"].state == "off"
        store.purge(keys)
        assert present(store, keys) == 0
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        os.rename(tmp_path / "away", tmp_path / "disk")
        wait_until(lambda: store.flush(1) and store.stats().tiers["disk"].state == "on")
        assert present(store, keys) == 0
    lose(tmp_path)
    with open_store(tmp_path) as store:
        assert present(store, keys) == 0
        assert present(store, kept) in (0, 12)  # a directory was made where there was none


@lost
def test_a_reset_with_writes_on_their_way(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    for round_ in range(4):
        with open_store(tmp_path) as store:
            keys = make_keys(40, round_)
            assert store.put(keys, make_blocks(40, round_)) == 40
            store.reset()
            assert present(store, keys) == 0
            store.put(make_keys(4, 100 + round_), make_blocks(4, 100 + round_))
            assert store.flush()
            assert present(store, make_keys(4, 100 + round_)) == 4
        lose(tmp_path)
        with open_store(tmp_path) as store:
            assert [present(store, make_keys(40, r)) for r in range(round_ + 1)] == [0] * (round_ + 1)


@lost
def test_a_reset_while_the_directory_is_away(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    with open_store(tmp_path) as store:
        keys = fill(store, 0, 12)
        os.rename(tmp_path / "disk", tmp_path / "away")
        store.flush(0.1)
        store.reset()
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        os.rename(tmp_path / "away", tmp_path / "disk")
        wait_until(lambda: store.flush(1) and store.stats().tiers["disk"].state == "on")
        assert present(store, keys) == 0
    lose(tmp_path)
    with open_store(tmp_path) as store:
        assert present(store, keys) == 0


def test_a_reset_leaves_other_processes_what_they_have(tmp_path: Path) -> None:
    with open_store(tmp_path) as one, open_store(tmp_path) as other:
        keys = fill(one, 0, 12)
        one.reset()
        assert present(one, keys) == 0
        check_get(other, keys, make_blocks(12), 12)
        fill(one, 1, 12)
        assert present(other, make_keys(12, 1)) == 0


def test_a_reset_keeps_reads_in_flight_and_later_writes_right(tmp_path: Path) -> None:
    with open_store(tmp_path, put_timeout_s=5.0) as store:
        for round_ in range(20):
            keys, blocks = make_keys(30, round_), make_blocks(30, round_)
            store.put(keys, blocks)
            store.flush()
            store._planes.forget_host()  # host memory forgets: what follows comes from disk
            out = torch.zeros((30, *LAYOUT.block_shape), dtype=LAYOUT.dtype)
            n = store.get(keys, out)
            assert n == 30 and torch.equal(out[:n].view(torch.int16), blocks.view(torch.int16))
            if round_ % 3 == 2:
                store.reset()
                assert present(store, keys) == 0


def test_kills_after_a_purge(tmp_path: Path) -> None:
    """What `purge` has returned for stays away, whenever the process is killed afterwards."""
    rng = np.random.default_rng(11)
    for round_ in range(8):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                run_purges(tmp_path, writer)
            finally:
                os._exit(1)
        os.close(writer)
        purged = b""
        while len(purged) < 1 + int(rng.integers(6)):
            purged += os.read(reader, 1)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        purged += os.read(reader, 1000)
        os.close(reader)
        if round_ % 2:
            delete_index(tmp_path)
        with open_store(tmp_path) as store:
            for seed in purged:
                assert present(store, make_keys(8, seed)) == 0, seed
        shutil.rmtree(tmp_path / "disk")


def run_purges(path: Path, report: int) -> None:
    torch.set_num_threads(1)
    with open_store(path) as store:
        for seed in range(200):
            keys = fill(store, seed, 8)
            if seed >= 9:  # by now the directory is full, and evicts
                store.purge(make_keys(8, seed - 3))
                os.write(report, bytes([seed - 3]))
            assert len(keys) == 8
