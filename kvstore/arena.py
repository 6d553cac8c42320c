"""Host memory for slots: one region that no kill can leak.

Private memory for a store alone: there huge pages are to be had, which make reads from disk
a quarter faster. Else a memfd, which an I/O process or an engine's workers map too, and
which the kernel frees with its last user. An arena knows slots and bytes, never keys.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

Sharing = Literal["private", "memfd"]
_MADV_POPULATE_WRITE: Final = 23  # linux/mman.h, since 5.14
_POPULATE_STEP_NBYTES: Final = 256 << 20


class HostArena:
    """``num_slots`` rows of ``slot_nbytes``, page-aligned, populated, pinned where CUDA is.

    Attributes:
        rows: uint8, shape (num_slots, slot_nbytes). Padding starts as zeros.
        fd: the memfd, to be handed to another process; None for private memory.
    """

    fd: int | None
    rows: NDArray[np.uint8]
    _mmap: mmap.mmap
    _pinned: bool

    def __init__(self, num_slots: int, slot_nbytes: int, *, sharing: Sharing = "private") -> None:
        """Raises ConfigError where the memory cannot be had."""
        size = num_slots * slot_nbytes
        available = _available_nbytes()
        if size > available:
            raise ConfigError(
                f"host.num_blocks: {num_slots} chunks of {slot_nbytes} bytes need {size >> 20} MiB, "
                f"but {available >> 20} MiB are available; give at most {available // slot_nbytes} chunks"
            )
        self.fd = None
        try:
            if sharing == "memfd":
                self.fd = os.memfd_create("kvstore-arena", os.MFD_CLOEXEC)
                os.ftruncate(self.fd, size)
            self._map(num_slots, slot_nbytes)
            self._populate()
        except (OSError, ValueError) as e:
            if self.fd is not None:
                os.close(self.fd)
            raise ConfigError(f"host.num_blocks: cannot have {size >> 20} MiB of host memory: {e}") from e
        self._pinned = _pin(self.rows)

    @classmethod
    def attach(cls, fd: int, num_slots: int, slot_nbytes: int, *, pin: bool = False) -> HostArena:
        """Map another process's arena; takes over ``fd``. Pinned too where this process copies to a device."""
        if os.fstat(fd).st_size != num_slots * slot_nbytes:
            raise ConfigError(f"arena of {os.fstat(fd).st_size} bytes is not {num_slots} slots of {slot_nbytes}")
        arena = cls.__new__(cls)
        arena.fd = fd
        arena._map(num_slots, slot_nbytes)
        arena._pinned = pin and _pin(arena.rows)
        return arena

    def close(self) -> None:
        """Unmap; ``rows`` must not be used any more. Memory goes when no view of it is left. Any thread may call it,
        and more than once."""
        with self._closing:
            fd, self.fd = self.fd, None
            pinned, self._pinned = self._pinned, False
            rows, self.rows = self.rows, np.empty((0, 0), dtype=np.uint8)
        if pinned:
            torch.cuda.cudart().cudaHostUnregister(rows.ctypes.data)  # type: ignore[no-untyped-call]
        if fd is not None:
            os.close(fd)
        del rows
        with contextlib.suppress(BufferError):  # a caller still holds a view: unmapped with it
            self._mmap.close()

    def _map(self, num_slots: int, slot_nbytes: int) -> None:
        size = num_slots * slot_nbytes
        self._closing = threading.Lock()
        if self.fd is None:
            self._mmap = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        else:
            self._mmap = mmap.mmap(self.fd, size)
        with contextlib.suppress(OSError):  # huge pages are a wish: some kernels have none for shared memory
            self._mmap.madvise(mmap.MADV_HUGEPAGE)
        self.rows = np.frombuffer(self._mmap, dtype=np.uint8).reshape(num_slots, slot_nbytes)

    def _populate(self) -> None:
        size = len(self._mmap)
        for start in range(0, size, _POPULATE_STEP_NBYTES):
            self._mmap.madvise(_MADV_POPULATE_WRITE, start, min(_POPULATE_STEP_NBYTES, size - start))


def _pin(rows: NDArray[np.uint8]) -> bool:
    if not torch.cuda.is_available():
        return False
    error = torch.cuda.cudart().cudaHostRegister(rows.ctypes.data, rows.nbytes, 0)  # type: ignore[no-untyped-call]
    if int(error) != 0:
        logger.warning(
            "host arena of %d bytes could not be pinned (CUDA error %s): copies are slower", rows.nbytes, error
        )
    return int(error) == 0


def _available_nbytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as f:
        for line in f:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62
