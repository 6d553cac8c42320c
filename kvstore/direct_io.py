"""Whole reads and writes that go around the page cache where the file system lets them.

Offsets, sizes and buffer addresses are multiples of 4096 (the caller sees to it). Nothing
here knows what the bytes are.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

Buffer = NDArray[np.uint8]  # one-dimensional
IOV_MAX: Final = min(os.sysconf("SC_IOV_MAX"), 1024)
# statfs magic numbers (linux/magic.h and the file systems' own sources)
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
    wanted = f"{os.major(device)}:{os.minor(device)}"
    real = os.path.realpath(path)
    best, found = -1, "unknown"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, _, right = line.partition(" - ")
            fields = left.split()
            mount_point = fields[4].encode().decode("unicode_escape", "replace")
            inside = real == mount_point or real.startswith(mount_point.rstrip("/") + "/")
            if inside and len(mount_point) >= best and (fields[2] == wanted or best < 0):
                best, found = len(mount_point), right.split()[0]
    return found


def is_network_file_system(fs_type: str) -> bool:
    """Whether locks and memory maps of this file system type reach over a network."""
    return fs_type in _NETWORK_FS or (fs_type.startswith("fuse.") and fs_type not in ("fuse.fuse-overlayfs",))
