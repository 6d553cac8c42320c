"""Offloading for any engine: what its workers copy. What they are told to is decided in `connectors.offloading`."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from connectors.base import ArenaHandle, CopyJob, Step, Stripe, WorkerHalf
from connectors.pages import PageCopier
from kvstore.arena import HostArena

logger = logging.getLogger(__name__)


class OffloadingWorker(WorkerHalf):
    """The worker half: copies its stripe of every slot. Called by one thread.

    After a load that failed an engine computes from what was not loaded, until its scheduler half
    has heard of it. So long nothing is stored by any worker half of this process: those of several
    connectors share one cache.

    Args:
        stripe: this worker's.
        groups: the cache, by KV cache group: one or more tensors of bytes a layer, each (num_blocks, page_nbytes).
        blocks_per_chunk: as in the scheduler half.
    """

    _not_known: ClassVar[set[tuple[int, int]]] = set()  # worker half, load that failed

    def __init__(self, stripe: Stripe, groups: Sequence[Sequence[torch.Tensor]], blocks_per_chunk: int) -> None:
        self._stripe = stripe
        self._pages = [PageCopier(planes, blocks_per_chunk) for planes in groups]
        self._stripe_nbytes = max(pages.chunk_nbytes for pages in self._pages)
        self._arena: HostArena | None = None
        self._copied: deque[tuple[list[int], Any]] = deque()
        self._failed_blocks: list[tuple[int, int]] = []
        self._failed_jobs: list[int] = []

    def load(self, step: Step) -> None:
        """Before the engine computes: host slots -> cache."""
        self._not_known.difference_update((id(self), number) for number in step.known_failures)
        for job in step.loads:
            try:
                self._pages[job.group].load(self._rows(step.arena), job)
            except Exception:  # what was to be loaded is computed instead
                logger.exception("%d blocks could not be loaded from host memory", len(job.blocks))
                self._failed_blocks += [(job.group, block) for block in job.blocks]
                self._failed_jobs.append(job.number)
                self._not_known.add((id(self), job.number))
        self._note(step.loads)

    def store(self, step: Step) -> None:
        """After the engine has computed: cache -> host slots."""
        for job in step.stores if self._stripe.is_stored_here else ():
            try:
                if self._not_known:
                    self._failed_jobs.append(job.number)
                else:
                    self._store(job, self._rows(step.arena))
            except Exception:
                logger.exception("%d blocks could not be stored in host memory", len(job.blocks))
                self._failed_jobs.append(job.number)
        self._note(step.stores)

    def take_failed_blocks(self) -> list[tuple[int, int]]:
        failed, self._failed_blocks = self._failed_blocks, []
        return failed

    def take_failed_jobs(self) -> list[int]:
        failed, self._failed_jobs = self._failed_jobs, []
        return failed

    def take_reports(self) -> dict[int, int]:
        """Jobs whose bytes have arrived since the last call, for `OffloadingScheduler.reported`; waits for none."""
        reports: dict[int, int] = {}
        while self._copied and ((event := self._copied[0][1]) is None or event.query()):
            reports |= dict.fromkeys(self._copied.popleft()[0], 1)
        return reports

    def close(self) -> None:
        """Wait for what is under way, and unmap the arena."""
        self._not_known.difference_update([failed for failed in self._not_known if failed[0] == id(self)])
        for _, event in self._copied:
            if event is not None:
                event.synchronize()
        self._copied.clear()
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _store(self, job: CopyJob, rows: NDArray[np.uint8]) -> None:
        pages = self._pages[job.group]
        if pages.chunk_nbytes < self._stripe_nbytes:  # of a group with fewer layers: nothing old behind it
            rows[np.unique(job.slots), pages.chunk_nbytes :] = 0
        pages.store(rows, job)

    def _note(self, jobs: Sequence[CopyJob]) -> None:
        if jobs:
            self._copied.append(([job.number for job in jobs], self._pages[0].mark()))

    def _rows(self, handle: ArenaHandle) -> NDArray[np.uint8]:
        """This worker's part of every slot's payload, (num_slots, stripe_nbytes)."""
        if self._arena is None:
            self._arena = handle.attach()
        nbytes, stripe = self._stripe_nbytes, self._stripe
        if nbytes * stripe.count > handle.slot_nbytes:
            raise ValueError(f"{stripe.count} stripes of {nbytes} bytes do not fit {handle.slot_nbytes}")
        return self._arena.rows[:, stripe.index * nbytes : (stripe.index + 1) * nbytes]
