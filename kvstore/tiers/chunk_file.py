"""One chunk in a file of its own: a valid safetensors file whose tail is the slot itself.

    [0, header)             8-byte length, JSON, trailing spaces; a multiple of 4096
    [header, file)          the slot as in the arena: payload, padding, trailer

One tensor a layer, ``layer.000`` and so on; padding and trailer are one last U8 tensor
``kvstore.footer``, for safetensors allows neither holes nor trailing bytes. The header is
the same for all chunks of a namespace and placement, so readers compare bytes and never
parse JSON. Format: https://huggingface.co/docs/safetensors (tried with 0.8.0).

Knows paths and bytes, never what a chunk's keys mean. Raises the OSErrors it meets.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import json
import math
import os
import stat
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.byte_layout import payload_tensors
from kvstore.direct_io import open_direct, preadv_full, pwritev_full
from kvstore.identity import FORMAT_VERSION
from kvstore.layout import KVLayout
from kvstore.slot import ALIGNMENT, SlotFormat
from kvstore.tiers.page_buffer import page_aligned

FOOTER_TENSOR: Final = "kvstore.footer"
TOUCH_AFTER_S: Final = 3600.0
Inode = tuple[int, int]  # (st_dev, st_ino)


class Outcome(enum.Enum):
    """What became of reading one file."""

    READ = "read"
    GONE = "gone"
    DAMAGED = "damaged"  # wrong type, size or header; the slot is not worth verifying


@dataclass(frozen=True, slots=True)
class FileFormat:
    """The files of one namespace and placement."""

    header: NDArray[np.uint8]  # page-aligned, read-only
    slot_nbytes: int

    @property
    def file_nbytes(self) -> int:
        return self.header.nbytes + self.slot_nbytes

    def is_like(self, status: os.stat_result) -> bool:
        """Whether a file of this status may be one of these."""
        return stat.S_ISREG(status.st_mode) and status.st_size == self.file_nbytes


def file_format(
    layout: KVLayout, fmt: SlotFormat, namespace: bytes, byte_layout: str = "LBKHTD", tp_size: int = 1
) -> FileFormat:
    """The format of a namespace's files.

    Args:
        byte_layout, tp_size: of the placement; see `kvstore.byte_layout`.
    Raises:
        ValueError: a slot's payload is not that of ``blocks_per_chunk`` blocks of this layout.
    """
    if fmt.payload_nbytes != fmt.blocks_per_chunk * layout.block_nbytes:
        raise ValueError(f"a payload of {fmt.payload_nbytes} bytes is not {fmt.blocks_per_chunk} blocks of {layout}")
    fields: dict[str, object] = {
        "__metadata__": {"format": "kvstore", "version": str(FORMAT_VERSION), "namespace": namespace.hex()}
    }
    offset = 0
    for part in payload_tensors(layout, fmt.blocks_per_chunk, byte_layout, tp_size):
        end = offset + math.prod(part.shape) * part.dtype.itemsize
        fields[part.name] = _tensor(part.dtype.safetensors, list(part.shape), offset, end)
        offset = end
    rest = fmt.slot_nbytes - fmt.payload_nbytes
    fields[FOOTER_TENSOR] = _tensor("U8", [rest], fmt.payload_nbytes, fmt.slot_nbytes)
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode()
    total = -(-(len(text) + 8) // ALIGNMENT) * ALIGNMENT
    header = page_aligned(total)
    header[:] = np.frombuffer((total - 8).to_bytes(8, "little") + text.ljust(total - 8), dtype=np.uint8)
    header.flags.writeable = False
    return FileFormat(header, fmt.slot_nbytes)


class ChunkReader:
    """Reads files of one format; one header buffer a thread."""

    def __init__(self, header_nbytes: int) -> None:
        self._header_nbytes = header_nbytes
        self._buffers = threading.local()

    def read(self, path: str, fmt: FileFormat, row: NDArray[np.uint8], used_ns: int) -> tuple[Outcome, Inode | None]:
        """Read a file's slot into ``row`` in one system call, and note its use at ``used_ns``.

        Returns:
            What became of it, and which file it was. READ: size and header are right, the
            slot is not verified.
        Raises:
            OSError: whatever is not a matter of this one file's being gone or damaged.
        """
        try:
            # O_NONBLOCK: a FIFO in a chunk's place must not hold the thread
            fd = open_direct(path, os.O_RDONLY | os.O_NONBLOCK)
        except (FileNotFoundError, NotADirectoryError):
            return Outcome.GONE, None
        except OSError as e:
            if e.errno == errno.ELOOP:  # a symlink: never followed
                return Outcome.DAMAGED, None
            raise
        try:
            status = os.fstat(fd)
            inode = (status.st_dev, status.st_ino)
            if not fmt.is_like(status):
                return Outcome.DAMAGED, inode
            header = self._buffer()
            if preadv_full(fd, [header, row], 0) != fmt.file_nbytes or not np.array_equal(header, fmt.header):
                return Outcome.DAMAGED, inode
            touch(fd, status, used_ns)
            return Outcome.READ, inode
        finally:
            os.close(fd)

    def _buffer(self) -> NDArray[np.uint8]:
        if not hasattr(self._buffers, "header"):
            self._buffers.header = page_aligned(self._header_nbytes)
        buffer: NDArray[np.uint8] = self._buffers.header
        return buffer


def write_file(path: str, fmt: FileFormat, row: NDArray[np.uint8], used_ns: int, *, sync: bool) -> None:
    """Make a new file of header and slot, used at ``used_ns``; nothing is left of it where that fails.

    Raises:
        OSError: what the kernel said.
    """
    fd = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        pwritev_full(fd, [fmt.header, row], 0)
        set_used(fd, used_ns)
        if sync:
            os.fdatasync(fd)
    except OSError:
        remove(path)
        raise
    finally:
        os.close(fd)


def sync_file(path: str) -> None:
    """Make a file or a folder durable; one that is gone needs nothing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def touch(file: int | str, status: os.stat_result, used_ns: int) -> None:
    """Note a use in the mtime, hourly at most; a file that may not be touched is left as it is."""
    if used_ns - status.st_mtime_ns > TOUCH_AFTER_S * 1e9:
        set_used(file, used_ns)


def set_used(file: int | str, used_ns: int) -> None:
    """Set the mtime, which `shared_gc` goes by, where that is allowed."""
    with contextlib.suppress(OSError):
        os.utime(file, ns=(used_ns, used_ns))


def remove(path: str) -> bool:
    """Unlink, whatever becomes of it; whether it was done."""
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
