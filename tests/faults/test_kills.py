"""SIGKILL at any moment, and processes that share a directory when one is killed or stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.faults.workload import Workers, blocks_of, check_all, check_bound, keys_of, open_store

NUM_KILLS = 100


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.01)


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


def test_a_process_stopped_in_its_index_commit(tmp_path: Path) -> None:
    """Others can't commit meanwhile: they become read-only, serve what they have, and come back."""
    with open_store(tmp_path, stall_s=0.3, put_timeout_s=0.2, host_blocks=24) as store:
        keys = keys_of(0)
        store.put(keys, blocks_of(keys))
        assert store.flush(30)
        script = [sys.executable, "-c", HOLD_THE_WRITERS_MUTEX, str(tmp_path / "disk" / "index")]
        with subprocess.Popen(script) as holder:
            try:
                wait_until(lambda: Path(f"/proc/{holder.pid}/stat").read_text().split(")")[1].split()[0] == "T")
                for prefix in range(1, 8):
                    store.put(keys_of(prefix), blocks_of(keys_of(prefix)))
                wait_until(lambda: store.stats().tiers["disk"].state == "read-only")
                assert store.prefix_hit(keys) == len(keys)
                assert store.flush(0.2) is False
                wait_until(lambda: store.put(keys_of(9), blocks_of(keys_of(9))) == len(keys))
            finally:
                holder.kill()
        wait_until(lambda: store.stats().tiers["disk"].state == "on")
        wait_until(lambda: store.put(keys_of(10), blocks_of(keys_of(10))) == len(keys) and store.flush(5))
        check_all(store)
