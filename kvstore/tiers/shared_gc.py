"""Bounds a shared path by size and age, from any host that mounts it.

What counts is a file's mtime: its last use, to the hour. A first walk removes what is too
old and adds up what is left; only where that is too much, a second walk removes the oldest.
Between them stands a histogram and no list of names, so memory stays bounded whatever the
path holds. Nothing is locked: hosts that collect at once, or beside writers and readers,
at worst remove a little more than one of them would have, which is later misses.

Only names of our own making are touched, and no symlink is followed.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from kvstore.tiers.shared_tree import (
    CHUNK_NAME,
    FAN_OUT_NAME,
    NAMESPACE_JSON,
    NAMESPACE_NAME,
    PLACEMENT_JSON,
    PLACEMENT_NAME,
    TEMPORARY_NAME,
)

STALE_S: Final = 3600.0  # temporary files and empty folders older than this have no writer any more
_MAX_BUCKETS: Final = 1 << 16
_FINEST_NS: Final = 1024


@dataclass(slots=True)
class GcReport:
    """What one run found and removed. A chunk of several blocks has a name for each."""

    nbytes: int = 0  # left
    names: int = 0  # left
    removed_names: int = 0
    removed_nbytes: int = 0
    removed_temporary: int = 0
    removed_namespaces: int = 0
    errors: int = 0  # folders or files that could not be looked at or removed
    stopped: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    folder_fd: int
    namespace: str
    name: str
    status: os.stat_result

    @property
    def nbytes(self) -> float:
        """This name's share of its file: names of one inode add up to its size."""
        return self.status.st_size / max(1, self.status.st_nlink)

    @property
    def freed_nbytes(self) -> int:
        """What removing this name frees: a file goes with its last name."""
        return self.status.st_size if self.status.st_nlink == 1 else 0


class AgeHistogram:
    """Bytes by mtime, in buckets that widen so that there are never more than `_MAX_BUCKETS`."""

    def __init__(self) -> None:
        self._width_ns = _FINEST_NS
        self._nbytes: dict[int, float] = {}

    def bucket(self, mtime_ns: int) -> int:
        return mtime_ns // self._width_ns

    def add(self, mtime_ns: int, nbytes: float) -> None:
        bucket = self.bucket(mtime_ns)
        self._nbytes[bucket] = self._nbytes.get(bucket, 0.0) + nbytes
        while len(self._nbytes) > _MAX_BUCKETS:
            self._widen()

    def oldest(self, nbytes: float) -> tuple[int, float]:
        """Where the oldest ``nbytes`` end: a bucket, and how much of it is among them."""
        last = 0
        for bucket in sorted(self._nbytes):
            last = bucket
            if nbytes <= self._nbytes[bucket]:
                break
            nbytes -= self._nbytes[bucket]
        return last, nbytes

    def _widen(self) -> None:
        self._width_ns *= 2
        wide: dict[int, float] = {}
        for bucket, nbytes in self._nbytes.items():
            wide[bucket >> 1] = wide.get(bucket >> 1, 0.0) + nbytes
        self._nbytes = wide


def collect_garbage(
    path: str,
    *,
    capacity_nbytes: int,
    max_age_s: float | None,
    now: float,
    target_nbytes: int | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_removed: Callable[[str, str], None] = lambda namespace, name: None,
) -> GcReport:
    """Remove what is too old; then, over capacity, the oldest down to ``target_nbytes``.

    Args:
        now: in `time.time` seconds; what is older than this less ``max_age_s`` goes.
        target_nbytes: default: the capacity.
        stop: asked once a folder; True ends the run early.
        on_removed: told of each chunk's name that has gone, and its namespace, in hex.
    Raises:
        OSError: the path itself can't be read. What lies below it is counted in ``errors``.
    """
    run = _Run(GcReport(), now, stop, on_removed)
    ages = run.measure(path, float("-inf") if max_age_s is None else now - max_age_s)
    target = capacity_nbytes if target_nbytes is None else target_nbytes
    if run.report.nbytes > capacity_nbytes and not run.report.stopped:
        run.remove_oldest(path, ages, run.report.nbytes - target)
    if not run.report.stopped:
        run.remove_empty(path)
    return run.report


class _Run:
    def __init__(
        self, report: GcReport, now: float, stop: Callable[[], bool], on_removed: Callable[[str, str], None]
    ) -> None:
        self.report, self._now, self._stop, self._on_removed = report, now, stop, on_removed

    def measure(self, path: str, oldest: float) -> AgeHistogram:
        """Add up everything; what was last used before ``oldest`` is removed on the way."""
        ages, report, total = AgeHistogram(), self.report, 0.0
        for entry in self._entries(path):
            is_chunk = CHUNK_NAME.fullmatch(entry.name) is not None
            mtime = entry.status.st_mtime
            if not is_chunk and mtime < self._now - STALE_S:
                report.removed_temporary += self._unlink(entry)
            elif is_chunk and mtime < oldest:
                self._remove(entry)
            else:
                total += entry.nbytes
                if is_chunk:
                    report.names += 1
                    ages.add(entry.status.st_mtime_ns, entry.nbytes)
        report.nbytes = round(total)
        return ages

    def remove_oldest(self, path: str, ages: AgeHistogram, nbytes: float) -> None:
        last, of_last = ages.oldest(nbytes)
        left, doomed = self.report.nbytes, set[int]()  # files of the last bucket, by st_ino
        for entry in self._entries(path):
            status, bucket = entry.status, ages.bucket(entry.status.st_mtime_ns)
            if bucket > last or not CHUNK_NAME.fullmatch(entry.name):
                continue
            if bucket == last and status.st_ino not in doomed:
                if of_last <= 0:
                    continue
                doomed.add(status.st_ino)
                of_last -= status.st_size
            if self._remove(entry):
                left -= entry.freed_nbytes
                self.report.names -= 1
        self.report.nbytes = max(0, left)

    def remove_empty(self, path: str) -> None:
        """Remove folders without chunks that nobody has written to for long."""
        with _opened(path) as root:
            for namespace in _subfolders(root, NAMESPACE_NAME):
                with self._entered(namespace, root) as top:
                    if top is None or not self._is_stale(top):
                        continue
                    for placement in _subfolders(top, PLACEMENT_NAME):
                        self._remove_empty_placement(placement, top)
                    empty = set(os.listdir(top)) <= {NAMESPACE_JSON}
                    removed = empty and self._remove_described(namespace, root, top, NAMESPACE_JSON)
                    self.report.removed_namespaces += removed

    def _remove_empty_placement(self, name: str, parent: int) -> None:
        with self._entered(name, parent) as placed:
            if placed is None or not self._is_stale(placed):
                return
            for fan_out in _subfolders(placed, FAN_OUT_NAME):
                with self._entered(fan_out, placed) as folder:
                    stale = folder is not None and self._is_stale(folder)
                if stale:
                    with contextlib.suppress(OSError):  # not empty, or another host was first
                        os.rmdir(fan_out, dir_fd=placed)
            if set(os.listdir(placed)) <= {PLACEMENT_JSON}:
                self._remove_described(name, parent, placed, PLACEMENT_JSON)

    def _remove_described(self, name: str, parent: int, folder: int, description: str) -> bool:
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(description, dir_fd=folder)
            os.rmdir(name, dir_fd=parent)
        except OSError:  # a writer came back to it, and will describe it again
            return False
        return True

    def _is_stale(self, folder: int) -> bool:
        return os.fstat(folder).st_mtime < self._now - STALE_S

    def _entries(self, path: str) -> Iterator[_Entry]:
        """Chunks and temporary files of every namespace, a folder at a time."""
        for namespace, folder in self._folders(path):
            if self._stop():
                self.report.stopped = True
                return
            with os.scandir(folder) as entries:
                for entry in entries:
                    if not CHUNK_NAME.fullmatch(entry.name) and not TEMPORARY_NAME.fullmatch(entry.name):
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if not stat.S_ISDIR(status.st_mode):
                            yield _Entry(folder, namespace, entry.name, status)

    def _folders(self, path: str) -> Iterator[tuple[str, int]]:
        with _opened(path) as root:
            for namespace in _subfolders(root, NAMESPACE_NAME):
                with self._entered(namespace, root) as top:
                    for placement in _subfolders(top, PLACEMENT_NAME):
                        with self._entered(placement, top) as placed:
                            for fan_out in _subfolders(placed, FAN_OUT_NAME):
                                with self._entered(fan_out, placed) as folder:
                                    if folder is not None:
                                        yield namespace, folder

    @contextlib.contextmanager
    def _entered(self, name: str, parent: int | None) -> Iterator[int | None]:
        """A subfolder's descriptor; None where it is gone, a symlink, or not ours to read."""
        try:
            fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            yield None
            return
        except OSError:
            self.report.errors += 1
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)

    def _remove(self, entry: _Entry) -> bool:
        if not self._unlink(entry):
            return False
        self.report.removed_names += 1
        self.report.removed_nbytes += entry.freed_nbytes
        self._on_removed(entry.namespace, entry.name)
        return True

    def _unlink(self, entry: _Entry) -> bool:
        try:
            os.unlink(entry.name, dir_fd=entry.folder_fd)
        except FileNotFoundError:
            return False
        except OSError:
            self.report.errors += 1
            return False
        return True


_FOLDER_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _subfolders(folder: int | None, pattern: re.Pattern[str]) -> list[str]:
    """At most 256 fan-outs, a few placements, and as many namespaces as there were epochs."""
    if folder is None:
        return []
    with os.scandir(folder) as entries:
        return [e.name for e in entries if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
