"""The I/O process: killed, stopped, fed nonsense; and what a store notices of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvstore import TieredStore
from kvstore.io_messages import MAX_FRAME_NBYTES, Channel, Find, ProtocolError
from tests.stores import Stores, check_get, make_blocks, make_keys
from tests.waiting import wait_until


def test_what_is_purged_while_the_process_is_down_stays_away(tmp_path: Path) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with Stores(tmp_path, 1, "process").open("disk", host_blocks=64) as store:
        store.put(keys, blocks)
        assert store.flush()
        os.kill(process_id(store), signal.SIGSTOP)
        os.kill(process_id(store), signal.SIGKILL)
        store.purge(keys[:12])
        wait_until(lambda: store.prefix_hit(keys[12:]) == 12 and store.flush())
        store._planes.forget_host()  # what is found now is on disk
        wait_until(lambda: store.prefix_hit(keys[12:]) == 12)
        assert [store.prefix_hit([key]) for key in keys[:12]] == [0] * 12


def process_id(store: TieredStore) -> int:
    return store._planes.io._connection._process.pid  # type: ignore[union-attr]


def test_a_killed_process_is_misses_and_is_started_again(tmp_path: Path) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with Stores(tmp_path, 1, "process").open("disk", host_blocks=8) as store:
        store.put(keys, blocks)
        assert store.flush()
        os.kill(process_id(store), signal.SIGKILL)
        out = torch.zeros_like(blocks)
        n = store.get(keys, out)
        assert torch.equal(out[:n], blocks[:n])
        wait_until(lambda: store.prefix_hit(keys) == 24)
        check_get(store, keys, blocks, 24)
        assert store.stats().tiers["disk"].state == "on"


@pytest.mark.parametrize("seed", range(5))
def test_killed_while_it_writes_and_reads(tmp_path: Path, seed: int) -> None:
    with Stores(tmp_path, 1, "process").open("disk shared", host_blocks=16) as store:
        for round_ in range(4):
            keys, blocks = make_keys(48, round_), make_blocks(48, round_)
            store.put(keys, blocks)
            if round_ == seed % 4:
                os.kill(process_id(store), signal.SIGKILL)
            out = torch.zeros_like(blocks)
            n = store.get(keys, out)
            assert torch.equal(out[:n], blocks[:n])
        wait_until(lambda: store.stats().tiers["host"].pinned_blocks == 0)  # no slot leaks
        keys, blocks = make_keys(16, 9), make_blocks(16, 9)
        wait_until(lambda: store.put(keys, blocks) == 16 and store.flush())
        check_get(store, keys, blocks, 16)


def test_a_stopped_process_costs_a_deadline_and_no_more(tmp_path: Path) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with Stores(tmp_path, 1, "process").open("disk", host_blocks=8, load_timeout_s=1.0, put_timeout_s=0.2) as store:
        store.put(keys, blocks)
        wait_until(lambda: store.prefix_hit(keys) == 24 and store.flush())
        os.kill(process_id(store), signal.SIGSTOP)
        try:
            out = torch.zeros_like(blocks)
            n = store.get(keys, out)
            assert n < 24 and torch.equal(out[:n], blocks[:n])
            assert store.put(make_keys(24, 1), make_blocks(24, 1)) <= 8
            assert store.flush(timeout_s=0.2) is False
        finally:
            os.kill(process_id(store), signal.SIGCONT)
        wait_until(lambda: store.stats().tiers["host"].pinned_blocks == 0)
        wait_until(lambda: store.prefix_hit(keys) == 24)
        check_get(store, keys, blocks, 24)


def test_it_ends_with_its_store(tmp_path: Path) -> None:
    """A store killed without closing leaves neither process nor shared memory."""
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.stores import Stores, make_keys, make_blocks
from tests.waiting import wait_until
from tests.waiting import wait_until
store = Stores(Path({str(tmp_path)!r}), 1, "process").open("disk")
store.put(make_keys(8), make_blocks(8))
print(store._planes.io._connection._process.pid, flush=True)
import time; time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        owner.kill()
    wait_until(
        lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split(")")[1][:3]
    )


def test_frames_are_bounded_and_validated() -> None:
    for raw in (
        (MAX_FRAME_NBYTES + 1).to_bytes(4, "little"),
        (3).to_bytes(4, "little") + b"abc",
        (1).to_bytes(4, "little") + b"\xc1",
    ):
        mine, theirs = socket.socketpair()
        with mine, theirs:
            mine.sendall(raw)
            with pytest.raises(ProtocolError):
                Channel(theirs, process_side=True).receive()
    mine, theirs = socket.socketpair()
    with theirs:
        Channel(mine, process_side=False).send(Find(7, b"k"))
        mine.close()
        channel = Channel(theirs, process_side=True)
        assert channel.receive() == Find(7, b"k")
        assert channel.receive() is None
