"""A disk tier's directory: who may use it, what it holds, its data file and its locks.

    store.json   identity, placement, slot size and count; what was retired by a reset
    data         slots, growing by fallocated extents
    index/       LMDB (disk_index)
    pid_namespace  of the processes that have it open
    locks        byte ranges locked through the kernel: a process's locks die with it

Knows files and slot numbers, never keys.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvstore.direct_io import file_system_type, is_network_file_system, open_direct
from kvstore.errors import ConfigError, IdentityMismatchError

logger = logging.getLogger(__name__)

EXTENT_NBYTES: Final = 256 << 20
_INDEX_ROOM_NBYTES: Final = 256 << 10
_INDEX_NBYTES_PER_SLOT: Final = 16  # beside what the file system's other free space gives
_FORMAT: Final = "kvstore disk tier"
_STORE_JSON_MAX_NBYTES: Final = 1 << 20
_OPEN_BYTE: Final = 1 << 60  # held while a process opens, rebuilds or clears
_MEMBER_BYTE: Final = (1 << 60) + 1  # held shared by every process that has it open
_OPEN_TIMEOUT_S: Final = 300.0
_FLOCK: Final = struct.Struct("hhqqi4x")


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectoryHeader:
    """What store.json says."""

    content: dict[str, Any]
    placement: dict[str, Any]
    slot_nbytes: int
    num_slots: int
    retired: dict[str, int]  # namespace hex -> entries of lower generation are dead

    def differences(self, other: DirectoryHeader) -> dict[str, tuple[object, object]]:
        """Fields of identity and placement that differ: name -> (self's, other's)."""
        mine = {**self.content, **self.placement, "slot_nbytes": self.slot_nbytes}
        theirs = {**other.content, **other.placement, "slot_nbytes": other.slot_nbytes}
        names = [*mine, *(k for k in theirs if k not in mine)]
        return {k: (mine.get(k), theirs.get(k)) for k in names if mine.get(k) != theirs.get(k)}


def read_header(path: Path) -> DirectoryHeader | None:
    """Parse store.json; None where there is none or it is damaged."""
    try:
        # O_NONBLOCK: a FIFO in its place must not hold the opener
        fd = os.open(path / "store.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as f:
            raw = json.loads(f.read(_STORE_JSON_MAX_NBYTES))
        header = DirectoryHeader(
            content=dict(raw["content"]),
            placement=dict(raw["placement"]),
            slot_nbytes=int(raw["slot_nbytes"]),
            num_slots=int(raw["num_slots"]),
            retired={str(k): int(v) for k, v in dict(raw["retired"]).items()},
        )
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return header if raw.get("format") == _FORMAT and header.slot_nbytes > 0 and header.num_slots > 0 else None


def is_in_use(path: Path) -> bool:
    """Whether a process has the directory open; changes nothing."""
    try:
        fd = os.open(path / "locks", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _MEMBER_BYTE, 1, 0)
        kind: int = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked))[0]
    finally:
        os.close(fd)
    return kind != fcntl.F_UNLCK


class DiskDirectory:
    """One opener's view of a directory. Locks belong to this object, not to the process."""

    def __init__(self, path: str | Path) -> None:
        """Create the directory if need be and check that it may be used.

        Raises:
            ConfigError: not a directory, writable by others, or on a network file system.
            OSError: it cannot be reached now.
        """
        self.path = Path(path)
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError, PermissionError) as e:
            raise ConfigError(f"disk.path: {path} cannot be a directory ({e}); give another path") from e
        mode = self.path.stat().st_mode
        if mode & 0o022:
            raise ConfigError(
                f"disk.path: {path} may be written by others (mode {mode & 0o7777:o}); run: chmod go-w {path}"
            )
        fs_type = file_system_type(self.path)
        if is_network_file_system(fs_type):
            raise ConfigError(
                f"disk.path: {path} is on a network file system ({fs_type}), where the index's memory map and locks "
                "do not hold; give a local directory, or use the shared tier for it"
            )
        self._device = self.path.stat().st_dev
        self._locks_fd = os.open(self.path / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._data_fd = -1
        self._slot_nbytes = 0

    @property
    def data_path(self) -> Path:
        return self.path / "data"

    @property
    def index_path(self) -> Path:
        return self.path / "index"

    @property
    def data_fd(self) -> int:
        return self._data_fd

    @contextlib.contextmanager
    def opening(self) -> Iterator[None]:
        """Held by one process at a time, while it opens, rebuilds or clears."""
        deadline = time.monotonic() + _OPEN_TIMEOUT_S
        while not self._lock(_OPEN_BYTE, 1, fcntl.F_WRLCK):
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"disk.path: {self.path} has been held by another process that opens it for {_OPEN_TIMEOUT_S:g} s"
                )
            time.sleep(0.01)
        try:
            yield
        finally:
            self._lock(_OPEN_BYTE, 1, fcntl.F_UNLCK)

    def is_only_member(self) -> bool:
        """Whether no other process has the directory open; call while `opening`."""
        alone = self._lock(_MEMBER_BYTE, 1, fcntl.F_WRLCK)
        self._lock(_MEMBER_BYTE, 1, fcntl.F_RDLCK)
        return alone

    def settle(self, wanted: DirectoryHeader, *, on_mismatch: str) -> DirectoryHeader:
        """Agree on the header, clear or resize the directory where asked; call while `opening`.

        Raises:
            IdentityMismatchError: it holds another identity, and on_mismatch is "refuse".
            ConfigError: it must be cleared or resized while others use it.
        """
        found = read_header(self.path)
        alone = self.is_only_member()
        self._check_pid_namespace(alone=alone)
        differences = found.differences(wanted) if found else {}
        if found and differences:
            if on_mismatch != "clear":
                raise IdentityMismatchError(str(self.path), differences)
            if not alone:
                raise ConfigError(f"disk.path: {self.path} holds another identity and is in use; it cannot be cleared")
            self.clear()
            found = None
        if found and found.num_slots != wanted.num_slots and not alone:
            raise ConfigError(
                f"disk.capacity_nbytes: {self.path} is in use with room for {found.num_slots} chunks, this store asks "
                f"for {wanted.num_slots}; give all processes that share it the same capacity"
            )
        if found is None:
            logger.info("disk tier %s: new directory for %d chunks", self.path, wanted.num_slots)
        header = found if found and found.num_slots == wanted.num_slots else None
        if header is None:
            retired = found.retired if found else {}
            header = DirectoryHeader(
                content=wanted.content,
                placement=wanted.placement,
                slot_nbytes=wanted.slot_nbytes,
                num_slots=wanted.num_slots,
                retired=retired,
            )
            self.write_header(header)
        self._open_data(header)
        return header

    def _check_pid_namespace(self, *, alone: bool) -> None:
        """LMDB tells dead readers by their pids, which mean nothing in another namespace."""
        file, mine = self.path / "pid_namespace", str(os.stat("/proc/self/ns/pid").st_ino)
        if not alone and file.exists() and file.read_text() != mine:
            raise ConfigError(
                f"disk.path: {self.path} is open in another PID namespace; run the processes that share it in one "
                "PID namespace (containers: one pod with a shared process namespace, or --pid), or give each its own"
            )
        with open(file, "w", encoding="ascii", opener=_private) as f:
            f.write(mine)

    def write_header(self, header: DirectoryHeader) -> None:
        """Replace store.json, durably."""
        fields = {"format": _FORMAT, **{f: getattr(header, f) for f in DirectoryHeader.__dataclass_fields__}}
        temporary = self.path / "store.json.new"
        with open(temporary, "w", encoding="utf-8", opener=_private) as f:
            json.dump(fields, f, indent=1, sort_keys=True)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, self.path / "store.json")

    def clear(self) -> None:
        """Delete data and index."""
        for file in (self.data_path, *self.path.glob("index*/*"), self.path / "store.json"):
            file.unlink(missing_ok=True)

    def move_index_aside(self) -> None:
        """Put a damaged index where a person can look at it; an earlier one is deleted."""
        aside = self.path / "index.damaged"
        if not self.index_path.exists():
            return
        if aside.exists():
            for file in aside.iterdir():
                file.unlink()
            aside.rmdir()
        os.replace(self.index_path, aside)

    def num_slots_on_disk(self) -> int:
        """Slots that the data file has room for now."""
        return os.fstat(self._data_fd).st_size // self._slot_nbytes

    def extend(self, num_slots: int) -> int:
        """Grow the data file by one extent, to at most ``num_slots``; returns slots there now.

        On a file system that is nearly full it grows by what fits, some room left for the index.

        Raises:
            OSError: not even one slot fits; the file keeps its size.
        """
        have = self.num_slots_on_disk()
        free = os.statvfs(self.path)
        room = free.f_bavail * free.f_frsize - _INDEX_ROOM_NBYTES - num_slots * _INDEX_NBYTES_PER_SLOT
        fits = max(1, min(EXTENT_NBYTES, room) // self._slot_nbytes)
        want = min(num_slots, have + fits)
        if want > have:
            if room < self._slot_nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._data_fd, 0, want * self._slot_nbytes)
        return self.num_slots_on_disk()

    def try_lock(self, start: int, length: int) -> bool:
        """Reserve slots for writing against other processes; False if one of them holds any."""
        return self._lock(start, length, fcntl.F_WRLCK)

    def unlock(self, start: int, length: int) -> None:
        self._lock(start, length, fcntl.F_UNLCK)

    def is_intact(self) -> bool:
        """Whether the data file that is open here is still the one in the directory."""
        try:
            mine, there = os.fstat(self._data_fd), os.stat(self.data_path)
        except OSError:
            return False
        return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)

    def may_return(self) -> bool:
        """Whether the directory is there again, or can be made again on the same file system.

        An unmounted mount point leaves an empty directory on another file system: that must
        not be filled.
        """
        try:
            probe = self.path if self.path.exists() else self.path.parent
            same_device = os.stat(probe).st_dev == self._device
            return same_device or os.path.ismount(probe) or (self.path / "store.json").exists()
        except OSError:
            return False

    def close(self) -> None:
        """Close the files; the kernel drops this opener's locks."""
        for fd in (self._data_fd, self._locks_fd):
            if fd >= 0:
                os.close(fd)
        self._data_fd = self._locks_fd = -1

    def _open_data(self, header: DirectoryHeader) -> None:
        self._slot_nbytes = header.slot_nbytes
        self._data_fd = open_direct(self.data_path, os.O_RDWR | os.O_CREAT)
        if self.num_slots_on_disk() > header.num_slots:
            os.ftruncate(self._data_fd, header.num_slots * header.slot_nbytes)

    def _lock(self, start: int, length: int, kind: int) -> bool:
        request = _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(self._locks_fd, fcntl.F_OFD_SETLK, request)
        except OSError as e:
            if e.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
