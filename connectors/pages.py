"""Copies pages of an engine's paged cache from and to stripes of host slots.

A stripe is plane-major: ``(planes, blocks_per_chunk, page_nbytes)``, where a plane is a
layer's pages, or its K or V pages where the engine keeps them apart. Knows bytes only.

On a CPU a page is one memmove. On a device a slot is one transfer between its pinned stripe
and a staging buffer, and a plane's pages of all slots are one gather or scatter there: single
pages are too small to be copied one by one. All of it runs on the caller's stream, so it is
in order with what the engine computes before and after; nothing waits for it on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from connectors.base import CopyJob
from kvstore.copier import move_each

_STAGING_NBYTES: Final = 64 << 20


class PageCopier:
    """Args:
    planes: uint8, (num_blocks, page_nbytes), the last dimension dense; all on one device.
    blocks_per_chunk: blocks of a stripe.
    staged: by way of a staging buffer; by default on devices only.
    """

    def __init__(self, planes: Sequence[torch.Tensor], blocks_per_chunk: int, *, staged: bool | None = None) -> None:
        self._planes, self._per_chunk = list(planes), blocks_per_chunk
        sizes = [plane.shape[1] for plane in planes]
        self._starts = [sum(sizes[:i]) * blocks_per_chunk for i in range(len(planes))]
        self.chunk_nbytes = sum(sizes) * blocks_per_chunk
        self._device = planes[0].device
        self._staging: torch.Tensor | None = None
        if staged if staged is not None else self._device.type != "cpu":
            rows = max(1, _STAGING_NBYTES // self.chunk_nbytes)
            self._staging = torch.empty((rows, self.chunk_nbytes), dtype=torch.uint8, device=self._device)

    def load(self, stripe: NDArray[np.uint8], job: CopyJob) -> None:
        """Host slots -> pages, before whatever follows on the current stream."""
        self._check(stripe, job)
        if self._staging is None:
            self._move(stripe, job, to_slots=False)
            return
        for slots, rows, positions, blocks in self._groups(job):
            for i, slot in enumerate(slots):
                self._staging[i].copy_(torch.from_numpy(stripe[slot]), non_blocking=True)
            for plane, pages in zip(self._planes, self._staged_planes(), strict=True):
                plane.index_copy_(0, blocks, pages[rows, positions])

    def store(self, stripe: NDArray[np.uint8], job: CopyJob) -> None:
        """Pages -> host slots, behind what is on the current stream."""
        self._check(stripe, job)
        if self._staging is None:
            self._move(stripe, job, to_slots=True)
            return
        for slots, rows, positions, blocks in self._groups(job):
            for plane, pages in zip(self._planes, self._staged_planes(), strict=True):
                pages[rows, positions] = plane[blocks]
            for i, slot in enumerate(slots):
                torch.from_numpy(stripe[slot]).copy_(self._staging[i], non_blocking=True)

    def mark(self) -> Any:
        """A `torch.cuda.Event` behind all copies so far; None where they have ended already."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _groups(self, job: CopyJob) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
        """As many slots as staging holds: which, and for each block its row there, its position, and its page."""
        assert self._staging is not None
        distinct = list(dict.fromkeys(job.slots))
        row_of = {slot: i for i, slot in enumerate(distinct)}
        rows = np.array([row_of[slot] for slot in job.slots], dtype=np.int64)
        for first in range(0, len(distinct), len(self._staging)):
            slots = distinct[first : first + len(self._staging)]
            mine = np.flatnonzero((rows >= first) & (rows < first + len(slots)))
            numbers = rows[mine] - first, np.asarray(job.positions)[mine], np.asarray(job.blocks)[mine]
            yield slots, *(self._on_device(part) for part in numbers)  # type: ignore[misc]

    def _staged_planes(self) -> list[torch.Tensor]:
        """Staging as (rows, blocks_per_chunk, page_nbytes), plane by plane."""
        assert self._staging is not None
        return [
            self._staging[:, start : start + self._per_chunk * plane.shape[1]].view(-1, self._per_chunk, plane.shape[1])
            for plane, start in zip(self._planes, self._starts, strict=True)
        ]

    def _on_device(self, numbers: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(numbers)
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._device.type == "cuda" else tensor

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
