"""The shared tier: the conformance suite, its files, its storage failing, and other processes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from kvstore.config import Fsync, SharedTierConfig
from kvstore.errors import ConfigError
from kvstore.keys import BlockKey
from kvstore.testing.tier import LONG_S, OTHER_NAMESPACE, TierBench, TierTests
from kvstore.tiers.chunk_file import ChunkReader
from kvstore.tiers.shared import SharedTier

MAX_IO_THREADS = 4


def open_tier(
    bench: TierBench, path: Path | None = None, *, capacity: int = 1 << 30, fsync: Fsync = "flush"
) -> SharedTier:
    config = SharedTierConfig(
        path=str(path or bench.directory),
        capacity_nbytes=capacity,
        num_threads=MAX_IO_THREADS,
        fsync=fsync,
        gc_interval_s=3600.0,
    )
    return SharedTier(config, bench.identity, bench.blocks_per_chunk, bench.rows, bench.codec, bench.namespace)


def path_of(bench: TierBench, key: BlockKey, root: Path | None = None) -> Path:
    """Where the file of a key is, as docs/shared-path.md says."""
    placement = bench.identity.placement_digest(bench.blocks_per_chunk).hex()[:16]
    folder = (root or bench.directory) / bench.namespace.hex() / placement / key.block_hash.hex()[:2]
    return folder / f"{key.block_hash.hex()}.{key.group}.safetensors"


def temporaries(root: Path) -> list[Path]:
    return [p for p in root.rglob("*") if p.name.endswith(".tmp")]


def flip_byte(path: Path, offset: int) -> None:
    with open(path, "r+b") as f:
        f.seek(offset)
        byte = f.read(1)
        f.seek(offset)
        f.write(bytes([byte[0] ^ 0x40]))
        f.flush()
        os.fsync(f.fileno())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class TestSharedTier(TierTests):
    def make_tier(self, bench: TierBench) -> SharedTier:
        return open_tier(bench)

    def corrupt(self, bench: TierBench, key: BlockKey, at: float) -> None:
        path = path_of(bench, key)
        flip_byte(path, int(path.stat().st_size * at))

    def truncate(self, bench: TierBench, key: BlockKey) -> None:
        path = path_of(bench, key)
        os.truncate(path, path.stat().st_size // 2)

    def delete(self, bench: TierBench, key: BlockKey) -> None:
        inode = path_of(bench, key).stat().st_ino
        for path in bench.directory.rglob("*.safetensors"):
            if path.stat().st_ino == inode:
                path.unlink()


@pytest.fixture(params=[1, 4], ids=["1-block", "4-blocks"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TierBench]:
    bench = TierBench(tmp_path / "shared", request.param)
    yield bench
    bench.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[TierBench]:
    """One block a chunk."""
    bench = TierBench(tmp_path / "shared", 1)
    yield bench
    bench.close()


@pytest.fixture
def tiers() -> Iterator[Callable[..., SharedTier]]:
    """`open_tier`, closing what it opened."""
    with contextlib.ExitStack() as stack:

        def opened(*args: object, **kwargs: object) -> SharedTier:
            tier = open_tier(*args, **kwargs)  # type: ignore[arg-type]
            stack.callback(tier.close)
            return tier

        yield opened


@pytest.fixture
def tmpfs(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB that the test may fill, remount and unmount."""
    path = tmp_path / "mount"
    path.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", str(path))
    yield path
    while subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False).returncode == 0:
        pass


def mount(*arguments: str) -> None:
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount(8)")
    if done.returncode:
        pytest.skip(f"needs permission to mount a tmpfs: {done.stderr.strip()}")


# -- files


@pytest.mark.parametrize("fsync", ["never", "flush", "always"])
def test_files_are_valid_safetensors(bench: TierBench, tiers: Callable[..., SharedTier], fsync: Fsync) -> None:
    tier = tiers(bench, fsync=fsync)
    keys, n = bench.chain("a", 2), bench.blocks_per_chunk
    assert all(bench.put(tier, keys))
    assert tier.flush(time.monotonic() + LONG_S)
    layout = bench.identity.layout
    for i, key in enumerate(keys):
        path = path_of(bench, key)
        payload = torch.from_numpy(bench.payload(keys[i // n * n + n - 1])).view(layout.dtype)
        expected = payload.view(layout.num_layers, n, *layout.block_shape[1:])
        with safetensors.safe_open(path, "pt") as f:
            assert sorted(f.keys()) == ["kvstore.footer", "layer.000", "layer.001"]
            assert f.metadata()["namespace"] == bench.namespace.hex()
        tensors = safetensors.torch.load_file(path)
        for layer in range(layout.num_layers):
            tensor = tensors[f"layer.{layer:03d}"]
            assert (tensor.dtype, tensor.shape) == (layout.dtype, expected[layer].shape)
            assert torch.equal(tensor.view(torch.uint8), expected[layer].view(torch.uint8))  # random bits: NaNs too
        assert path.stat().st_size % 4096 == 0


def test_headers_are_the_same_and_files_private(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    bench.put(tiers(bench), bench.chain("a", 3))
    paths = list(bench.directory.rglob("*.safetensors"))
    header_nbytes = paths[0].stat().st_size - bench.codec.fmt.slot_nbytes
    assert len({p.read_bytes()[:header_nbytes] for p in paths}) == 1
    for path in [bench.directory, *bench.directory.rglob("*")]:
        assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600)
    assert temporaries(bench.directory) == []


def test_identity_is_written_beside(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    bench.put(tiers(bench), bench.chain("a", 1))
    namespace = bench.directory / bench.namespace.hex()
    assert hashlib.sha256((namespace / "namespace.json").read_bytes()).digest() == bench.identity.digest()
    (placement,) = namespace.glob("*/placement.json")
    assert hashlib.sha256(placement.read_bytes()).hexdigest()[:16] == placement.parent.name


@pytest.mark.parametrize("name", ["namespace.json", "placement.json"])
@pytest.mark.parametrize("text", ["", '{"model": "other"}', None])
def test_the_next_put_heals_a_damaged_description(
    bench: TierBench, tiers: Callable[..., SharedTier], name: str, text: str | None
) -> None:
    bench.put(tiers(bench), bench.chain("a", 1))
    (file,) = bench.directory.rglob(name)
    before = file.read_bytes()
    file.unlink()
    if text is not None:
        file.write_text(text)
    bench.put(tiers(bench), bench.chain("b", 1))
    assert file.read_bytes() == before


def test_a_chunk_is_one_file_with_a_name_a_block(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    keys, n = bench.chain("a", 2), bench.blocks_per_chunk
    bench.put(tiers(bench), keys)
    inodes = [path_of(bench, key).stat().st_ino for key in keys]
    assert len(set(inodes)) == 2
    assert inodes == [inodes[0]] * n + [inodes[n]] * n


def test_without_hard_links_whole_chunks_are_hits(
    tmp_path: Path, tiers: Callable[..., SharedTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", link)
    bench = TierBench(tmp_path / "shared", 4)
    tier, keys = tiers(bench), bench.chain("a", 3)
    assert all(bench.put(tier, keys))
    assert len(list(bench.directory.rglob("*.safetensors"))) == 3
    assert bench.get(tier, keys) == len(keys)
    assert bench.get(tier, keys[:6]) == 4
    assert bench.get(tiers(bench), keys) == len(keys)
    flip_byte(path_of(bench, keys[7]), 5000)
    assert bench.get(tier, keys) == 4
    assert tier.stats().corrupt_chunks == 1
    assert all(bench.put(tier, keys))
    assert bench.get(tier, keys) == len(keys)
    bench.close()


# -- trust


def test_swapped_files_are_misses(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier = tiers(bench)
    n = bench.blocks_per_chunk
    a, b = bench.chain("a", 1), bench.chain("b", 1)
    bench.put(tier, [*a, *b])
    for one, two in zip(a, b, strict=True):
        swap = bench.directory / "swap"
        os.rename(path_of(bench, one), swap)
        os.rename(path_of(bench, two), path_of(bench, one))
        os.rename(swap, path_of(bench, two))
    tier = tiers(bench)
    assert bench.get(tier, a) == bench.get(tier, b) == 0
    assert tier.stats().corrupt_chunks == 2
    assert all(bench.put(tier, [*a, *b]))
    assert bench.get(tier, a) == bench.get(tier, b) == n


def test_symlinked_file_is_refused(small: TierBench, tiers: Callable[..., SharedTier], tmp_path: Path) -> None:
    tier, keys = tiers(small), small.chain("a", 2)
    small.put(tier, keys)
    found = tier.find_prefix(keys)
    path, outside = path_of(small, keys[1]), tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    assert small.collect(tier, keys, found) == 1
    assert small.get(tiers(small), keys) == 1
    assert outside.exists()
    assert all(small.put(tier, keys))
    assert small.get(tier, keys) == 2
    assert not path.is_symlink()


def test_symlinked_folder_is_refused(small: TierBench, tiers: Callable[..., SharedTier], tmp_path: Path) -> None:
    keys = small.chain("a", 1)
    small.put(tiers(small), keys)
    folder, outside = path_of(small, keys[0]).parent, tmp_path / "outside"
    shutil.move(folder, outside)
    folder.symlink_to(outside)
    tier = tiers(small)
    assert small.get(tier, keys) == 0
    assert small.put(tier, keys) == [False]
    assert tier.purge(keys) == 0
    tier.gc(time.time() + 1e6)
    assert len(list(outside.iterdir())) == 1
    assert tier.stats().state == "on", "one folder is not the whole path"


@pytest.mark.parametrize("kind", ["fifo", "directory", "empty", "longer"])
def test_what_is_no_chunk_is_a_miss(small: TierBench, tiers: Callable[..., SharedTier], kind: str) -> None:
    tier, keys = tiers(small), small.chain("a", 2)
    small.put(tier, keys)
    found, path = tier.find_prefix(keys), path_of(small, keys[1])
    if kind == "longer":
        with open(path, "ab") as f:
            f.write(bytes(4096))
    else:
        path.unlink()
        make: dict[str, Callable[[Path], None]] = {"fifo": os.mkfifo, "directory": os.mkdir, "empty": Path.touch}
        make[kind](path)
    assert small.collect(tier, keys, found) == 1
    assert small.get(tier, keys) == 1
    assert small.put(tier, keys) == [True, kind != "directory"]


def test_a_file_of_another_namespace_is_a_miss(small: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, keys = tiers(small), small.chain("a", 1)
    small.put(tier, keys)
    small.put(tier, keys, OTHER_NAMESPACE)
    mine = path_of(small, keys[0])
    theirs = Path(str(mine).replace(small.namespace.hex(), OTHER_NAMESPACE.hex()))
    shutil.copy(theirs, mine)
    assert small.get(tier, keys) == 0
    header_nbytes = mine.stat().st_size - small.codec.fmt.slot_nbytes if mine.exists() else 4096
    small.put(tier, keys)
    good_header = mine.read_bytes()[:header_nbytes]
    with open(mine, "r+b") as f:
        f.write(good_header + theirs.read_bytes()[header_nbytes:])
    assert small.get(tier, keys) == 0, "the right header, another namespace's slot"
    assert tier.stats().corrupt_chunks == 2


def test_corruption_is_logged_once_in_a_while(
    small: TierBench, tiers: Callable[..., SharedTier], caplog: pytest.LogCaptureFixture
) -> None:
    tier, keys = tiers(small), small.chain("a", 8)
    small.put(tier, keys)
    for key in keys:
        flip_byte(path_of(small, key), 5000)
    with caplog.at_level(logging.INFO):
        assert small.get(tier, keys) == 0
    assert tier.stats().corrupt_chunks == 8
    assert tier.stats().misses_by_reason == {"corrupt": 8}
    assert len(caplog.records) == 1


# -- storage that fails


def test_full_file_system_keeps_a_usable_prefix(
    bench: TierBench, tiers: Callable[..., SharedTier], tmpfs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = tiers(bench, tmpfs / "kv")
    stored: dict[str, int] = {}
    for i in range(8):
        mask = bench.put(tier, bench.chain(f"c{i}", 16))
        assert mask == sorted(mask, reverse=True), "a prefix of them"
        stored[f"c{i}"] = sum(mask)
    assert 0 < sum(stored.values()) < 8 * 16
    assert temporaries(tmpfs) == []
    stats = tier.stats()
    assert stats.state == "read-only"
    assert "No space left" in stats.problem
    assert stats.failed_chunks > 0
    assert stats.dropped_blocks > 0
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    for name, num in stored.items():
        assert bench.get(tier, bench.chain(name, 16)) == num * bench.blocks_per_chunk
    for name in list(stored)[:3]:
        tier.purge(bench.chain(name, 16))
    until(lambda: bench.put(tier, bench.chain("new", 2)) == [True, True])
    assert tier.stats().state == "on"


def test_read_only_file_system_serves_and_comes_back(
    bench: TierBench, tiers: Callable[..., SharedTier], tmpfs: Path
) -> None:
    keys = bench.chain("a", 2)
    bench.put(tiers(bench, tmpfs), keys)
    mount("-o", "remount,ro", str(tmpfs))
    tier = tiers(bench, tmpfs)
    assert bench.get(tier, keys) == len(keys)
    assert bench.put(tier, bench.chain("b", 1)) == [False]
    assert tier.stats().state == "read-only"
    assert bench.get(tier, keys) == len(keys)
    mount("-o", "remount,rw", str(tmpfs))
    until(lambda: bench.put(tier, bench.chain("b", 1)) == [True])
    assert tier.stats().state == "on"


def test_read_only_at_start_is_off(small: TierBench, tiers: Callable[..., SharedTier], tmpfs: Path) -> None:
    mount("-o", "remount,ro", str(tmpfs))
    tier = tiers(small, tmpfs / "kv")
    assert tier.stats().state == "off"
    assert small.put(tier, small.chain("a", 1)) == [False]
    mount("-o", "remount,rw", str(tmpfs))
    until(lambda: small.put(tier, small.chain("a", 1)) == [True])
    assert small.get(tier, small.chain("a", 1)) == 1


@pytest.mark.parametrize("inside", ["", "kv"])
def test_lost_mount_is_not_filled_and_comes_back(
    small: TierBench, tiers: Callable[..., SharedTier], tmpfs: Path, tmp_path: Path, inside: str
) -> None:
    point = tmp_path / "point"
    point.mkdir()
    mount("--bind", str(tmpfs), str(point))
    try:
        tier, keys = tiers(small, point / inside), small.chain("a", 2)
        assert all(small.put(tier, keys))
        tier.stats()
        until(lambda: subprocess.run(["umount", str(point)], capture_output=True, check=False).returncode == 0)
        assert small.get(tier, keys) == 0, "vanished files are plain misses"
        assert tier.stats().corrupt_chunks == 0
        for i in range(20):
            assert not any(small.put(tier, small.chain(f"b{i}", 2)))
        assert tier.stats().state == "off"
        assert list(point.iterdir()) == []
        mount("--bind", str(tmpfs), str(point))
        until(lambda: small.get(tier, keys) == 2)
        assert tier.stats().state == "on"
        assert all(small.put(tier, small.chain("c", 2)))
    finally:
        tier.close()
        subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False)


def test_removed_directory_is_made_again_where_it_was(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, keys = tiers(bench), bench.chain("a", 3)
    bench.put(tier, keys)
    found = tier.find_prefix(keys)
    shutil.rmtree(bench.directory)
    assert bench.collect(tier, keys, found) == 0
    assert tier.stats().misses_by_reason == {"gone": len(keys)}
    assert bench.get(tier, keys) == 0
    assert all(bench.put(tier, keys))
    assert bench.get(tier, keys) == len(keys)
    assert tier.stats().corrupt_chunks == tier.stats().failed_chunks == 0


def test_directory_taken_away_and_put_back(bench: TierBench, tiers: Callable[..., SharedTier], tmp_path: Path) -> None:
    tier, keys = tiers(bench), bench.chain("a", 3)
    bench.put(tier, keys)
    away = tmp_path / "away"
    os.rename(bench.directory, away)
    assert bench.get(tier, keys) == 0
    os.rename(away, bench.directory)
    assert bench.get(tier, keys) == len(keys)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_errors_turn_it_off_and_it_comes_back(
    small: TierBench, tiers: Callable[..., SharedTier], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, keys = tiers(small), small.chain("a", 2)
    small.put(tier, keys)

    def fail(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("kvstore.tiers.chunk_file.preadv_full", fail)
        assert small.get(tier, keys) == 0
    stats = tier.stats()
    assert (stats.state, stats.failed_chunks, stats.misses_by_reason) == ("off", 2, {"error": 2})
    assert not any(small.put(tier, keys))
    until(lambda: all(small.put(tier, keys)))
    assert small.get(tier, keys) == 2


def test_wrong_settings_stop_the_start(small: TierBench, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"shared\.path: .*file"):
            open_tier(small, path)


def test_missing_permission_stops_the_start(small: TierBench, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError, match=r"shared\.path"):
            open_tier(small, locked)
    finally:
        os.seteuid(0)


# -- several processes

_WORKER = """
import sys, time
from pathlib import Path
from kvstore.config import SharedTierConfig
from kvstore.testing.tier import TierBench
from kvstore.tiers.shared import SharedTier
verb, path, blocks_per_chunk, capacity = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
bench = TierBench(Path(path), blocks_per_chunk)
config = SharedTierConfig(path=path, capacity_nbytes=1 << 40, gc_interval_s=3600.0)
tier = SharedTier(config, bench.identity, blocks_per_chunk, bench.rows, bench.codec, bench.namespace)
if verb == "get":
    print(bench.get(tier, bench.chain("a", 5)))
elif verb == "put":
    for i in range(1_000_000):
        bench.put(tier, bench.chain(f"w{i}", 8))
        print(i, flush=True)
elif verb == "gc":
    from kvstore.tiers.shared_gc import collect_garbage
    print("ready", flush=True)
    sys.stdin.readline()
    report = collect_garbage(path, capacity_nbytes=capacity, max_age_s=1000.0, now=time.time())
    print(report.nbytes)
tier.close()
"""


def worker(verb: str, bench: TierBench, capacity: int = 0) -> subprocess.Popen[str]:
    arguments = [verb, str(bench.directory), str(bench.blocks_per_chunk), str(capacity)]
    root = Path(sys.modules[SharedTier.__module__].__file__ or "").parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p] or [str(root)])},
    )


def test_another_process_reads_what_this_one_wrote(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    keys = bench.chain("a", 5)
    bench.put(tiers(bench), keys)
    out, _ = worker("get", bench).communicate(timeout=LONG_S)
    assert int(out) == len(keys)


def test_what_another_has_just_stored_is_found(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    one, two, keys = tiers(bench), tiers(bench), bench.chain("a", 2)
    for i in range(5):
        keys = bench.chain(f"c{i}", 2)
        assert bench.get(two, keys) == 0
        bench.put(one, keys)
        assert bench.get(two, keys) == len(keys)


def test_killed_writer_leaves_nothing_partial(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    for round_ in range(3):
        process = worker("put", bench)
        assert process.stdout is not None
        for _ in range(2 + round_):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    tier = tiers(bench)
    header_nbytes = len(tier._format(bench.namespace).header)
    for path in bench.directory.rglob("*.safetensors"):
        assert path.stat().st_size == header_nbytes + bench.codec.fmt.slot_nbytes
    i, num = 0, -1
    while num:
        keys = bench.chain(f"w{i}", 8)
        found = tier.find_prefix(keys).total_keys
        num = bench.get(tier, keys)
        assert num == found
        i += 1
    assert tier.stats().corrupt_chunks == 0
    tier.gc(time.time())
    tier.gc(time.time() + 7200)
    assert temporaries(bench.directory) == []


def test_two_processes_collect_at_once(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, now, n = tiers(bench), time.time(), bench.blocks_per_chunk
    chunks = [bench.chain(f"c{i}", 1) for i in range(60)]
    for i, keys in enumerate(chunks):
        bench.put(tier, keys)
        os.utime(path_of(bench, keys[-1]), (now - 1200 + 10 * i, now - 1200 + 10 * i))  # 0 to 19 are too old
    file_nbytes = path_of(bench, chunks[0][0]).stat().st_size
    processes = [worker("gc", bench, capacity=25 * file_nbytes) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=LONG_S)
        assert process.returncode == 0
    tier = tiers(bench)
    assert [bench.get(tier, keys) for keys in chunks] == [0] * 35 + [n] * 25


def test_readers_go_on_beside_gc(small: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, keys = tiers(small), small.chain("a", 16)
    small.put(tier, keys)
    chunks = tier.find_prefix(keys)
    job = tier.read(chunks, small.read_slots(chunks), time.monotonic() + LONG_S)
    results = iter(job)
    next(results)
    shutil.rmtree(small.directory / small.namespace.hex())
    assert len(list(results)) == 15
    assert tier.stats().corrupt_chunks == tier.stats().failed_chunks == 0


# -- the bound


def test_writes_over_capacity_start_gc(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    bench.put(tiers(bench), bench.chain("first", 1))
    file_nbytes = path_of(bench, bench.chain("first", 1)[0]).stat().st_size
    tier = tiers(bench, capacity=10 * file_nbytes)
    for i in range(6):
        assert all(bench.put(tier, bench.chain(f"c{i}", 8)))
    until(lambda: tier.stats().used_nbytes <= 10 * file_nbytes)
    inodes = {p.stat().st_ino for p in bench.directory.rglob("*.safetensors")}
    assert 0 < len(inodes) <= 10
    assert tier.stats().evicted_blocks > 0
    last = bench.chain("c5", 8)
    assert bench.get(tier, last) == len(last), "the newest are left"


def test_gc_takes_the_tail_of_a_prefix_first(small: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, keys = tiers(small), small.chain("a", 16)
    small.put(tier, keys)
    file_nbytes = path_of(small, keys[0]).stat().st_size
    collector = tiers(small, capacity=5 * file_nbytes)
    collector.gc()
    left = [path_of(small, key).exists() for key in keys]
    assert left == sorted(left, reverse=True)
    assert 0 < sum(left) <= 5


def test_reading_refreshes_a_file_hourly(bench: TierBench, tiers: Callable[..., SharedTier]) -> None:
    tier, keys = tiers(bench), bench.chain("a", 2)
    bench.put(tier, keys)
    old, recent = time.time() - 7200, time.time() - 1800
    os.utime(path_of(bench, keys[0]), (old, old))
    os.utime(path_of(bench, keys[-1]), (recent, recent))
    assert bench.get(tier, keys) == len(keys)
    assert path_of(bench, keys[0]).stat().st_mtime > old + 3600
    assert path_of(bench, keys[-1]).stat().st_mtime == pytest.approx(recent, abs=1)


def test_a_gc_that_fails_is_reported_and_lives_on(
    small: TierBench, tiers: Callable[..., SharedTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a bug")

    tier = tiers(small)
    until(lambda: tier._gc.runs > 0)
    with monkeypatch.context() as patch:
        patch.setattr("kvstore.tiers.shared.collect_garbage", fail)
        tier._gc.wake()
        until(lambda: tier.stats().problem == "gc does not run: a bug")
    tier._gc.wake()
    until(lambda: tier.stats().problem == "")


def test_late_reads_return_their_slots(
    small: TierBench, tiers: Callable[..., SharedTier], monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    read = ChunkReader.read

    def slow(*args: object) -> object:
        assert go.wait(LONG_S)
        return read(*args)  # type: ignore[arg-type]

    tier, keys = tiers(small), small.chain("a", 8)
    small.put(tier, keys)
    chunks = tier.find_prefix(keys)
    monkeypatch.setattr(ChunkReader, "read", slow)
    job = tier.read(chunks, small.read_slots(chunks), time.monotonic() + 0.05)
    assert list(job) == []
    assert tier.stats().late_chunks == 8
    released: list[int] = []
    job.abandon(released.extend)
    assert len(released) < 8, "what is under way stays in limbo"
    go.set()
    until(lambda: sorted(released) == list(range(8)))


def test_no_thread_is_left_behind(small: TierBench) -> None:
    before = set(threading.enumerate())
    tier = open_tier(small)
    small.put(tier, small.chain("a", 4))
    tier.close()
    assert set(threading.enumerate()) - before == set()
