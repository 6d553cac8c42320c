"""Slots from a pipe, verified: each part while the next ones are under way."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from connectors.pipe import Pipe
from kvstore.keys import BlockKey
from kvstore.slot import Rows, SlotCodec, Slots


def receive_verified(
    pipe: Pipe,
    codec: SlotCodec,
    rows: Rows,
    slots: Slots,
    keys: Sequence[BlockKey],
    namespace: bytes,
    deadline: float,
) -> NDArray[np.bool_]:
    """Receive ``rows[slots]``, which the pipe's end was made with.

    Args:
        keys: what each slot is to hold.
        deadline: on the clock of `time.monotonic`.
    Returns:
        Shape (n,): False where a slot is damaged, of another namespace, or holds another key.
    Raises:
        PipeError: not all came; the pipe is closed, and what the slots hold is nothing.
    """
    good: list[bool] = []
    to_be = zip(slots.tolist(), keys, strict=True)
    for come in pipe.recv_slots(slots, max(0.0, deadline - time.monotonic())):
        have_come = islice(to_be, come - len(good))
        good += [codec.holds(rows[slot].data, key, namespace) for slot, key in have_come]
    return np.array(good, dtype=np.bool_)
