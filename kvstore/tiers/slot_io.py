"""System calls between the host arena's rows and the slots of one file. Knows bytes only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from kvstore.direct_io import preadv_full, pwritev_full
from kvstore.slot import Rows, Slots

CALL_NBYTES: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class SlotCall:
    """One system call: which of the asked-for slots it moves, and what moves them."""

    indices: NDArray[np.int64]
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class SlotIo:
    """Cuts work into calls of neighbouring slots.

    Args:
        rows: the arena, (num_slots, slot_nbytes).
        num_threads: calls that should be under way at a time.
    """

    rows: Rows
    num_threads: int

    def reads(self, fd: int, slots: Slots, host_slots: Slots) -> list[SlotCall]:
        """Calls that read ``slots[i]`` of the file into row ``host_slots[i]``, the head's first."""
        return [SlotCall(part, self._read(fd, *at)) for part, at in self._parts(slots, host_slots)]

    def writes(self, fd: int, slots: Slots, host_slots: Slots) -> list[SlotCall]:
        """Calls that write row ``host_slots[i]`` to ``slots[i]`` of the file."""
        return [SlotCall(part, self._write(fd, *at)) for part, at in self._parts(slots, host_slots)]

    def _read(self, fd: int, offset: int, buffers: list[NDArray[np.uint8]]) -> Callable[[], None]:
        def read() -> None:
            preadv_full(fd, buffers, offset)  # what the file lacks fails to verify

        return read

    def _write(self, fd: int, offset: int, buffers: list[NDArray[np.uint8]]) -> Callable[[], None]:
        return lambda: pwritev_full(fd, buffers, offset)

    def _parts(
        self, slots: Slots, host_slots: Slots
    ) -> list[tuple[NDArray[np.int64], tuple[int, list[NDArray[np.uint8]]]]]:
        nbytes = self.rows.shape[1]
        parts = neighbouring_slots(slots, nbytes, self.num_threads)
        return [(part, (int(slots[part[0]]) * nbytes, self._buffers(host_slots[part]))) for part in parts]

    def _buffers(self, host_slots: Slots) -> list[NDArray[np.uint8]]:
        """The rows of these slots, neighbours joined."""
        breaks = (np.flatnonzero(np.diff(host_slots) != 1) + 1).tolist()
        firsts = host_slots[[0, *breaks]].tolist()
        lengths = np.diff([0, *breaks, len(host_slots)]).tolist()
        return [self.rows[first : first + n].reshape(-1) for first, n in zip(firsts, lengths, strict=True)]


def neighbouring_slots(slots: Slots, slot_nbytes: int, num_threads: int) -> list[NDArray[np.int64]]:
    """Positions in ``slots``, cut into runs of neighbouring slots for one system call each.

    Calls have up to `CALL_NBYTES`, less where all threads could not be kept busy otherwise;
    the call that holds the head of the prefix comes first.
    """
    if not len(slots):
        return []
    order = np.argsort(slots, kind="stable")
    longest = max(1, min(CALL_NBYTES // slot_nbytes, len(slots) // num_threads))
    ordered = slots[order]
    new_run = np.diff(ordered, prepend=ordered[0] - 2) != 1
    starts = np.flatnonzero(new_run)
    within = np.arange(len(ordered)) - starts[np.cumsum(new_run) - 1]
    cuts = np.flatnonzero(within % longest == 0)
    return sorted(np.split(order, cuts[1:]), key=lambda part: int(part.min()))
