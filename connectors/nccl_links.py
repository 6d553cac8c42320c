"""What moves payload between two processes by torch.distributed: gloo, or NCCL."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, Protocol

import torch
import torch.distributed

from connectors.pipe import PipeClosedError, PipeTimeoutError
from connectors.wire.stream import Stream, seconds_left

dist: Any = torch.distributed  # not all of which has types
_TAG: Final = 0
_CLOSING_TAG: Final = 1  # nothing is ever sent with it
_LOOK_S: Final = 0.05  # whether the peer is still there
_LAST_BYTES_S: Final = 1.0  # for what was under way when the peer closed the pipe

Finish = Callable[[], None]
"""Wait until a transfer is done; raises PipeTimeoutError or PipeClosedError."""


class Link(Protocol):
    """Moves flat uint8 tensors to the peer, or from it, in the order in which transfers are begun.

    What is begun together is waited for together. When a transfer has ended, so have those before.
    """

    window: int  # transfers that may be under way

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish: ...
    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish: ...

    def close(self) -> None:
        """End what is under way, in any thread; memory is left alone from then on."""


class _Waiter:
    """A thread that waits for one way's transfers, in order, so that others need not.

    When a peer dies, gloo often lets who waits for what was half through wait on, until his deadline
    (torch 2.13: of 12 killed receivers 10 left their sender waiting). The socket knows better.
    """

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._jobs: queue.SimpleQueue[tuple[Any, float, queue.SimpleQueue[RuntimeError | None]] | None]
        self._jobs = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kvstore-gloo", daemon=True).start()

    def close(self) -> None:
        """Once the transfers have ended; which they do, at the latest, when they are late."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, deadline, result = job
            left_ms = math.ceil((deadline - time.monotonic()) * 1000)
            try:
                work.wait(timedelta(milliseconds=max(left_ms, 0) + 1))  # 0 would be for ever
                result.put(None)
            except RuntimeError as e:
                result.put(e)
            del job, work, result

    def wait(self, works: list[Any], deadline: float) -> None:
        """For the last of some; the others must be kept till then, or gloo forgets them.

        Raises:
            PipeTimeoutError, PipeClosedError
        """
        result: queue.SimpleQueue[RuntimeError | None] = queue.SimpleQueue()
        self._jobs.put((works[-1], deadline, result))
        give_up = math.inf
        while True:
            try:
                error = result.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                if time.monotonic() >= give_up:
                    raise PipeClosedError("the pipe was closed") from None
                if give_up == math.inf and self._stream.is_over():
                    give_up = time.monotonic() + _LAST_BYTES_S  # they may be there already
        if error is not None and time.monotonic() >= deadline:
            raise PipeTimeoutError("the deadline has passed") from error
        if error is not None:
            raise PipeClosedError("the pipe was closed") from error


class Gloo:
    window = 64

    def __init__(self, store: Any, rank: int, address: str, streams: tuple[Stream, Stream], deadline: float) -> None:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timedelta(seconds=seconds_left(deadline))  # of connecting
        options._threads = 1
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)
        self._peer = 1 - rank
        self._outward, self._inward = map(_Waiter, streams)

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        works = [self._begin(self._group.send, part) for part in parts]
        return partial(self._outward.wait, works, deadline)

    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        works = [self._begin(self._group.recv, part) for part in parts]
        return partial(self._inward.wait, works, deadline)

    def close(self) -> None:
        """A group whose receive is late closes its connection, which wakes up everybody else."""
        with contextlib.suppress(RuntimeError):
            self._group.recv([torch.empty(1)], self._peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))
        self._outward.close()
        self._inward.close()

    def _begin(self, operation: Callable[..., Any], memory: torch.Tensor) -> Any:
        try:
            return operation([memory], self._peer, _TAG)
        except RuntimeError as e:
            raise PipeClosedError("the pipe was closed") from e


class Nccl:
    """Only one way, as a communicator's transfers wait for each other; host memory goes by the device."""

    window = 8

    def __init__(self, store: Any, rank: int, device: torch.device, stream: Stream) -> None:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(days=365)  # its watchdog would end the process
        self._group = dist.ProcessGroupNCCL(store, rank, 2, options)
        self._peer, self._device, self._stream = 1 - rank, device, stream

    def send(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        staged = [part.to(self._device) for part in parts]
        return self._begin(self._group.send, staged, [], deadline)

    def receive(self, parts: list[torch.Tensor], deadline: float) -> Finish:
        staged = [
            part if part.device == self._device else torch.empty_like(part, device=self._device) for part in parts
        ]
        return self._begin(self._group.recv, staged, parts, deadline)

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._group.abort()

    def _begin(
        self, operation: Callable[..., Any], staged: list[torch.Tensor], parts: list[torch.Tensor], deadline: float
    ) -> Finish:
        with torch.cuda.device(self._device):
            works = [operation([part], self._peer, _TAG) for part in staged]
        return partial(self._finish, works, staged, parts, deadline)

    def _finish(self, works: list[Any], staged: list[torch.Tensor], parts: list[torch.Tensor], deadline: float) -> None:
        for work in works:
            self._wait(work, deadline)
        for part, came in zip(parts, staged, strict=False):
            if came is not part:
                part.copy_(came)

    def _wait(self, work: Any, deadline: float) -> None:
        pause, give_up = 20e-6, math.inf
        while not work.is_completed():
            if time.monotonic() >= give_up:
                raise PipeClosedError("the pipe was closed")
            if give_up == math.inf and self._stream.is_over():
                give_up = time.monotonic() + _LAST_BYTES_S
            time.sleep(min(pause, seconds_left(deadline)))
            pause = min(2 * pause, 1e-3)
        if work.exception() is not None:
            raise PipeClosedError("the pipe was closed")
