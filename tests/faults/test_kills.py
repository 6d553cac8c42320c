"""SIGKILL at any moment, and processes that share a directory when one is killed or stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.tiers.disk_dir import is_in_use
from tests.faults.workload import Workers, blocks_of, check_all, check_bound, keys_of, open_store
from tests.waiting import wait_until

NUM_KILLS = 100


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def progress(directory: Path, pid: int) -> int:
    path = directory / f"progress-{pid}"
    text = path.read_text() if path.exists() else "-1"
    assert text != "wrong bytes"
    return int(text)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: is_gone(pid))


def test_100_kills_at_random_moments(tmp_path: Path, workers: Workers) -> None:
    """After each one: no wrong byte, the bound holds, and the store goes on taking blocks."""
    rng = np.random.default_rng(7)
    most = 0
    for round_ in range(NUM_KILLS):
        pid = workers.start(tmp_path, round_)
        wait_until(lambda pid=pid: (tmp_path / f"progress-{pid}").exists() or is_gone(pid))  # type: ignore[misc]
        assert progress(tmp_path, pid) >= 0
        time.sleep(rng.random() * 0.1)
        kill(pid)
        if round_ % 4 == 3 or round_ == NUM_KILLS - 1:  # the processes themselves check all they read
            with open_store(tmp_path) as store:
                check_bound(tmp_path, store)
                most = max(most, check_all(store))
                keys = keys_of(round_ % 50)
                assert store.put(keys, blocks_of(keys)) == len(keys)
                assert store.flush(30)
    assert most > 100


def test_four_processes_one_killed_and_one_stopped(tmp_path: Path, workers: Workers) -> None:
    pids = [workers.start(tmp_path, seed) for seed in range(4)]
    try:
        wait_until(lambda: all(progress(tmp_path, pid) >= 3 for pid in pids))
        kill(pids[0])
        os.kill(pids[1], signal.SIGSTOP)
        before = [progress(tmp_path, pid) for pid in pids]
        wait_until(lambda: all(progress(tmp_path, pids[i]) >= before[i] + 10 for i in (2, 3)))
        with open_store(tmp_path) as store:
            check_bound(tmp_path, store)
            check_all(store)
        os.kill(pids[1], signal.SIGCONT)
        wait_until(lambda: all(progress(tmp_path, pids[i]) >= before[i] + 15 for i in (1, 2, 3)))
    finally:
        for pid in pids:
            if not is_gone(pid):
                os.kill(pid, signal.SIGCONT)
                kill(pid)
    with open_store(tmp_path) as store:
        check_bound(tmp_path, store)
        assert check_all(store) > 100


HOLD_THE_WRITERS_MUTEX = """
import lmdb, os, signal, sys
env = lmdb.open(sys.argv[1], max_dbs=2, map_size=1 << 30)
transaction = env.begin(write=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


@contextlib.contextmanager
def stopped_in_its_commit(directory: Path) -> Iterator[None]:
    """A process that holds the index's write mutex, and is stopped; killed at the end."""
    script = [sys.executable, "-c", HOLD_THE_WRITERS_MUTEX, str(directory / "disk" / "index")]
    with subprocess.Popen(script) as holder:
        try:
            wait_until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split(")")[1].split()[0] == "T")
            yield
        finally:
            holder.kill()


def test_a_process_stopped_in_its_index_commit(tmp_path: Path) -> None:
    """Others can't commit meanwhile: they become read-only, serve what they have, and come back."""
    with open_store(tmp_path, stall_s=0.3, put_timeout_s=0.2, host_blocks=24) as store:
        keys = keys_of(0)
        store.put(keys, blocks_of(keys))
        assert store.flush(30)
        with stopped_in_its_commit(tmp_path):
            for prefix in range(1, 8):
                store.put(keys_of(prefix), blocks_of(keys_of(prefix)))
            wait_until(lambda: store.stats().tiers["disk"].state == "read-only")
            assert store.prefix_hit(keys) == len(keys)
            assert store.flush(0.2) is False
            wait_until(lambda: store.put(keys_of(9), blocks_of(keys_of(9))) == len(keys))
        wait_until(lambda: store.stats().tiers["disk"].state == "on")
        wait_until(lambda: store.put(keys_of(10), blocks_of(keys_of(10))) == len(keys) and store.flush(5))
        check_all(store)


def test_nothing_waits_for_ever_for_a_stopped_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush, purge, reset and close end, whoever holds the index; what they could not do is done later."""
    monkeypatch.setattr("kvstore.io_service.CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("kvstore.tiers.disk._DELETE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("kvstore.tiers.disk._CLOSE_TIMEOUT_S", 0.5)
    monkeypatch.setattr("kvstore.tiers.disk_index._CLOSE_TIMEOUT_S", 0.5)
    store = open_store(tmp_path, stall_s=0.3, put_timeout_s=0.2)
    for prefix in range(4):
        store.put(keys_of(prefix), blocks_of(keys_of(prefix)))
    assert store.flush(30)
    with stopped_in_its_commit(tmp_path):
        assert store.purge(keys_of(1)) >= 0
        assert [store.prefix_hit([key]) for key in keys_of(1)] == [0] * len(keys_of(1))
        assert store.prefix_hit(keys_of(2)) == len(keys_of(2))
        store.put(keys_of(5), blocks_of(keys_of(5)))
        assert store.flush(0.2) is False
    wait_until(lambda: store.flush(5))
    shutil.rmtree(tmp_path / "disk" / "index")
    with open_store(tmp_path) as other:  # the purge was made up for before anything else was written
        assert [other.prefix_hit([key]) for key in keys_of(1)] == [0] * len(keys_of(1))
        assert other.prefix_hit(keys_of(2)) == len(keys_of(2))
    store.put(keys_of(6), blocks_of(keys_of(6)))
    store.flush(5)
    with stopped_in_its_commit(tmp_path):
        store.put(keys_of(7), blocks_of(keys_of(7)))
        store.reset()
        assert store.prefix_hit(keys_of(2)) == 0
        store.close()


def test_a_store_opens_beside_a_stopped_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.disk_keeper._FIRST_OPEN_TIMEOUT_S", 0.5)
    monkeypatch.setattr("kvstore.tiers.health.FIRST_RETRY_S", 0.05)
    keys = keys_of(0)
    with open_store(tmp_path) as store:
        store.put(keys, blocks_of(keys))
    with stopped_in_its_commit(tmp_path):
        store = open_store(tmp_path)
        assert store.stats().tiers["disk"].state == "off"
        assert store.prefix_hit(keys) == 0
        assert store.put(keys_of(1), blocks_of(keys_of(1))) == len(keys)
    wait_until(lambda: store.prefix_hit(keys) == len(keys))
    check_all(store)
    store.close()


def test_a_forked_child_holds_nothing_of_its_parents(tmp_path: Path) -> None:
    """A store's parent is killed; the child that it forked lives on, and blocks nobody."""
    reader, writer = os.pipe()
    parent = os.fork()
    if parent == 0:
        torch.set_num_threads(1)
        store = open_store(tmp_path)
        volume = store._planes.io._tiers[0]._keeper.volume  # type: ignore[union-attr]
        volume.writer.reserve(100)  # locked, as during a write
        child = os.fork()
        if child:
            os.write(writer, child.to_bytes(4, "little"))
        signal.pause()
    child = int.from_bytes(os.read(reader, 4), "little")
    try:
        assert is_in_use(tmp_path / "disk")
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        assert not is_gone(child)
        assert not is_in_use(tmp_path / "disk")
        with open_store(tmp_path) as store:
            for prefix in range(20):
                assert store.put(keys_of(prefix), blocks_of(keys_of(prefix))) == len(keys_of(prefix))
            assert store.flush(30)
            check_all(store)
    finally:
        os.kill(child, signal.SIGKILL)
        os.close(reader)
        os.close(writer)
