"""Whole reads and writes that go around the page cache where the file system lets them.

Offsets, sizes and buffer addresses are multiples of 4096 (the caller sees to it). Nothing
here knows what the bytes are.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]  # one-dimensional
IOV_MAX: Final = min(os.sysconf("SC_IOV_MAX"), 1024)
# names as in /proc/filesystems
_NETWORK_FS: Final = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "lustre", "gpfs", "afs", "9p", "virtiofs",
    "glusterfs", "beegfs", "orangefs", "pvfs2", "ocfs2", "gfs2", "ncpfs", "coda",
}  # fmt: skip


def open_direct(path: str | Path, flags: int, mode: int = 0o600) -> int:
    """Open with O_DIRECT, or without where the file system refuses it; never follows a symlink."""
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags | os.O_DIRECT, mode)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        return os.open(path, flags, mode)


def preadv_full(fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    """Read until the buffers are full or the file ends; returns the bytes read."""
    return _transfer(os.preadv, fd, buffers, offset)


def pwritev_full(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    """Write all buffers.

    Raises:
        OSError: what the kernel said; ENOSPC also where it wrote less without saying why.
    """
    total = sum(b.nbytes for b in buffers)
    if _transfer(os.pwritev, fd, buffers, offset) != total:
        raise OSError(errno.ENOSPC, "short write")


def _transfer(call: Callable[..., int], fd: int, buffers: Sequence[Buffer], offset: int) -> int:
    done = 0
    for start in range(0, len(buffers), IOV_MAX):
        part = [b.data for b in buffers[start : start + IOV_MAX]]
        while part:
            n = call(fd, part, offset + done)
            if n == 0:
                return done
            done += n
            part = _after(part, n)
    return done


def _after(buffers: list[memoryview], n: int) -> list[memoryview]:
    """What is left of buffers after n bytes."""
    for i, buffer in enumerate(buffers):
        if n < buffer.nbytes:
            return [buffer[n:], *buffers[i + 1 :]]
        n -= buffer.nbytes
    return []


def file_system_type(path: str | Path) -> str:
    """The type of the file system that holds an existing path, as in /proc/self/mountinfo."""
    device = os.stat(path).st_dev
    with open("/proc/self/mountinfo", "rb") as f:
        return find_type(f, os.fsencode(os.path.realpath(path)), f"{os.major(device)}:{os.minor(device)}".encode())


def find_type(mountinfo: Iterable[bytes], path: bytes, device: bytes) -> str:
    """The type of the innermost mount that holds a path, in lines of mountinfo (proc(5)).

    A mount of the path's own device comes first: the others are hidden by a later mount, or
    their device numbers are made up (btrfs). "unknown" where nothing fits.
    """
    best, found = (False, -1), b"unknown"
    for line in mountinfo:
        left, _, right = line.partition(b" - ")
        fields = left.split()
        point = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), fields[4])
        if path == point or path.startswith(point.rstrip(b"/") + b"/"):
            fit = (fields[2] == device, len(point))
            if fit >= best:
                best, found = fit, right.split()[0]
    return found.decode(errors="replace")


def is_network_file_system(fs_type: str) -> bool:
    """Whether locks and memory maps of this file system type reach over a network."""
    return fs_type in _NETWORK_FS or (fs_type.startswith("fuse.") and fs_type not in ("fuse.fuse-overlayfs",))
