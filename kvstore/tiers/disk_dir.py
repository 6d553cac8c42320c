"""A disk tier's directory: who may use it, its data file and its locks.

    store.json     identity, placement, slot size and count (disk_header)
    data           slots, growing by fallocated extents
    index/         LMDB (disk_index)
    pid_namespace  of the processes that have it open
    locks          byte ranges locked through the kernel: a process's locks die with it

Knows files and slot numbers, never keys.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from kvstore.direct_io import file_system_type, is_network_file_system, open_direct
from kvstore.errors import ConfigError, IdentityMismatchError
from kvstore.tiers.disk_header import DirectoryHeader, private, read_header, write_header

logger = logging.getLogger(__name__)

EXTENT_NBYTES: Final = 256 << 20
_INDEX_ROOM_NBYTES: Final = 256 << 10
_INDEX_NBYTES_PER_SLOT: Final = 16  # beside what the file system's other free space gives
_OPEN_BYTE: Final = 1 << 60  # held while a process opens, rebuilds or clears
_MEMBER_BYTE: Final = (1 << 60) + 1  # held shared by every process that has it open
_OPEN_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.01
_FLOCK: Final = struct.Struct("hhqqi4x")


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


@dataclass(frozen=True, slots=True)
class Home:
    """The file system that a directory lies on, so that no other one is filled in its stead."""

    device: int
    mount_point: str

    @classmethod
    def of(cls, path: Path) -> Self:
        real = os.path.realpath(path)
        device = os.stat(real).st_dev
        while not os.path.ismount(real):
            real = os.path.dirname(real)
        return cls(device, real)

    def has(self, path: Path) -> bool:
        """Whether a directory is there, or can be made, on this file system or on one that is
        mounted in its place. What an unmounted mount point leaves is neither."""
        try:
            nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
            same_device = os.stat(nearest).st_dev == self.device
            return same_device or (self.mount_point != "/" and os.path.ismount(self.mount_point))
        except OSError:
            return False


def link_in(path: Path) -> str | None:
    """The first of a directory's own files that is a link, or has a second name: reading or writing it would reach
    out of the directory; None where there is none."""
    for name in ("store.json", "locks", "data", "index", "index/data.mdb", "index/lock.mdb"):
        try:
            status = (path / name).lstat()
        except OSError:
            continue
        if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
            return name
    return None


class DiskDirectory:
    """One opener's view of a directory. Locks belong to this object, not to the process, and
    not to a child that is forked from it."""

    def __init__(self, path: str | Path) -> None:
        """Create the directory if need be and check that it may be used.

        Raises:
            ConfigError: not a directory, writable by others, or on a network file system.
            OSError: it cannot be reached now.
        """
        self.path = Path(path)
        self._locks_fd = self._data_fd = -1
        self._slot_nbytes = 0
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
        self.home = Home.of(self.path)
        self._locks_fd = os.open(self.path / "locks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        _open_directories.add(self)

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
    def opening(self, timeout_s: float = _OPEN_TIMEOUT_S) -> Iterator[None]:
        """Held by one process at a time, while it opens, rebuilds or clears.

        Raises:
            TimeoutError: another one has held it all the time.
        """
        deadline = time.monotonic() + timeout_s
        while not self._lock(_OPEN_BYTE, 1, fcntl.F_WRLCK):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.path} has been held by another process that opens it for {timeout_s:g} s")
            time.sleep(_POLL_S)
        try:
            yield
        finally:
            self._lock(_OPEN_BYTE, 1, fcntl.F_UNLCK)

    def is_only_member(self) -> bool:
        """Become a member; whether no other opener is one. Call while `opening`."""
        alone = self._lock(_MEMBER_BYTE, 1, fcntl.F_WRLCK)
        self._lock(_MEMBER_BYTE, 1, fcntl.F_RDLCK)
        return alone

    def settle(self, wanted: DirectoryHeader, *, on_mismatch: str) -> DirectoryHeader | None:
        """Agree on the header, clear or resize the directory where asked, and open the data
        file; call while `opening`.

        Returns:
            What store.json said before; None where it was missing, damaged or cleared.
        Raises:
            IdentityMismatchError: it holds another identity, and on_mismatch is "refuse".
            ConfigError: it must be cleared or resized while others use it.
        """
        found, alone = read_header(self.path), self.is_only_member()
        self._check_pid_namespace(alone=alone)
        differences = found.differences(wanted) if found else {}
        if found and differences:
            if on_mismatch != "clear":
                raise IdentityMismatchError(str(self.path), differences)
            if not alone:
                raise ConfigError(f"disk.path: {self.path} holds another identity and is in use; it cannot be cleared")
            self._clear()
            found = None
        if found and found.num_slots != wanted.num_slots and not alone:
            raise ConfigError(
                f"disk.capacity_nbytes: {self.path} is in use with room for {found.num_slots} chunks, this store asks "
                f"for {wanted.num_slots}; give all processes that share it the same capacity"
            )
        self._open_data(wanted, alone=alone)
        if found is None:
            logger.info("disk tier %s: new directory for %d chunks", self.path, wanted.num_slots)
        if found != wanted:
            write_header(self.path, wanted)
        return found

    def delete_index(self) -> None:
        """What is damaged is not kept: it would count against the bound."""
        for file in (self.index_path / "data.mdb", self.index_path / "lock.mdb"):
            file.unlink(missing_ok=True)

    def empty_data(self) -> None:
        """Give up what all slots hold; the file keeps its size. For who is alone."""
        size = os.fstat(self._data_fd).st_size
        os.ftruncate(self._data_fd, 0)
        if size:
            os.posix_fallocate(self._data_fd, 0, size)

    def num_slots_on_disk(self) -> int:
        """Slots that the data file has room for now."""
        return os.fstat(self._data_fd).st_size // self._slot_nbytes

    def extend(self, num_slots: int) -> int:
        """Grow the data file by one extent, to at most ``num_slots``; returns slots there now.

        On a file system that is nearly full it grows by what fits, some room left for the index.

        Raises:
            OSError: not even one slot fits; the file keeps its size.
        """
        have, slot_nbytes = self.num_slots_on_disk(), self._slot_nbytes
        free = os.statvfs(self.path)
        room = free.f_bavail * free.f_frsize - _INDEX_ROOM_NBYTES - num_slots * _INDEX_NBYTES_PER_SLOT
        fits = max(1, min(EXTENT_NBYTES, room) // slot_nbytes)
        want = min(num_slots, have + fits)
        if want > have:
            if room < slot_nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.posix_fallocate(self._data_fd, have * slot_nbytes, (want - have) * slot_nbytes)
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

    def leave(self) -> None:
        """Be no member any more, though transfers in flight still use the files."""
        self._lock(_MEMBER_BYTE, 1, fcntl.F_UNLCK)

    def close(self) -> None:
        """Close the files; the kernel drops this opener's locks."""
        fds, self._data_fd, self._locks_fd = (self._data_fd, self._locks_fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _check_pid_namespace(self, *, alone: bool) -> None:
        """LMDB tells dead readers by their pids, which mean nothing in another namespace."""
        file, mine = self.path / "pid_namespace", str(os.stat("/proc/self/ns/pid").st_ino)
        if not alone and file.exists() and file.read_bytes() != mine.encode():
            raise ConfigError(
                f"disk.path: {self.path} is open in another PID namespace; run the processes that share it in one "
                "PID namespace (containers: one pod with a shared process namespace, or --pid), or give each its own"
            )
        with open(file, "w", encoding="ascii", opener=private) as f:
            f.write(mine)

    def _clear(self) -> None:
        """Delete data and index."""
        self.data_path.unlink(missing_ok=True)
        self.delete_index()
        (self.path / "store.json").unlink(missing_ok=True)

    def _open_data(self, header: DirectoryHeader, *, alone: bool) -> None:
        self._slot_nbytes = header.slot_nbytes
        self._data_fd = open_direct(self.data_path, os.O_RDWR | os.O_CREAT)
        if self.num_slots_on_disk() > header.num_slots:
            if not alone:  # with a store.json that others use, this was noticed before
                raise ConfigError(
                    f"disk.capacity_nbytes: {self.path} is in use with more room than this store's capacity; "
                    "give all processes that share it the same capacity"
                )
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


def _close_in_child() -> None:
    for directory in list(_open_directories):
        directory.close()


_open_directories: weakref.WeakSet[DiskDirectory] = weakref.WeakSet()
os.register_at_fork(after_in_child=_close_in_child)
