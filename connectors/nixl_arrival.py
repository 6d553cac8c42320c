"""How slots of the peer come into rows of this end, by way of the landing that NIXL reads into."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from connectors.nixl_process.client import AgentClient
from connectors.nixl_process.messages import Cells
from connectors.wire.slots import runs_of
from kvstore.slot import Rows, Slots

_PART_NBYTES: Final = 512 << 10  # is copied out and verified at a time: it is still in the cache
_INT: Final = 4  # bytes of a cell's number


class Arrival:
    """Slots on their way from the peer into rows: read by transfers into places of the landing, and copied out.

    Of their cells, [0, copied) are in their rows, [copied, begun) under way, and the rest is not asked for.

    Attributes:
        under_way: [first, end) of each transfer's cells, and its place; the oldest first.
    """

    def __init__(self, rows: Rows, slots: Slots, landing: NDArray[np.uint8], theirs: Slots) -> None:
        self._cells = cells = Cells.of(rows.shape[1])
        self._rows, self._slots = rows, slots
        self._landing = landing[: cells.num_landing * cells.nbytes].reshape(cells.num_landing, cells.nbytes)
        self._of, self._begun = cells.numbers(theirs).tobytes(), 0
        places = range(0, cells.num_landing - cells.per_transfer + 1, cells.per_transfer)
        self._free = list(places)  # last in, first out: that is still in the cache
        self._into = {at: cells.landing(0, cells.per_transfer, at).tobytes() for at in places}
        self.under_way: deque[tuple[int, int, int]] = deque()

    def begin(self, agent: AgentClient, deadline: float) -> None:
        """As many transfers as there are places for, several at a time: to be woken up takes a process long."""
        if len(self.under_way) > len(self._free):
            return
        cells, transfers, total = self._cells, [], len(self._slots) * self._cells.per_slot
        while self._free and self._begun < total:
            first, at = self._begun, self._free.pop()
            self._begun = end = min(first + cells.per_transfer, total)
            is_as_first = first % cells.per_slot == 0 and end - first == cells.per_transfer
            into = self._into[at] if is_as_first else cells.landing(first, end, at).tobytes()
            transfers.append((into, self._of[_INT * first : _INT * end]))
            self.under_way.append((first, end, at))
        if transfers:
            agent.read_cells(transfers, deadline)

    def copy_out(self) -> Iterator[int]:
        """The oldest transfer, which is done, in parts that stay in the cache; how many leading slots are whole."""
        first, end, at = self.under_way.popleft()
        step = max(1, _PART_NBYTES // self._cells.nbytes)
        for start in range(first, end, step):
            stop = min(start + step, end)
            if self._cells.per_slot == 1:
                self._copy_slots(self._slots[start:stop], at + start - first)
            else:
                for i in range(start, stop):
                    self._copy_cell(i, at + i - first)
            if stop == end:
                self._free.append(at)
            yield stop // self._cells.per_slot

    def _copy_slots(self, slots: Slots, at: int) -> None:
        for first, end in runs_of(slots):
            self._rows[first:end] = self._landing[at : at + end - first]
            at += end - first

    def _copy_cell(self, cell: int, at: int) -> None:
        index, part = divmod(cell, self._cells.per_slot)
        nbytes = self._cells.last_nbytes if part == self._cells.per_slot - 1 else self._cells.nbytes
        start = part * self._cells.nbytes
        self._rows[self._slots[index], start : start + nbytes] = self._landing[at, :nbytes]
