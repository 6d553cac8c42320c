"""Copies pages of an engine's paged cache from and to stripes of host slots.

A stripe is plane-major: ``(planes, blocks_per_chunk, page_nbytes)``, where a plane is a
layer's pages, or its K or V pages where the engine keeps them apart. Knows bytes only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from connectors.base import CopyJob
from kvstore.copier import move_each


class PageCopier:
    """Args:
    planes: uint8, (num_blocks, page_nbytes), the last dimension dense; all on one device.
    """

    def __init__(self, planes: Sequence[torch.Tensor], blocks_per_chunk: int) -> None:
        self._planes, self._per_chunk = list(planes), blocks_per_chunk
        nbytes = [plane.shape[1] for plane in planes]
        self._starts = [sum(nbytes[:i]) * blocks_per_chunk for i in range(len(planes))]
        self.chunk_nbytes = sum(nbytes) * blocks_per_chunk
        self._device = planes[0].device

    def load(self, stripe: NDArray[np.uint8], job: CopyJob) -> None:
        """Host slots -> pages. On CUDA ordered before whatever follows on the current stream."""
        self._check(stripe, job)
        if self._device.type == "cpu":
            self._move(stripe, job, to_slots=False)
            return
        for slot, position, block in zip(job.slots, job.positions, job.blocks, strict=True):
            row = torch.from_numpy(stripe[slot])
            for plane, at in zip(self._planes, self._at(position), strict=True):
                plane[block].copy_(row[at], non_blocking=True)

    def store(self, stripe: NDArray[np.uint8], job: CopyJob) -> None:
        """Pages -> host slots. On CUDA ordered behind what is on the current stream; see `wait`."""
        self._check(stripe, job)
        if self._device.type == "cpu":
            self._move(stripe, job, to_slots=True)
            return
        for slot, position, block in zip(job.slots, job.positions, job.blocks, strict=True):
            row = torch.from_numpy(stripe[slot])
            for plane, at in zip(self._planes, self._at(position), strict=True):
                row[at].copy_(plane[block], non_blocking=True)

    def wait(self) -> None:
        """Until every copy has arrived."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _at(self, position: int) -> list[slice]:
        """Where this block of a chunk lies in a stripe, plane by plane."""
        sizes = [plane.shape[1] for plane in self._planes]
        return [
            slice(start + position * n, start + (position + 1) * n)
            for start, n in zip(self._starts, sizes, strict=True)
        ]

    def _check(self, stripe: NDArray[np.uint8], job: CopyJob) -> None:
        """What is wrong here would be copied over someone else's memory."""
        bounds = ((job.slots, len(stripe)), (job.positions, self._per_chunk), (job.blocks, len(self._planes[0])))
        if any(numbers and not (min(numbers) >= 0 and max(numbers) < n) for numbers, n in bounds):
            raise IndexError(f"job {job.number} is out of bounds")

    def _move(self, stripe: NDArray[np.uint8], job: CopyJob, *, to_slots: bool) -> None:
        slots, positions, blocks = (np.asarray(numbers) for numbers in (job.slots, job.positions, job.blocks))
        rows = stripe.ctypes.data + slots * stripe.strides[0]
        for plane, start in zip(self._planes, self._starts, strict=True):
            nbytes = plane.shape[1]
            in_slots = (rows + start + positions * nbytes).tolist()
            in_cache = (plane.data_ptr() + blocks * plane.stride(0)).tolist()
            targets, sources = (in_slots, in_cache) if to_slots else (in_cache, in_slots)
            move_each(targets, sources, nbytes)
