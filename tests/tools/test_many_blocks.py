"""Ten million blocks in an index: `ls` stays quick and small, and `diff` of two such small."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import psutil
import pytest

from kvstore.identity import INITIAL_EPOCH
from kvstore.tiers.disk_index import RecordFormat
from tests.small import IDENTITY, copy_store
from tests.small import NUM_BLOCKS as NUM_STORED
from tools.difference import MOST_LISTED

NUM_BLOCKS = 10_000_000
BATCH = 20_000  # records


def fill(directory: Path, num_blocks: int, *, seed: int = 0, start: int = 0) -> None:
    """Give a directory of two-block chunks an index of so many blocks; half of them of another epoch.

    Args:
        start: the first record that is written; with 1 the blocks that are really stored stay in the index.
    """
    fmt, rng = RecordFormat.of(2), np.random.default_rng(seed)
    path = directory / "index"
    if not start:
        for name in ("data.mdb", "lock.mdb"):
            (path / name).unlink(missing_ok=True)
    namespaces = [IDENTITY.namespace(INITIAL_EPOCH), IDENTITY.namespace(b"x" * 16)]
    now = time.time_ns()
    with lmdb.open(str(path), map_size=8 << 30, max_dbs=2, sync=False, metasync=False) as env:
        slots = env.open_db(b"slots", integerkey=True)
        env.open_db(b"log", integerkey=True)
        for first in range(0, -(-num_blocks // 2 // fmt.group), BATCH):
            n = min(BATCH, -(-num_blocks // 2 // fmt.group) - first)
            entries = np.zeros((n, fmt.group), dtype=fmt.entry)
            entries["generation"] = now - rng.integers(0, 86_400_000_000_000, (n, fmt.group))
            entries["namespace"][:, 0::2] = np.void(namespaces[0])
            entries["namespace"][:, 1::2] = np.void(namespaces[1])
            entries["keys"] = rng.integers(0, 256, entries["keys"].shape, dtype=np.uint8)
            if (first + n) * fmt.group > num_blocks // 2:
                entries.reshape(-1)[num_blocks // 2 - first * fmt.group :]["generation"] = 0
            data, size = entries.tobytes(), fmt.record_nbytes
            with env.begin(write=True) as txn:
                items = [((start + first + i).to_bytes(8, "little"), data[i * size : (i + 1) * size]) for i in range(n)]
                txn.cursor(db=slots).putmulti(items, append=True)


def measured(*arguments: str | Path) -> tuple[dict[str, Any], float, int]:
    """A command's answer, how long it took, and the most memory that it and its child had at a time, in MB."""
    start, most = time.monotonic(), 0
    command = [sys.executable, "-c", "from tools.cli import main; main()", *map(str, arguments), "--json"]
    with (
        tempfile.TemporaryFile() as out,
        subprocess.Popen(command, stdout=out, cwd=Path(__file__).parents[2]) as process,
    ):
        while process.poll() is None:
            with suppress(psutil.Error):
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
                most = max(most, sum(one.memory_full_info().pss for one in tree))  # a fork shares its parent's
            time.sleep(0.005)
        seconds = time.monotonic() - start
        out.seek(0)
        return json.loads(out.read()), seconds, most // 10**6


def test_counts_of_an_index_in_pieces(small_store: Path, tmp_path: Path) -> None:
    directory = copy_store(small_store / "disk", tmp_path / "disk")
    fill(directory, 100_000)
    found, _, _ = measured("ls", directory)
    rows = found["namespaces"]
    assert sum(row["blocks"] for row in rows) == 100_000
    assert {row["namespace"] for row in rows} == {IDENTITY.namespace().hex(), IDENTITY.namespace(b"x" * 16).hex()}
    assert {row["state"] for row in rows} == {"served", "old epoch"}
    assert all(0 <= row["newest_s"] < row["oldest_s"] < 86_500 for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_million(small_store: Path, tmp_path: Path) -> None:
    """Against reading the index file, which is the least that it takes; and within a bound of memory."""
    directory = copy_store(small_store / "disk", tmp_path / "disk")
    fill(directory, NUM_BLOCKS)
    found, seconds, megabytes = measured("ls", directory)
    rows = found["namespaces"]
    assert sum(row["blocks"] for row in rows) == NUM_BLOCKS
    print(f"{NUM_BLOCKS} blocks: {seconds:.1f} s, {megabytes} MB")
    assert megabytes < 500
    assert seconds < 60  # 10 on an idle machine


def two_stores(small_store: Path, tmp_path: Path, num_blocks: int) -> tuple[Path, Path]:
    """Directories that have the small store's blocks in common, and so many more each."""
    a, b = (copy_store(small_store / "disk", tmp_path / name) for name in "ab")
    for seed, directory in enumerate((a, b)):
        fill(directory, num_blocks, seed=seed, start=1)
    return a, b


def check_two_stores(found: dict[str, Any], num_blocks: int) -> None:
    assert (found["common"], found["first"], found["unreadable"]) == (NUM_STORED, None, [])
    assert found["only_a_blocks"] == found["only_b_blocks"] == num_blocks
    assert len(found["only_a"]) == len(found["only_b"]) == MOST_LISTED


def test_two_stores_are_compared_in_little_memory(small_store: Path, tmp_path: Path) -> None:
    """What it has beyond two stores without a block of their own: keys and places, not an object for each block."""
    num_blocks = 300_000
    small = measured("diff", small_store / "disk", small_store / "disk")[2]
    found, _, megabytes = measured("diff", *two_stores(small_store, tmp_path, num_blocks))
    check_two_stores(found, num_blocks)
    assert megabytes - small < 200


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_stores_of_ten_million(small_store: Path, tmp_path: Path) -> None:
    found, seconds, megabytes = measured("diff", *two_stores(small_store, tmp_path, NUM_BLOCKS))
    check_two_stores(found, NUM_BLOCKS)
    print(f"two stores of {NUM_BLOCKS} blocks: {seconds:.1f} s, {megabytes} MB")
    assert megabytes < 700
