"""Full, read-only and vanished storage, for real: no request fails, one log line, and it comes back."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore import DiskTierConfig, TieredStore
from kvstore.errors import ConfigError
from kvstore.tiers import disk_dir
from tests.stores import MIB, Stores, check_get, make_blocks, make_keys


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.tiers.health.FIRST_RETRY_S", 0.05)


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    point = tmp_path / "mount"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "kv", str(point)]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done.stderr.decode().strip()}")
    yield point
    subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)


def open_on(path: Path, **settings: object) -> TieredStore:
    disk = DiskTierConfig(path=str(path / "kv"), capacity_nbytes=64 * MIB)
    return Stores(path, 1, "thread").open("", host_blocks=16, disk=disk, **settings)


def comes_back(store: TieredStore, seed: int) -> None:
    """Put until the disk tier holds it."""
    deadline = time.monotonic() + 30
    while True:
        store.put(make_keys(16, seed), make_blocks(16, seed))
        if store.flush(5) and store.stats().tiers["disk"].state == "on":
            return
        assert time.monotonic() < deadline, store.stats().tiers["disk"]
        seed += 1


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_full_disk_bounds_the_tier(mount: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file system ends before the capacity does: what fits is kept, and older chunks make room."""
    with open_on(mount) as store:
        for seed in range(80):
            assert store.put(make_keys(16, seed), make_blocks(16, seed)) == 16
            store.flush(5)
        check_get(store, make_keys(16, 79), make_blocks(16, 79), 16)
    assert len(warnings(caplog)) <= 3, warnings(caplog)


def test_a_read_only_mount(mount: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_on(mount) as store:
        comes_back(store, 0)
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=False)
        for seed in range(1, 6):
            assert store.put(make_keys(16, seed), make_blocks(16, seed)) == 16
            store.flush(1)
        subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
        comes_back(store, 20)


def test_read_only_from_the_start(mount: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
    with open_on(mount) as store:
        assert store.put(make_keys(8), make_blocks(8)) == 8
        assert store.stats().tiers["disk"].state == "off"
        subprocess.run(["mount", "-o", "remount,rw", str(mount)], check=True)
        comes_back(store, 1)


@pytest.mark.parametrize("how", ["removed", "moved away and put back"])
def test_a_vanished_directory(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    with open_on(tmp_path) as store:
        comes_back(store, 0)
        if how == "removed":
            shutil.rmtree(tmp_path / "kv")
        else:
            os.rename(tmp_path / "kv", tmp_path / "away")
        for seed in range(1, 4):
            assert store.put(make_keys(16, seed), make_blocks(16, seed)) == 16
            store.flush(1)
        if how != "removed":
            shutil.rmtree(tmp_path / "kv", ignore_errors=True)
            os.rename(tmp_path / "away", tmp_path / "kv")
        comes_back(store, 30)
        assert sum("off" in line for line in warnings(caplog)) <= 2, warnings(caplog)
    with open_on(tmp_path) as store:
        assert store.stats().tiers["disk"].used_blocks > 0


def test_an_unmounted_path_is_not_filled(mount: Path) -> None:
    with open_on(mount) as store:
        comes_back(store, 0)
        subprocess.run(["umount", "-l", str(mount)], check=True)
        for seed in range(1, 5):
            assert store.put(make_keys(16, seed), make_blocks(16, seed)) == 16
            store.flush(1)
            time.sleep(0.1)
        assert list(mount.iterdir()) == []  # the directory below the mount point
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=0700", "kv", str(mount)], check=True)
        comes_back(store, 40)


def test_what_must_not_be_a_disk_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv").chmod(0o777)
    with pytest.raises(ConfigError, match="may be written by others .*chmod go-w"):
        open_on(tmp_path)
    (tmp_path / "kv").rmdir()
    (tmp_path / "kv").write_text("a file")
    with pytest.raises(ConfigError, match=r"disk.path: .* cannot be a directory"):
        open_on(tmp_path)
    (tmp_path / "kv").unlink()
    monkeypatch.setattr(disk_dir, "file_system_type", lambda path: "nfs4")
    with pytest.raises(ConfigError, match=r"network file system \(nfs4\)"):
        open_on(tmp_path)


def test_two_pid_namespaces(tmp_path: Path) -> None:
    """Containers that do not share a PID namespace: refused, with what to do."""
    import sys

    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("making a PID namespace is not permitted here")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.faults.test_storage import open_on
open_on(Path({str(tmp_path)!r}))
"""
    with open_on(tmp_path):
        done = subprocess.run([*unshare, sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert "PID namespace" in done.stderr, done.stderr


def test_file_system_types(tmp_path: Path, mount: Path) -> None:
    from kvstore.direct_io import file_system_type, is_network_file_system

    assert file_system_type(mount) == "tmpfs"
    assert file_system_type("/proc") == "proc"
    names: dict[str, Callable[[str], bool]] = {"nfs": bool, "fuse.sshfs": bool, "ext4": lambda v: not v}
    assert all(check(is_network_file_system(name)) for name, check in names.items())
