"""Sockets with deadlines."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from typing import Final

from connectors.pipe import PipeClosedError, PipeTimeoutError

_IOV_MAX: Final = 1024
_AT_ONCE_NBYTES: Final = 384 << 10  # a call that sends more keeps acknowledgements waiting, and is a third slower
_WAITALL: Final = int(socket.MSG_WAITALL)  # or-ed for each part: an enum's `|` is a call
_KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 15), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))  # seconds, tries
_TIMEVAL: Final = struct.Struct("@ll")  # seconds, microseconds


def seconds_left(deadline: float) -> float:
    """Raises PipeTimeoutError where none are."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise PipeTimeoutError("the deadline has passed")
    return left


class Stream:
    """A socket with deadlines; one thread at a time sends and receives, any may close."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)  # with deadlines of the kernel's, which then needs no other call to wait
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that is gone says nothing
        for option, value in _KEEPALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
        self._sock = sock
        self._in_use = threading.Lock()  # the socket is not closed below a thread that waits on it

    def send(self, parts: list[memoryview], deadline: float) -> None:
        """All of these, which are used up."""
        first = _skip(parts, 0, 0)
        with self._in_use:
            while first < len(parts):
                try:
                    n = self._sock.sendmsg(_head(parts, first), [], self._flags(socket.SO_SNDTIMEO, deadline))
                except BlockingIOError:
                    raise PipeTimeoutError("the deadline has passed") from None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e
                first = _skip(parts, first, n)

    def receive(self, parts: list[memoryview], deadline: float) -> None:
        """Fill all of these, which are used up."""
        first = _skip(parts, 0, 0)
        with self._in_use:
            while first < len(parts):
                try:
                    flags = self._flags(socket.SO_RCVTIMEO, deadline) | _WAITALL
                    n = self._sock.recvmsg_into(parts[first : first + _IOV_MAX], 0, flags)[0]
                except BlockingIOError:
                    raise PipeTimeoutError("the deadline has passed") from None
                except OSError as e:
                    raise PipeClosedError(f"the pipe was closed: {e.strerror}") from e
                if n == 0:
                    raise PipeClosedError("the pipe was closed")
                first = _skip(parts, first, n)

    def is_over(self) -> bool:
        """Whether either end has closed it; what has come before may not have been received."""
        if not self._in_use.acquire(blocking=False):
            return False  # who waits on it is told
        try:
            if self._sock.fileno() < 0:
                return True
            poll = select.poll()
            poll.register(self._sock, select.POLLRDHUP)
            return bool(poll.poll(0))
        finally:
            self._in_use.release()

    def is_readable(self, wait_s: float = 0.0) -> bool:
        """Whether something comes, of which an end is one."""
        try:
            self.wait_readable(time.monotonic() + wait_s)
        except PipeTimeoutError:
            return False
        return True

    def wait_readable(self, deadline: float) -> None:
        """Raises PipeTimeoutError where nothing comes; an end of the stream counts as something."""
        with self._in_use:
            self._wait(select.POLLIN, deadline)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes up who waits, here and at the peer
        with self._in_use:
            self._sock.close()

    def _flags(self, option: int, deadline: float) -> int:
        """Have the next call wait until then; for one that must not wait at all there is a flag."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return int(socket.MSG_DONTWAIT)
        seconds, fraction = divmod(left_s, 1)
        self._sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(int(seconds), int(fraction * 1e6) or 1))
        return 0

    def _wait(self, event: int, deadline: float) -> None:
        if self._sock.fileno() < 0:
            raise PipeClosedError("the pipe was closed")
        poll = select.poll()
        poll.register(self._sock, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise PipeTimeoutError("the deadline has passed")


def _head(parts: list[memoryview], first: int) -> list[memoryview]:
    """What is sent by one call."""
    head, left = [], _AT_ONCE_NBYTES
    for part in parts[first : first + _IOV_MAX]:
        head.append(part[:left])
        left -= len(part)
        if left <= 0:
            break
    return head


def _skip(parts: list[memoryview], first: int, nbytes: int) -> int:
    """The first part that is not all done after so many more bytes; cut to what is left of it."""
    while first < len(parts) and nbytes >= len(parts[first]):
        nbytes -= len(parts[first])
        first += 1
    if nbytes:
        parts[first] = parts[first][nbytes:]
    return first
