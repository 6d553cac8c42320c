"""Tensors from one process to another: the contract of every transport.

A `PipeEnd` is one end before it is joined to the other: what `hello` says of it goes to the peer by
a channel that both trust (`connectors.control`), and `join` makes it a `Pipe`. Transports that need
an extra are imported only where one is used.

    tcp     `connectors.tcp`     plain sockets; needs nothing
    nccl    `connectors.nccl`    torch.distributed: NCCL between GPUs, gloo where there is none
    nixl    `connectors.nixl`    one-sided reads of registered slots
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

import torch

from kvstore.errors import KVStoreError
from kvstore.slot import Slots

MAX_NBYTES: Final = 1 << 30
MAX_DIMS: Final = 16


class PipeError(KVStoreError):
    """Something is wrong with a pipe."""


class PipeClosedError(PipeError):
    """The pipe was closed: by this end, by the peer, or because the peer has died."""


class PipeTimeoutError(PipeError, TimeoutError):
    """The deadline has passed."""


class PipeProtocolError(PipeError):
    """What came is not what a pipe sends, is larger than what is taken, or does not fit where it goes."""


class Pipe(ABC):
    """To one peer, and back; each way first in, first out.

    One thread may send while another receives; two must not send, nor receive, at a time.
    A `recv_tensor` that times out before anything has come leaves the pipe as it was, and so does
    a tensor that is refused before it is sent. After any other error the pipe is closed, at both ends.

    Slots are rows of the memory that the end was made with, of one size at both ends.
    """

    @abstractmethod
    def send_tensor(self, tensor: torch.Tensor | None, timeout_s: float) -> None:
        """Send a tensor of any shape and dtype, or None; it may be overwritten when this returns.

        Raises:
            PipeProtocolError: it is larger than ``max_nbytes``, or has more than `MAX_DIMS`
                dimensions. Nothing was sent.
            PipeTimeoutError, PipeClosedError
        """

    @abstractmethod
    def recv_tensor(self, timeout_s: float, out: torch.Tensor | None = None) -> torch.Tensor | None:
        """The next tensor, or None where that was sent.

        Args:
            out: contiguous; what comes goes there and must have its shape and dtype. By default
                memory is allocated, after the size was checked against ``max_nbytes``.
        Raises:
            PipeTimeoutError, PipeClosedError, PipeProtocolError
        """

    @abstractmethod
    def send_slots(self, slots: Slots, timeout_s: float) -> None:
        """Send rows of this end's memory; they may be overwritten when this returns: the peer has them.

        Args:
            slots: int64, shape (n,), in any order.
        Raises:
            PipeTimeoutError, PipeClosedError
        """

    @abstractmethod
    def recv_slots(self, slots: Slots, timeout_s: float) -> Iterator[int]:
        """Receive as many rows as the peer sends, which must be as many as ``slots``, into these.

        Yields:
            How many leading ones have come so far; rising, at last ``len(slots)``. What has come can
            be verified while the rest is under way.
        Raises:
            PipeTimeoutError, PipeClosedError, PipeProtocolError: as an error closes the pipe,
                nothing writes into the slots any more once it is raised.
        """

    @property
    @abstractmethod
    def is_closed(self) -> bool:
        """Whether it was closed, by this end, by the peer or by an error, as far as is known without a wait. Any
        thread may ask; while one sends or receives, that one is told first."""

    @abstractmethod
    def close(self) -> None:
        """Wake up who waits on it, here and at the peer, and release everything. May be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PipeEnd(ABC):
    """One end, not joined yet.

    Transports' ends are made with ``(rows, *, is_server, max_nbytes, ...)``: the memory whose rows are
    slots (uint8, shape (num_slots, slot_nbytes), 4096-byte aligned), which of the two ends it is,
    and the largest tensor that is taken.
    """

    @abstractmethod
    def hello(self) -> bytes:
        """What the peer's `join` needs: at most 64 KiB, not secret to the peer but to all others."""

    @abstractmethod
    def join(self, peer_hello: bytes, timeout_s: float) -> Pipe:
        """Connect. Both ends call it, at about the same time.

        Raises:
            PipeProtocolError: that is no hello of this transport, or of memory with other slots.
            PipeTimeoutError: the peer has not come.
        """

    @abstractmethod
    def close(self) -> None:
        """Release what was not joined; what was, is the pipe's."""
