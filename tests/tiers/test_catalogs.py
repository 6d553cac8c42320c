"""What `ls`, `inspect` and `verify` read: every damage is named, and no directory can fool or stop them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import DiskTierConfig, TieredStore
from kvstore.slot import FOOTER
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog, Verdict
from kvstore.tiers.disk_catalog import DiskCatalog, is_disk_directory
from kvstore.tiers.shared_catalog import SharedCatalog, is_shared_path
from tests.small import IDENTITY, NUM_BLOCKS, copy_store, small_blocks, small_config, small_keys

SLOT = 4096
NUM_CHUNKS = NUM_BLOCKS // 2


@pytest.fixture
def disk(small_store: Path, tmp_path: Path) -> Path:
    return copy_store(small_store / "disk", tmp_path / "disk")


@pytest.fixture
def shared(small_store: Path, tmp_path: Path) -> Path:
    """Of one model only."""
    path = copy_store(small_store / "shared", tmp_path / "shared")
    (other,) = (p for p in path.iterdir() if p.name != IDENTITY.namespace().hex())
    shutil.rmtree(other)
    return path


def check(catalog: Catalog) -> tuple[int, list[Verdict]]:
    """How many chunks are good, and the verdicts on the bad ones."""
    verdicts = list(catalog.check())
    return sum(not v.reason for v in verdicts), [v for v in verdicts if v.is_bad]


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        f.write(data)


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as f:
        f.seek(offset)
        byte = f.read(1)[0]
        f.seek(offset)
        f.write(bytes([byte ^ 1]))


def files_of(shared: Path) -> list[Path]:
    """One name of each chunk's file."""
    names = {path.stat().st_ino: path for path in sorted(shared.rglob("*.safetensors"))}
    return list(names.values())


# -- disk: damaged data


def test_disk_sound(disk: Path) -> None:
    catalog = DiskCatalog(disk)
    assert is_disk_directory(disk)
    assert check(catalog) == (NUM_CHUNKS, [])
    assert catalog.problems == []
    chunks = list(catalog.chunks())
    assert [key for chunk in chunks for key in chunk.keys] == small_keys()
    now = time.time_ns()
    assert all(now - 3600 * 10**9 < chunk.time_ns <= now for chunk in chunks)


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (0, "payload does not match"),
        (1023, "payload does not match"),
        (1500, "payload does not match"),  # padding
        (SLOT - FOOTER.itemsize - 72, "trailer is damaged"),  # the first key
        (SLOT - FOOTER.itemsize, "trailer is damaged"),  # magic
        (SLOT - 1, "trailer is damaged"),
    ],
)
def test_disk_flipped_byte(disk: Path, offset: int, reason: str) -> None:
    flip(disk / "data", 2 * SLOT + offset)
    good, bad = check(DiskCatalog(disk))
    assert good == NUM_CHUNKS - 1
    assert [v.chunk.name for v in bad] == ["slot 2"]
    assert bad[0].reason.startswith(reason)
    assert bad[0].chunk.keys == small_keys()[4:6]


def test_disk_truncated(disk: Path) -> None:
    os.truncate(disk / "data", 3 * SLOT + 100)
    good, bad = check(DiskCatalog(disk))
    assert good == 3
    assert [v.chunk.slot for v in bad] == [3, 4, 5]
    assert {v.reason for v in bad} == {"lies behind the end of the data file"}


def test_disk_swapped_slots(disk: Path) -> None:
    data = (disk / "data").read_bytes()
    overwrite(disk / "data", 0, data[SLOT : 2 * SLOT] + data[:SLOT])
    good, bad = check(DiskCatalog(disk))
    assert good == NUM_CHUNKS - 2
    assert all(v.reason.startswith("holds other keys") for v in bad)


def test_disk_slot_of_another_namespace_or_generation(disk: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with TieredStore(small_config(disk=other)) as store:
        store.put(small_keys(), small_blocks())
        assert store.flush()
    stale = (other / "data").read_bytes()
    overwrite(disk / "data", SLOT, stale[SLOT : 2 * SLOT])
    _, bad = check(DiskCatalog(disk))
    assert [v.reason for v in bad] == ["holds another generation"]


def test_disk_without_data(disk: Path) -> None:
    (disk / "data").unlink()
    catalog = DiskCatalog(disk)
    good, bad = check(catalog)
    assert (good, len(bad)) == (0, NUM_CHUNKS)
    assert catalog.problems == ["data: No such file or directory"]


# -- disk: damaged index


def no_index(disk: Path) -> None:
    shutil.rmtree(disk / "index")


def garbage_index(disk: Path) -> None:
    overwrite(disk / "index/data.mdb", 0, random.Random(0).randbytes(1 << 14))


def truncated_index(disk: Path) -> None:
    os.truncate(disk / "index/data.mdb", 3 * 4096)


def empty_index(disk: Path) -> None:
    os.truncate(disk / "index/data.mdb", 0)


def fifo_index(disk: Path) -> None:
    (disk / "index/data.mdb").unlink()
    os.mkfifo(disk / "index/data.mdb")


def symlink_index(disk: Path) -> None:
    (disk / "index/data.mdb").rename(disk / "index/else")
    (disk / "index/data.mdb").symlink_to("else")


def index_of_another_program(disk: Path) -> None:
    no_index(disk)
    with lmdb.open(str(disk / "index")) as env, env.begin(write=True) as txn:
        txn.put(b"hello", b"world")


BAD_INDEXES = [
    no_index,
    garbage_index,
    truncated_index,
    empty_index,
    fifo_index,
    symlink_index,
    index_of_another_program,
]


@pytest.mark.parametrize("damage", BAD_INDEXES)
def test_disk_with_a_bad_index_is_read_from_its_trailers(disk: Path, damage: Callable[[Path], None]) -> None:
    damage(disk)
    flip(disk / "data", 0)
    flip(disk / "data", 2 * SLOT - 1)
    catalog = DiskCatalog(disk)
    good, bad = check(catalog)
    assert good == NUM_CHUNKS - 2
    assert [v.chunk.slot for v in bad] == [0, 1]
    assert len(catalog.problems) == 1
    assert catalog.problems[0].startswith("index: ")


def test_disk_index_with_bytes_flipped_anywhere_is_survived(disk: Path) -> None:
    """A damaged LMDB can kill its reader: a child is what dies."""
    sound = (disk / "index/data.mdb").read_bytes()
    pages = [i for i in range(0, len(sound), 4096) if any(sound[i : i + 4096])]
    rng = random.Random(1)
    for _ in range(12):
        overwrite(disk / "index/data.mdb", 0, sound)
        for _ in range(8):
            overwrite(disk / "index/data.mdb", rng.choice(pages) + rng.randrange(256), rng.randbytes(2))
        for verdict in DiskCatalog(disk).check():
            assert verdict.reason or set(verdict.chunk.keys) <= set(small_keys())


def test_disk_index_that_names_impossible_slots(disk: Path) -> None:
    with lmdb.open(str(disk / "index"), max_dbs=2) as env:
        slots = env.open_db(b"slots", integerkey=True)
        with env.begin(write=True, db=slots) as txn:
            ((_, value),) = list(txn.cursor())
            for group in (7, 1 << 39, 1 << 62, (1 << 64) - 1):
                txn.put(group.to_bytes(8, "little"), value)
            txn.put((8).to_bytes(8, "little"), b"short")
    good, bad = check(DiskCatalog(disk))
    assert good == NUM_CHUNKS
    assert len(bad) == 2 * NUM_CHUNKS  # groups that no store can have are left out


# -- disk: damaged description


def change(path: Path, key: str, value: object) -> None:
    raw: dict[str, Any] = json.loads(path.read_text())
    *parents, leaf = key.split(".")
    node = raw
    for parent in parents:
        node = node[parent]
    node[leaf] = value
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "else"),
        ("slot_nbytes", 8192),
        ("slot_nbytes", 0),
        ("slot_nbytes", 1 << 80),
        ("num_slots", "x"),
        ("content", []),
        ("content.dtype", "float3"),
        ("content.format_version", 2),
        ("content.block_size", 1 << 40),
        ("content.head_size", True),
        ("content.nested", {"a": 1}),
        ("placement.num_layers", 1 << 30),
        ("placement.num_layers", -1),
        ("placement.num_kv_heads", None),
        ("placement.blocks_per_chunk", 1 << 20),
        ("placement", {str(i): i for i in range(1000)}),
    ],
)
def test_disk_description_that_cannot_be_is_a_problem(disk: Path, key: str, value: object) -> None:
    change(disk / "store.json", key, value)
    catalog = DiskCatalog(disk)
    assert check(catalog) == (0, [])
    assert list(catalog.chunks()) == []
    assert catalog.formats() == []
    assert len(catalog.problems) == 1
    assert catalog.problems[0].startswith("store.json: ")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "null", '{"format": 1}', "9" * 10_000, "\x00\xff"])
def test_disk_description_that_is_no_json_is_a_problem(disk: Path, text: str) -> None:
    (disk / "store.json").write_text(text)
    assert len(DiskCatalog(disk).problems) == 1


@pytest.mark.parametrize("name", ["store.json", "data", "locks"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "gone"])
def test_disk_file_that_is_no_file_holds_nobody_up(disk: Path, name: str, kind: str) -> None:
    (disk / name).unlink()
    if kind == "fifo":
        os.mkfifo(disk / name)
    elif kind == "folder":
        (disk / name).mkdir()
    elif kind == "loop":
        (disk / name).symlink_to(name)
    catalog = DiskCatalog(disk)
    good, bad = check(catalog)
    assert bool(catalog.problems) == (name != "locks")
    assert (good, len(bad)) == {"store.json": (0, 0), "data": (0, NUM_CHUNKS), "locks": (NUM_CHUNKS, 0)}[name]


# -- disk: beside a running store


def test_disk_chunk_that_is_evicted_meanwhile_is_gone_and_not_bad(disk: Path) -> None:
    catalog = DiskCatalog(disk)
    listed = len(list(catalog.chunks()))
    config = small_config(disk=disk)
    small = DiskTierConfig(path=str(disk), num_blocks=NUM_BLOCKS)
    with TieredStore(dataclasses.replace(config, disk=small)) as store:
        keys = small_keys(dataclasses.replace(IDENTITY, hash_seed="other"))
        assert store.put(keys, small_blocks()) == NUM_BLOCKS
        assert store.flush()
        verdicts = list(catalog.check())
        assert len(verdicts) == listed
        assert [v for v in verdicts if v.is_bad] == []
        assert sum(v.is_gone for v in verdicts) > 0
        flip(disk / "data", 5)
        _, bad = check(DiskCatalog(disk))
        assert [v.chunk.slot for v in bad] == [0]


# -- shared


def test_shared_sound(shared: Path) -> None:
    catalog = SharedCatalog(shared)
    assert is_shared_path(shared)
    assert check(catalog) == (NUM_CHUNKS, [])
    assert catalog.problems == []
    assert {key for chunk in catalog.chunks() for key in chunk.keys} == set(small_keys())


@pytest.mark.parametrize(
    ("offset", "reason"),
    [
        (0, "size or header"),
        (9, "size or header"),
        (4095, "size or header"),
        (4096, "payload does not match"),
        (8191, "trailer is damaged"),
    ],
)
def test_shared_flipped_byte(shared: Path, offset: int, reason: str) -> None:
    file = files_of(shared)[0]
    flip(file, offset)
    good, bad = check(SharedCatalog(shared))
    assert good == NUM_CHUNKS - 1
    assert os.path.samefile(str(bad[0].chunk.place), file)
    assert bad[0].reason.startswith(reason)


@pytest.mark.parametrize("nbytes", [0, 10, 8191, 8193, 1 << 40])
def test_shared_file_of_another_size(shared: Path, nbytes: int) -> None:
    os.truncate(files_of(shared)[0], nbytes)
    good, bad = check(SharedCatalog(shared))
    assert good == NUM_CHUNKS - 1
    assert [v.reason for v in bad] == ["size or header is not that of its namespace's files"]


def test_shared_swapped_files(shared: Path) -> None:
    one, other = files_of(shared)[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)
    good, bad = check(SharedCatalog(shared))
    assert good == NUM_CHUNKS - 2
    assert all(v.reason.startswith("holds other keys") for v in bad)


def test_shared_file_of_another_namespace(small_store: Path, tmp_path: Path) -> None:
    shared = copy_store(small_store / "shared", tmp_path / "shared")
    mine, other = (shared / i.namespace().hex() for i in (IDENTITY, dataclasses.replace(IDENTITY, model="other-model")))
    theirs = files_of(other)[0].read_bytes()
    files_of(mine)[0].write_bytes(theirs)
    _, bad = check(SharedCatalog(shared))
    assert [v.reason for v in bad] == ["size or header is not that of its namespace's files"]


@pytest.mark.parametrize("name", ["namespace.json", "placement.json"])
@pytest.mark.parametrize("text", ["", "{}", "[" * 100_000, '{"num_layers": 1e400}', None])
def test_shared_description_that_is_damaged_is_a_problem(shared: Path, name: str, text: str | None) -> None:
    (file,) = shared.rglob(name)
    file.unlink()
    if text is not None:
        file.write_text(text)
    catalog = SharedCatalog(shared)
    good, bad = check(catalog)
    assert (good, len(bad)) == (0, NUM_CHUNKS)
    assert len(catalog.problems) == 1
    assert catalog.formats() == []


def test_shared_description_of_another_placement_is_a_problem(shared: Path) -> None:
    (file,) = shared.rglob("placement.json")
    change(file, "num_layers", 3)
    catalog = SharedCatalog(shared)
    assert [p.endswith("it is another placement's") for p in catalog.problems] == [True]


def test_shared_names_that_are_not_ours_are_passed_over(shared: Path) -> None:
    placed = next(shared.rglob("placement.json")).parent
    key = str(small_keys()[0])
    (placed / "zz").mkdir()
    (placed / "zz" / f"{key}.safetensors").touch()
    wrong = placed / ("00" if key[:2] != "00" else "01")
    wrong.mkdir(exist_ok=True)
    (wrong / f"{key}.safetensors").touch()  # never looked for in this folder
    (wrong / f"{'0' * 64}.99999999999.safetensors").touch()
    (wrong / "\x1b[31mred").touch()
    (shared / "README").touch()
    (shared / ("f" * 32)).symlink_to(placed)
    catalog = SharedCatalog(shared)
    assert check(catalog) == (NUM_CHUNKS, [])
    assert catalog.problems == []


@pytest.mark.parametrize("kind", ["fifo", "folder", "symlink"])
def test_shared_file_that_is_no_file_is_a_problem(shared: Path, kind: str) -> None:
    name = next(shared.rglob("*.safetensors"))
    name.unlink()
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "folder":
        name.mkdir()
    else:
        name.symlink_to("/etc/passwd")
    catalog = SharedCatalog(shared)
    good, bad = check(catalog)
    assert (good, bad) == (NUM_CHUNKS, [])  # its other name is left
    assert catalog.problems == [f"{name}: not a regular file"]


def test_shared_file_that_is_deleted_meanwhile_is_gone_and_not_bad(shared: Path) -> None:
    catalog = SharedCatalog(shared)
    chunk = next(iter(catalog.chunks()))
    os.unlink(str(chunk.place))
    assert catalog.read(chunk).is_gone


def test_shared_times_are_left_alone(shared: Path) -> None:
    """Reading for people is no use: what is verified is not kept from gc by it."""
    old = time.time() - 86400 * 30
    for file in files_of(shared):
        os.utime(file, (old, old))
    catalog = SharedCatalog(shared)
    assert check(catalog)[0] == NUM_CHUNKS
    assert {round(file.stat().st_mtime) for file in files_of(shared)} == {round(old)}
    assert all(abs(chunk.time_ns / 1e9 - old) < 1 for chunk in catalog.chunks())


# -- descriptions


json_values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})


@given(
    st.dictionaries(st.sampled_from(sorted(IDENTITY.content())), json_values),
    st.dictionaries(st.sampled_from(sorted(IDENTITY.placed(2))), json_values),
)
def test_any_description_is_taken_or_refused(content: dict[str, object], placed: dict[str, object]) -> None:
    try:
        fmt = StoredFormat.of({**IDENTITY.content(), **content}, {**IDENTITY.placed(2), **placed})
    except ValueError as e:
        assert str(e)
    else:
        assert fmt.slot.slot_nbytes <= 4 << 30
        assert isinstance(fmt.layout.dtype, torch.dtype)
        assert len(fmt.initial_namespace) == 16


def test_description_says_what_the_identity_says() -> None:
    fmt = StoredFormat.of(IDENTITY.content(), IDENTITY.placed(2))
    assert fmt.layout == IDENTITY.layout
    assert fmt.initial_namespace == IDENTITY.namespace()
    assert fmt.slot.placement == IDENTITY.placement_digest(2)[:16]
    assert np.prod(fmt.layout.block_shape) * fmt.layout.dtype.itemsize * 2 == fmt.slot.payload_nbytes
