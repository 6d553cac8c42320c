"""What the suite of pipes sends, and how it does that and waits; see `connectors.testing.pipe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch

from connectors.pipe import Pipe, PipeClosedError, PipeEnd
from kvstore.arena import HostArena
from kvstore.slot import Rows, Slots

NUM_SLOTS: Final = 24
SLOT_NBYTES: Final = 90 * 4096
MAX_NBYTES: Final = 32 << 20  # more than buffers on the way hold: to send it takes a receiver
LONG_S: Final = 60.0  # ends a test that hangs
SOON_S: Final = 20.0  # what must not wait for LONG_S, on cores that are busy with other things
T = TypeVar("T")


def slot_content(slot: int, seed: int) -> Rows:
    return np.random.default_rng([seed, slot]).integers(0, 256, SLOT_NBYTES, dtype=np.uint8)


def make_arena() -> HostArena:
    return HostArena(NUM_SLOTS, SLOT_NBYTES, sharing="memfd")


def fill(rows: Rows, seed: int) -> None:
    for slot in range(len(rows)):
        rows[slot] = slot_content(slot, seed)


def as_slots(numbers: Sequence[int]) -> Slots:
    return np.array(numbers, dtype=np.int64)


def make_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Of any bytes, but for bool."""
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.empty(shape, dtype=dtype)
    content = torch.randint(0, 2 if dtype is torch.bool else 256, (tensor.nbytes,), generator=generator)
    raw_bytes(tensor).copy_(content.to(torch.uint8))
    return tensor


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def assert_same(came: torch.Tensor | None, sent: torch.Tensor) -> None:
    """In shape, dtype and every bit."""
    assert came is not None and came.dtype == sent.dtype and came.shape == sent.shape and came.is_contiguous()
    sent = sent.resolve_conj().resolve_neg().contiguous()
    assert torch.equal(raw_bytes(came), raw_bytes(sent))


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """Each in a thread of its own; what they return."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result(LONG_S) for future in [threads.submit(call) for call in calls]]


def join(end_a: PipeEnd, end_b: PipeEnd, timeout_s: float = LONG_S) -> list[Pipe]:
    hello_a, hello_b = end_a.hello(), end_b.hello()
    return at_once(lambda: end_a.join(hello_b, timeout_s), lambda: end_b.join(hello_a, timeout_s))


def raised(call: Callable[[], object]) -> tuple[BaseException | None, float]:
    """What it raises, and after how many seconds."""
    start = time.monotonic()
    try:
        call()
    except Exception as e:
        return e, time.monotonic() - start
    return None, time.monotonic() - start


def assert_closed(*pipes: Pipe) -> None:
    """For sending and for receiving; what was sent before the end may still come."""
    for pipe in pipes:
        for call in (partial(drain, pipe), partial(pipe.send_tensor, torch.zeros(4 << 20), SOON_S)):
            error, seconds = raised(call)
            assert isinstance(error, PipeClosedError) and seconds < SOON_S, f"{pipe}: {error!r} after {seconds:.1f} s"


def send_all(pipe: Pipe, tensors: Sequence[torch.Tensor]) -> None:
    for tensor in tensors:
        pipe.send_tensor(tensor, LONG_S)


def recv_all(pipe: Pipe, count: int) -> list[torch.Tensor | None]:
    return [pipe.recv_tensor(LONG_S) for _ in range(count)]


def carry(
    sender: Pipe, receiver: Pipe, tensor: torch.Tensor | None, out: torch.Tensor | None = None
) -> torch.Tensor | None:
    """From one end to the other; what came."""
    _, came = at_once(lambda: sender.send_tensor(tensor, LONG_S), lambda: receiver.recv_tensor(LONG_S, out))
    assert came is None or isinstance(came, torch.Tensor)
    return came


def carry_slots(sender: Pipe, receiver: Pipe, sent: Slots, got: Slots) -> list[int]:
    """From one end to the other; what `recv_slots` yielded."""
    _, steps = at_once(lambda: sender.send_slots(sent, LONG_S), lambda: list(receiver.recv_slots(got, LONG_S)))
    return list(steps)


def drain(pipe: Pipe) -> None:
    while True:
        pipe.recv_tensor(SOON_S)
