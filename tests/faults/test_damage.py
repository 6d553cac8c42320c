"""Damaged, truncated and deleted files: misses, never wrong bytes, and the next put heals."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.stores import LAYOUT, Stores, make_blocks, make_keys
from tests.waiting import wait_until

NUM_PREFIXES, PREFIX_BLOCKS = 6, 24


@pytest.fixture(params=[1, 4], ids=lambda n: f"chunks-of-{n}")
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    return Stores(tmp_path, request.param, "thread")


def fill(stores: Stores, tiers: str = "disk", attempts: int = 1) -> None:
    """Put everything, again where not all of it was stored."""
    for _ in range(attempts):
        with stores.open(tiers, host_blocks=400) as store:
            for prefix in range(NUM_PREFIXES):
                assert store.put(make_keys(PREFIX_BLOCKS, prefix), make_blocks(PREFIX_BLOCKS, prefix)) == PREFIX_BLOCKS
            if store.flush():
                return
            wait_until(lambda: store.flush(1))  # the index is rebuilt meanwhile
    pytest.fail(f"not everything was stored in {attempts} attempts")


def load_all(stores: Stores, tiers: str = "disk") -> int:
    """Leading blocks that could be loaded, every one of them checked."""
    with stores.open(tiers, host_blocks=400) as store:
        total = 0
        for prefix in range(NUM_PREFIXES):
            blocks = make_blocks(PREFIX_BLOCKS, prefix)
            out = torch.zeros((PREFIX_BLOCKS, *LAYOUT.block_shape), dtype=LAYOUT.dtype)
            n = store.get(make_keys(PREFIX_BLOCKS, prefix), out)
            assert torch.equal(out[:n].view(torch.int16), blocks[:n].view(torch.int16))
            total += n
        return total


def check_heals(stores: Stores, tiers: str = "disk") -> None:
    load_all(stores, tiers)  # what is damaged is met, and dropped
    fill(stores, tiers)
    assert load_all(stores, tiers) == NUM_PREFIXES * PREFIX_BLOCKS


def flip(path: Path, offset: int) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 0x40]))
        f.flush()
        os.fsync(f.fileno())


def test_flipped_bytes(stores: Stores) -> None:
    fill(stores)
    data, rng = stores.path / "disk" / "data", np.random.default_rng(3)
    num_slots = NUM_PREFIXES * PREFIX_BLOCKS // stores.blocks_per_chunk
    slot_nbytes = 4096  # for both
    for slot in rng.permutation(num_slots)[:3].tolist():
        flip(data, slot * slot_nbytes + int(rng.integers(slot_nbytes)))
    loaded = load_all(stores)
    assert NUM_PREFIXES * PREFIX_BLOCKS * 0.4 <= loaded < NUM_PREFIXES * PREFIX_BLOCKS
    check_heals(stores)


def truncate_data(disk: Path) -> None:
    os.truncate(disk / "data", NUM_PREFIXES * PREFIX_BLOCKS // 8 * 4096 + 100)  # half of the larger chunks


def delete_data(disk: Path) -> None:
    (disk / "data").unlink()


def delete_index(disk: Path) -> None:
    shutil.rmtree(disk / "index")


def garbage_index(disk: Path) -> None:
    (disk / "index" / "data.mdb").write_bytes(os.urandom(100_000))


def truncate_index(disk: Path) -> None:
    os.truncate(disk / "index" / "data.mdb", 3 * 4096)  # read by the map, this is SIGBUS


def empty_index(disk: Path) -> None:
    (disk / "index" / "data.mdb").write_bytes(b"")


def delete_header(disk: Path) -> None:
    (disk / "store.json").unlink()


def garbage_header(disk: Path) -> None:
    (disk / "store.json").write_bytes(b'{"format": [[[')


@pytest.mark.parametrize(
    ("damage", "all_survive"),
    [
        (truncate_data, False),
        (delete_data, False),
        (delete_index, True),
        (garbage_index, True),
        (truncate_index, True),
        (empty_index, True),
        (delete_header, True),
        (garbage_header, True),
    ],
)
def test_damaged_files(stores: Stores, damage: Callable[[Path], None], all_survive: bool) -> None:
    fill(stores)
    damage(stores.path / "disk")
    loaded = load_all(stores)
    assert loaded == NUM_PREFIXES * PREFIX_BLOCKS if all_survive else loaded < NUM_PREFIXES * PREFIX_BLOCKS
    check_heals(stores)


def test_an_index_damaged_at_random_places(tmp_path: Path) -> None:
    """Some of these kill their reader with SIGBUS; a child meets it first. What only a commit
    meets costs that commit: the index is rebuilt behind it."""
    stores = Stores(tmp_path, 1, "thread")
    fill(stores)
    rng, index = np.random.default_rng(5), tmp_path / "disk" / "index" / "data.mdb"
    for _ in range(25):
        with open(index, "r+b") as f:
            size = os.fstat(f.fileno()).st_size
            for _ in range(int(rng.integers(1, 12))):
                f.seek(int(rng.integers(size)))
                f.write(rng.bytes(int(rng.integers(1, 64))))
        load_all(stores)  # right bytes, however few
        fill(stores, attempts=2)


def test_damaged_shared_files(stores: Stores) -> None:
    fill(stores, "shared")
    files = sorted((stores.path / "shared").rglob("*.safetensors"))
    flip(files[0], 5000)
    os.truncate(files[5], 4096)
    files[9].unlink()
    a, b = files[12].read_bytes(), files[20].read_bytes()
    files[12].write_bytes(b)
    files[20].write_bytes(a)
    assert load_all(stores, "shared") < NUM_PREFIXES * PREFIX_BLOCKS
    check_heals(stores, "shared")


def test_purged_and_reset_data_stays_away_from_a_rebuilt_index(stores: Stores) -> None:
    fill(stores)
    with stores.open("disk") as store:
        purged = make_keys(PREFIX_BLOCKS, 2)
        assert store.purge(purged) == PREFIX_BLOCKS // stores.blocks_per_chunk
    delete_index(stores.path / "disk")
    assert load_all(stores) == (NUM_PREFIXES - 1) * PREFIX_BLOCKS
    with stores.open("disk") as store:
        assert store.prefix_hit(purged) == 0
        store.reset()
    delete_index(stores.path / "disk")
    assert load_all(stores) == 0
    check_heals(stores)
