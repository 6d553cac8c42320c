"""A pipe's handle on its agent in NIXL's transport process."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from connectors.nixl_process.life import TransportProcess, check_installed
from connectors.nixl_process.messages import (
    FROM_PROCESS,
    MAX_MESSAGE_NBYTES,
    Failed,
    Landed,
    Meet,
    Message,
    Met,
    MoveOn,
    Open,
    Opened,
    ReadBounce,
    ReadCells,
    Rest,
    Waits,
)
from connectors.pipe import PipeClosedError, PipeError, PipeProtocolError, PipeTimeoutError

_OPEN_S: Final = 20.0  # for the process to start, and UCX in it


def _nothing() -> None:
    """What is to be done where nothing is left."""


class AgentClient:
    """An agent in the transport process. One thread at a time awaits what it answers; any may tell it, and close.

    Attributes:
        opened: what the peer must know of it.
        end: called when the process has died; by default `close`.

    Every method raises PipeClosedError where the agent has failed, or was closed.
    """

    def __init__(self, order: Open, fds: list[int], *, is_local: bool) -> None:
        """
        Args:
            fds: of the bounce memory, and of what is offered.
        Raises:
            MissingExtraError: nixl is not installed.
            PipeError: NIXL does not get going.
        """
        check_installed()
        self.end: Callable[[], None] = self.close
        self._sending, self._receiving = threading.Lock(), threading.Lock()
        self._packet = memoryview(bytearray(MAX_MESSAGE_NBYTES))
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process: TransportProcess | None = None
        try:
            with theirs:
                self._process = TransportProcess.of(self, is_local=is_local)
                self._process.open(order, [theirs.fileno(), *fds])
            self.opened = self._expect(Opened, time.monotonic() + _OPEN_S)
        except BaseException as e:
            self.close()
            if isinstance(e, PipeClosedError | PipeTimeoutError):
                raise PipeError(f"NIXL does not get going: {e}") from e
            raise

    def meet(self, peer: Meet, deadline: float) -> None:
        """Get to know the peer's agent. Raises PipeTimeoutError."""
        self._tell(peer, deadline)
        self._expect(Met, deadline)

    def read_bounce(self, nbytes: int, deadline: float) -> None:
        """Begin to read what the peer has laid into its bounce memory."""
        self._tell(ReadBounce(nbytes), deadline)

    def read_cells(self, transfers: list[tuple[bytes, bytes]], deadline: float) -> None:
        """Begin to read cells of the peer's rows into cells of the landing; see `ReadCells`."""
        self._tell(ReadCells(transfers), deadline)

    def answer(self, until: float) -> Landed | Waits | None:
        """What has become of transfers; None where nothing comes until then."""
        answer = self._receive(until)
        if answer is not None and not isinstance(answer, Landed | Waits):
            raise PipeProtocolError(f"{type(answer).__name__} came of the transport process, which was not due")
        return answer

    def move_on(self, deadline: float) -> None:
        """Have it let the peer read, until told to `rest`."""
        self._tell(MoveOn(), deadline)

    def rest(self, deadline: float) -> None:
        self._tell(Rest(), deadline)

    def close(self) -> None:
        """Wake up who waits; the agent is destroyed. Of the last one, the process has ended when this returns."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        with self._sending, self._receiving:
            self._socket.close()
            process, self._process = self._process, None
        self.end = _nothing  # a pipe and its memory go with the last reference, without a cycle
        if process is not None:
            process.release(self)

    def _tell(self, message: Message, deadline: float) -> None:
        data = msgspec.msgpack.encode(message)
        with self._sending:
            while True:
                try:
                    self._socket.send(data, socket.MSG_DONTWAIT)
                    return
                except BlockingIOError:
                    if not self._wait(select.POLLOUT, deadline):
                        raise PipeTimeoutError("the deadline has passed") from None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e

    def _expect(self, kind: type[Any], deadline: float) -> Any:
        answer = self._receive(deadline)
        if answer is None:
            raise PipeTimeoutError("the deadline has passed")
        if not isinstance(answer, kind):
            raise PipeProtocolError(f"{type(answer).__name__} came of the transport process, not {kind.__name__}")
        return answer

    def _receive(self, until: float) -> Any:
        with self._receiving:
            while True:
                try:
                    nbytes = self._socket.recv_into(self._packet, 0, socket.MSG_DONTWAIT)
                    break
                except BlockingIOError:
                    if not self._wait(select.POLLIN, until):
                        return None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e
            if not nbytes:
                raise PipeClosedError("the pipe was closed")
            answer = FROM_PROCESS.decode(self._packet[:nbytes])
        if isinstance(answer, Failed):
            raise PipeClosedError(f"the pipe was closed: {answer.error}")
        return answer

    def _wait(self, event: int, until: float) -> bool:
        poll = select.poll()
        poll.register(self._socket, event)
        return bool(poll.poll(max(0.0, until - time.monotonic()) * 1000))
