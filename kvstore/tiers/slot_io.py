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
BUNDLE_NBYTES: Final = 2 << 20  # many short calls cost more in threads' hand-overs than in the kernel
Move = Callable[[list[NDArray[np.uint8]], int], None]


@dataclass(frozen=True, slots=True)
class SlotCall:
    """What one thread moves in one go: which of the asked-for slots, and what moves them."""

    indices: NDArray[np.int64]
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class SlotIo:
    """Cuts work into system calls of neighbouring slots; short ones are bundled.

    Args:
        rows: the arena, (num_slots, slot_nbytes).
        num_threads: calls that should be under way at a time.
    """

    rows: Rows
    num_threads: int

    def reads(self, fd: int, slots: Slots, host_slots: Slots) -> list[SlotCall]:
        """Calls that read ``slots[i]`` of the file into row ``host_slots[i]``, the head's first."""

        def read(buffers: list[NDArray[np.uint8]], offset: int) -> None:
            left = preadv_full(fd, buffers, offset)
            for buffer in buffers:  # what the file lacks must not verify as what lay in the row before
                if left < len(buffer):
                    buffer[left:] = 0
                left = max(0, left - len(buffer))

        return self._calls(read, slots, host_slots)

    def writes(self, fd: int, slots: Slots, host_slots: Slots) -> list[SlotCall]:
        """Calls that write row ``host_slots[i]`` to ``slots[i]`` of the file."""

        def write(buffers: list[NDArray[np.uint8]], offset: int) -> None:
            pwritev_full(fd, buffers, offset)

        return self._calls(write, slots, host_slots)

    def _calls(self, move: Move, slots: Slots, host_slots: Slots) -> list[SlotCall]:
        nbytes, calls = self.rows.shape[1], []
        share = len(slots) * nbytes // self.num_threads  # enough for every thread
        parts = neighbouring_slots(slots, nbytes, self.num_threads)
        for bundle in _bundles(parts, min(BUNDLE_NBYTES, share) // nbytes):
            moves = [(self._buffers(host_slots[part]), int(slots[part[0]]) * nbytes) for part in bundle]
            calls.append(SlotCall(np.concatenate(bundle), _mover(move, moves)))
        return calls

    def _buffers(self, host_slots: Slots) -> list[NDArray[np.uint8]]:
        """The rows of these slots, neighbours joined."""
        if len(host_slots) == 1:
            return [self.rows[host_slots[0]]]
        breaks = (np.flatnonzero(np.diff(host_slots) != 1) + 1).tolist()
        firsts = host_slots[[0, *breaks]].tolist()
        lengths = np.diff([0, *breaks, len(host_slots)]).tolist()
        return [self.rows[first : first + n].reshape(-1) for first, n in zip(firsts, lengths, strict=True)]


def _mover(move: Move, moves: list[tuple[list[NDArray[np.uint8]], int]]) -> Callable[[], None]:
    def run() -> None:
        for buffers, offset in moves:
            move(buffers, offset)

    return run


def _bundles(parts: list[NDArray[np.int64]], num_slots: int) -> list[list[NDArray[np.int64]]]:
    """Parts in their order, short ones together up to ``num_slots`` slots."""
    bundles: list[list[NDArray[np.int64]]] = []
    room = 0
    for part in parts:
        if len(part) > room or not bundles:
            bundles.append([])
            room = num_slots
        bundles[-1].append(part)
        room -= len(part)
    return bundles


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
