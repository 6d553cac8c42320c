"""The disk tier's index: what openers tell one another, and that its file never passes its share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from kvstore.errors import ConfigError
from kvstore.identity import NAMESPACE_NBYTES
from kvstore.keys import KEY_NBYTES
from kvstore.tiers import lmdb_env
from kvstore.tiers.disk_index import DiskIndex, Records, decode, empty_records, index_nbytes
from tests.waiting import wait_until

NUM_SLOTS = 300
NOTHING = empty_records(1)

HOLD_A_READER = """
import lmdb, os, signal, sys
env = lmdb.open(sys.argv[1], max_dbs=2, map_size=1 << 30)
reader = env.begin()
print("reading", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def records(slots: list[int] | range, generation: int, per_chunk: int = 1) -> Records:
    """Entries whose keys follow from slot and generation."""
    at = np.array(slots, dtype=np.int64)
    keys = np.zeros((len(at), per_chunk, KEY_NBYTES), dtype=np.uint8)
    keys[:, :, 0], keys[:, :, 1], keys[:, :, 2] = at[:, None] & 255, at[:, None] >> 8, generation & 255
    namespaces = np.full(len(at), np.void(b"n" * NAMESPACE_NBYTES))
    return Records(at, np.full(len(at), generation, dtype=np.uint64), namespaces, keys)


def held(found: Records) -> dict[int, int]:
    return dict(zip(found.slots.tolist(), found.generations.tolist(), strict=True))


def open_index(path: Path, num_slots: int = NUM_SLOTS, per_chunk: int = 1) -> DiskIndex:
    return DiskIndex(path / "index", num_slots, per_chunk)


def size(path: Path) -> int:
    return (path / "index" / "data.mdb").stat().st_blocks * 512


@pytest.mark.parametrize("per_chunk", [1, 4, 100])
def test_what_is_committed_is_read(tmp_path: Path, per_chunk: int) -> None:
    index = open_index(tmp_path, per_chunk=per_chunk)
    nothing = empty_records(per_chunk)
    assert index.is_new()
    stored = records([0, 7, 8, 299], 5, per_chunk)
    index.commit(nothing, stored)
    index.commit(nothing, records([8], 6, per_chunk))
    assert not index.is_new()
    index.close()
    index = open_index(tmp_path, per_chunk=per_chunk)
    found = index.load()
    assert held(found) == {0: 5, 7: 5, 8: 6, 299: 5}
    assert np.array_equal(found.keys[[0, 1, 3]], stored.keys[[0, 1, 3]])
    assert (found.namespaces == stored.namespaces[0]).all()
    assert held(index.get(np.array([299, 3, 0]))) == {299: 5, 0: 5}
    index.clear()
    assert len(index.scan()) == 0
    assert not index.is_new()
    index.close()


def test_deletion_is_by_generation(tmp_path: Path) -> None:
    index = open_index(tmp_path)
    index.commit(NOTHING, records([1, 2], 5))
    index.commit(records([1], 4), NOTHING)  # another one's generation: it was replaced meanwhile
    index.commit(records([2], 5), NOTHING)
    assert held(index.scan()) == {1: 5}
    index.commit(records([1], 5), records([1], 9))  # deleted, then stored
    assert held(index.scan()) == {1: 9}
    index.close()


def test_openers_follow_one_another(tmp_path: Path) -> None:
    one, other = open_index(tmp_path), open_index(tmp_path)
    one.load()
    other.load()
    one.commit(NOTHING, records([3, 4], 1))
    changes = one.changes()
    assert changes is not None and len(changes.slots) == 0  # its own
    changes = other.changes()
    assert changes is not None and held(changes.records) == {3: 1, 4: 1}
    one.commit(records([3], 1), NOTHING)
    one.commit(NOTHING, records([5], 2))
    changes = other.changes()
    assert changes is not None
    assert changes.slots.tolist() == [3, 5] and held(changes.records) == {5: 2}
    one.close()
    assert len(other.scan()) == 2  # they share an environment: closing one leaves the other's
    other.close()
    with pytest.raises(lmdb.Error, match="closed"):
        other.scan()


def test_who_lags_too_far_behind_loads_everything(tmp_path: Path) -> None:
    one, other = open_index(tmp_path), open_index(tmp_path)
    other.load()
    for generation in range(1, 30):
        one.commit(NOTHING, records(range(NUM_SLOTS), generation))
    assert other.changes() is None
    assert set(held(other.load()).values()) == {29}
    one.commit(NOTHING, records([0], 50))
    changes = other.changes()
    assert changes is not None and held(changes.records) == {0: 50}
    one.close()
    other.close()


@pytest.mark.parametrize(("num_slots", "batch"), [(3, 3), (300, 8), (3000, 256), (3000, 3000)])
def test_its_file_stays_within_its_share_for_good(tmp_path: Path, num_slots: int, batch: int) -> None:
    index, rng = open_index(tmp_path, num_slots), np.random.default_rng(1)
    for generation in range(1, 400):
        slots = rng.permutation(num_slots)[:batch].tolist()
        before = index.get(np.array(slots))
        index.commit(before, NOTHING)
        index.commit(NOTHING, records(slots, generation))
    assert len(index.scan()) >= batch
    assert size(tmp_path) <= index_nbytes(num_slots, 1)
    index.close()


def commit_until_full(index: DiskIndex) -> int:
    """Returns the first generation that could not be committed."""
    for generation in range(2, 10_000):
        try:
            index.commit(NOTHING, records(range(NUM_SLOTS), generation))
        except lmdb.MapFullError:
            return generation
    pytest.fail("the index never filled up")


def test_a_stopped_reader_costs_commits_and_not_room(tmp_path: Path) -> None:
    """It keeps old pages from being reused; what is in the index is read meanwhile."""
    index = open_index(tmp_path)
    index.commit(NOTHING, records(range(NUM_SLOTS), 1))
    script = [sys.executable, "-c", HOLD_A_READER, str(tmp_path / "index")]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True) as reader:
        try:
            assert reader.stdout is not None
            reader.stdout.readline()
            wait_until(lambda: Path(f"/proc/{reader.pid}/stat").read_text().split(")")[1].split()[0] == "T")
            generation = commit_until_full(index)
            assert size(tmp_path) <= index_nbytes(NUM_SLOTS, 1)
            assert set(held(index.scan()).values()) == {generation - 1}
        finally:
            os.kill(reader.pid, signal.SIGKILL)
    index.commit(NOTHING, records(range(NUM_SLOTS), generation))  # the killed one's pages came free
    assert set(held(index.scan()).values()) == {generation}
    index.close()


def test_damaged_records_are_left_out() -> None:
    per_record = 31  # of one key each
    entry = 8 + NAMESPACE_NBYTES + KEY_NBYTES
    sound = (1).to_bytes(8, "little") + bytes(entry - 8)
    value = sound + bytes(entry) * (per_record - 1)
    items = [
        ((2).to_bytes(8, "little"), value),
        ((3).to_bytes(8, "little"), value[:-1]),
        (b"short", value),
        ((1 << 63).to_bytes(8, "little"), value),
        ((2).to_bytes(8, "little"), value),
    ]
    assert held(decode(items, 1)) == {62: 1}


def test_a_damaged_log_raises_an_error_of_lmdb(tmp_path: Path) -> None:
    one, other = open_index(tmp_path), open_index(tmp_path)
    other.load()
    env = one._env
    with env.begin(write=True) as txn:
        txn.put((1).to_bytes(8, "little"), b"odd", db=one._log_db)
    with pytest.raises(lmdb.CorruptedError):
        one.commit(NOTHING, records([1], 1))
    one.close()
    other.close()


def test_slots_that_cannot_be_are_left_out(tmp_path: Path) -> None:
    large = open_index(tmp_path, 5000)
    large.commit(NOTHING, records([4000, 3], 1))
    large.close()
    small = open_index(tmp_path, 100)
    assert held(small.load()) == {3: 1}
    small.close()


@pytest.mark.parametrize("content", [b"", b"garbage" * 4000, bytes(40_000)], ids=["empty", "garbage", "zeros"])
def test_check_finds_what_is_no_index(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.mdb").write_bytes(content)
    assert lmdb_env.check(tmp_path)


def test_check_survives_what_kills_a_reader(tmp_path: Path) -> None:
    index = open_index(tmp_path, 3000)
    index.commit(NOTHING, records(range(3000), 1))
    index.close()
    assert lmdb_env.check(tmp_path / "index") is None
    os.truncate(tmp_path / "index" / "data.mdb", 3 * 4096)
    assert lmdb_env.check(tmp_path / "index")


def test_check_beside_a_writer_finds_nothing_wrong(tmp_path: Path) -> None:
    """It joins the readers: pages that it looks at are not reused under it."""
    index = open_index(tmp_path, 3000)
    index.commit(NOTHING, records(range(3000), 1))
    script = [sys.executable, "-c", f"from pathlib import Path\nfrom kvstore.tiers.lmdb_env import check\n"
              f"print([check(Path({str(tmp_path / 'index')!r})) for _ in range(4)])"]  # fmt: skip
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as checker:
        generation = 1
        while checker.poll() is None:
            generation += 1
            index.commit(NOTHING, records(range(3000), generation))
        assert checker.stdout is not None
        assert checker.stdout.read() == f"{[None] * 4}\n"
    index.close()


def test_a_replaced_file_is_noticed(tmp_path: Path) -> None:
    old = open_index(tmp_path)
    old.commit(NOTHING, records([1], 1))
    assert old.is_intact()
    (tmp_path / "index" / "data.mdb").unlink()
    assert not old.is_intact()
    (tmp_path / "index" / "lock.mdb").unlink()
    new = open_index(tmp_path)  # while the old one is still open
    assert new.is_new() and new.is_intact() and not old.is_intact()
    assert held(old.scan()) == {1: 1}
    new.commit(NOTHING, records([2], 2))
    old.close()
    assert held(new.scan()) == {2: 2}
    new.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    index = open_index(tmp_path)
    index.commit(NOTHING, records([1], 1))
    pid = os.fork()
    if pid == 0:
        outcomes = []
        for attempt in (lambda: open_index(tmp_path), index.scan):
            try:
                attempt()
            except (ConfigError, lmdb.Error) as e:
                outcomes.append("fork" in str(e))
        os._exit(0 if outcomes == [True, True] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    index.commit(NOTHING, records([2], 2))
    assert held(index.scan()) == {1: 1, 2: 2}
    index.close()
