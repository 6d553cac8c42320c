"""What gc removes, what it leaves alone, and that its memory is bounded."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers import shared_gc
from kvstore.tiers.shared_gc import AgeHistogram, collect_garbage
from kvstore.tiers.shared_gc_thread import GcThread

NOW = 1_800_000_000.0
SIZE = 8192


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "shared"
    path.mkdir()
    return path


def folder(root: Path, number: int, namespace: str = "a" * 32) -> Path:
    path = root / namespace / ("b" * 16) / f"{number % 256:02x}"
    path.mkdir(parents=True, exist_ok=True)
    return path


def chunk(root: Path, number: int, age_s: float, names: int = 1, namespace: str = "a" * 32) -> Path:
    """A file of `SIZE` bytes with so many names."""
    path = folder(root, number, namespace) / f"{number:064x}.0.safetensors"
    path.write_bytes(bytes(SIZE))
    for i in range(1, names):
        other = number + 1000 * i
        os.link(path, folder(root, other, namespace) / f"{other:064x}.0.safetensors")
    os.utime(path, (NOW - age_s, NOW - age_s))
    return path


def collect(root: Path, capacity: int, max_age_s: float | None = None) -> shared_gc.GcReport:
    return collect_garbage(str(root), capacity_nbytes=capacity, max_age_s=max_age_s, now=NOW)


def test_under_capacity_nothing_goes(root: Path) -> None:
    paths = [chunk(root, i, age_s=i) for i in range(10)]
    report = collect(root, 10 * SIZE)
    assert (report.nbytes, report.names, report.removed_names) == (10 * SIZE, 10, 0)
    assert all(p.exists() for p in paths)


@pytest.mark.parametrize("names", [1, 4])
def test_the_oldest_go_down_to_capacity(root: Path, names: int) -> None:
    paths = [chunk(root, i, age_s=(i * 7) % 20, names=names) for i in range(20)]
    report = collect(root, 12 * SIZE)
    assert (report.nbytes, report.names) == (12 * SIZE, 12 * names)
    assert (report.removed_nbytes, report.removed_names) == (8 * SIZE, 8 * names)
    assert [(i * 7) % 20 < 12 for i in range(20)] == [p.exists() for p in paths]
    assert len(list(root.rglob("*.safetensors"))) == 12 * names


@pytest.mark.parametrize("names", [1, 4])
def test_of_one_age_as_many_go_as_must(root: Path, names: int) -> None:
    for i in range(20):
        chunk(root, i, age_s=5, names=names)
    assert collect(root, 12 * SIZE).nbytes == 12 * SIZE
    assert len(list(root.rglob("*.safetensors"))) == 12 * names, "whole chunks"


def test_too_old_goes_whatever_the_size(root: Path) -> None:
    old, young = chunk(root, 1, age_s=101, names=2), chunk(root, 2, age_s=99, names=2)
    report = collect(root, 10 * SIZE, max_age_s=100)
    assert (report.nbytes, report.removed_names, report.removed_nbytes) == (SIZE, 2, SIZE)
    assert (old.exists(), young.exists()) == (False, True)


def test_all_namespaces_have_one_bound(root: Path) -> None:
    old = chunk(root, 1, age_s=10, namespace="1" * 32)
    new = chunk(root, 1, age_s=5, namespace="2" * 32)
    collect(root, SIZE)
    assert (old.exists(), new.exists()) == (False, True)


def test_stale_temporary_files_go(root: Path) -> None:
    stale, fresh = folder(root, 1) / f".{'1' * 16}.tmp", folder(root, 2) / f".{'2' * 16}.tmp"
    for path, age_s in ((stale, 7200), (fresh, 10)):
        path.write_bytes(bytes(100))
        os.utime(path, (NOW - age_s, NOW - age_s))
    report = collect(root, 10 * SIZE)
    assert (report.removed_temporary, report.nbytes) == (1, 100)
    assert (stale.exists(), fresh.exists()) == (False, True)


def test_empty_namespaces_go_once_nobody_writes_to_them(root: Path) -> None:
    path = chunk(root, 1, age_s=10)
    namespace = root / ("a" * 32)
    (namespace / "namespace.json").touch()
    (namespace / ("b" * 16) / "placement.json").touch()
    for now, is_there in ((time.time(), True), (time.time() + 7200, True)):
        collect_garbage(str(root), capacity_nbytes=SIZE, max_age_s=None, now=now)
        assert path.exists() is is_there
    path.unlink()
    collect_garbage(str(root), capacity_nbytes=SIZE, max_age_s=None, now=time.time())
    assert namespace.exists(), "a writer may have just made it"
    report = collect_garbage(str(root), capacity_nbytes=SIZE, max_age_s=None, now=time.time() + 7200)
    assert report.removed_namespaces == 1
    assert list(root.iterdir()) == []


def test_what_is_not_ours_is_left_alone(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(chunk(root, 1, age_s=10).parent, outside / "01")
    inside = root / ("a" * 32) / ("b" * 16)
    (inside / "02").symlink_to(outside / "01")
    (root / ("c" * 32)).symlink_to(root / ("a" * 32))
    others = [root / "README", root / "backup" / "x.safetensors", inside / "01" / "notes.txt", inside / "zz" / "f"]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.utime(path, (0, 0))
    report = collect_garbage(str(root), capacity_nbytes=1, max_age_s=1.0, now=NOW + 1e6)
    assert report.removed_names == 1
    assert all(p.exists() for p in others)
    assert len(list((outside / "01").iterdir())) == 1


def test_a_root_that_is_gone_is_an_error(root: Path) -> None:
    with pytest.raises(FileNotFoundError):
        collect(root / "gone", SIZE)


def test_stopping_early_says_so(root: Path) -> None:
    for i in range(5):
        chunk(root, i, age_s=i)
    report = collect_garbage(str(root), capacity_nbytes=1, max_age_s=None, now=NOW, stop=lambda: True)
    assert report.stopped
    assert report.removed_names == 0


@given(ages=st.lists(st.integers(0, 10**16), min_size=1, max_size=200), nbytes=st.integers(1, 100))
def test_histogram_finds_where_the_oldest_end(ages: list[int], nbytes: int) -> None:
    histogram = AgeHistogram()
    for mtime_ns in ages:
        histogram.add(mtime_ns, 1)
    nbytes = min(nbytes, len(ages))
    last, of_last = histogram.oldest(nbytes)
    before = sum(histogram.bucket(a) < last for a in ages)
    assert before + of_last == nbytes
    assert of_last <= sum(histogram.bucket(a) == last for a in ages)


def test_histogram_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_gc, "_MAX_BUCKETS", 64)
    histogram = AgeHistogram()
    for i in range(5000):
        histogram.add(i * 10**9, 1.0)
    assert len(histogram._nbytes) <= 64
    last, of_last = histogram.oldest(2500)
    assert sum(histogram.bucket(i * 10**9) < last for i in range(5000)) + of_last == 2500


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_thread_runs_at_once_when_woken_and_after_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def run(stop: Callable[[], bool]) -> None:
        calls.append(len(calls))
        if len(calls) == 2:
            raise RuntimeError("a bug")

    thread = GcThread(run, interval_s=3600.0)
    for n in (1, 2, 3):
        until(lambda n=n: len(calls) == n and thread.runs + thread.failures == n)  # type: ignore[misc]
        assert (thread.last_error is not None) == (n == 2)
        thread.wake()
    assert thread.failures == 1
    assert thread.alive
    assert len(caplog.records) == 1
    assert thread.close(60)
    assert not thread.alive
