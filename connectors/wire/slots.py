"""Rows of memory, as slots that are sent."""

from __future__ import annotations

import numpy as np

from connectors.pipe import MAX_NBYTES
from kvstore.errors import ConfigError
from kvstore.slot import Rows, Slots


def check_end(rows: Rows, max_nbytes: int) -> None:
    """Raises ConfigError where no end can be made with these."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or not rows.flags.c_contiguous or not rows.flags.writeable:
        raise ConfigError(f"rows: got {rows.dtype} of shape {rows.shape}; give contiguous uint8 of 2 dimensions")
    if not 0 < max_nbytes <= MAX_NBYTES:
        raise ConfigError(f"max_nbytes: got {max_nbytes}; allowed are 1 to {MAX_NBYTES}")


def check_slots(slots: Slots, num_slots: int) -> None:
    """Raises ValueError where there are no such rows."""
    if slots.ndim != 1 or (len(slots) and not 0 <= slots.min() <= slots.max() < num_slots):
        raise ValueError(f"slots of shape {slots.shape} are not all among {num_slots} rows")


def runs_of(slots: Slots) -> list[tuple[int, int]]:
    """Half-open ranges of rows, in the order of slots: each as long as rows are adjacent."""
    runs: list[tuple[int, int]] = []
    first = end = -1
    for slot in slots.tolist():  # of few slots this takes a tenth of what numpy does
        if slot != end:
            runs.append((first, end))
            first = slot
        end = slot + 1
    runs.append((first, end))
    return runs[1:]
