"""Slots from a pipe, verified: each part while the next ones are under way."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from connectors.pipe import Pipe
from kvstore.slot import Rows, SlotCodec, Slots


def receive_verified(
    pipe: Pipe,
    codec: SlotCodec,
    rows: Rows,
    slots: Slots,
    keys: NDArray[np.uint8],
    namespace: bytes,
    deadline: float,
) -> NDArray[np.bool_]:
    """Receive ``rows[slots]``, which the pipe's end was made with.

    Args:
        keys: what each slot is to hold; shape (n, KEY_NBYTES).
        deadline: on the clock of `time.monotonic`.
    Returns:
        Shape (n,): False where a slot is damaged, of another namespace, or holds another key.
    Raises:
        PipeError: not all came; the pipe is closed, and what the slots hold is nothing.
    """
    good, done = np.zeros(len(slots), dtype=np.bool_), 0
    for come in pipe.recv_slots(slots, max(0.0, deadline - time.monotonic())):
        found = codec.verify(rows, slots[done:come], namespace)
        good[done:come] = found.valid & (found.keys[:, 0] == keys[done:come]).all(axis=1)
        done = come
    return good
