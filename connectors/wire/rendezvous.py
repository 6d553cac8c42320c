"""Who connects to whom: listening sockets, and the token that tells the peer from strangers."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import select
import socket
import time
from typing import Any, Final

from connectors.pipe import PipeClosedError, PipeProtocolError, PipeTimeoutError
from connectors.wire.stream import seconds_left
from kvstore.errors import ConfigError

TOKEN_NBYTES: Final = 32
MOST_STRANGERS: Final = 16
_BUFFER_NBYTES: Final = 4 << 20  # the kernel gives what net.core.*mem_max allows
_STRANGER_S: Final = 2.0


class Strangers:
    """Connections that have not shown the token yet: some, and for a short while."""

    def __init__(self, listener: socket.socket, magic: bytes, token: bytes) -> None:
        self._listener, self._magic, self._token = listener, magic, token
        self._open: dict[int, tuple[socket.socket, bytearray, float]] = {}  # by fd, the oldest first
        self._poll = select.poll()
        self._listener_fd = listener.fileno()
        if self._listener_fd < 0:
            raise PipeClosedError("the end was closed")
        self._poll.register(listener, select.POLLIN)

    def __enter__(self) -> Strangers:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in list(self._open):
            self._drop(fd).close()

    def wait(self, deadline: float) -> list[tuple[socket.socket, bytes]]:
        """Some that have shown it now, and the byte that says what for."""
        ends = [deadline, *[end for _, _, end in self._open.values()]]
        ready = self._poll.poll(max(0.0, min(ends) - time.monotonic()) * 1000)
        known = [come for fd, _ in ready if fd != self._listener_fd and (come := self._read(fd)) is not None]
        if any(fd == self._listener_fd for fd, _ in ready):
            try:
                self._take()
            except PipeClosedError:
                for sock, _ in known:
                    sock.close()
                raise
        now = time.monotonic()
        if not known and now >= deadline:
            raise PipeTimeoutError("the peer has not come")
        for fd in [fd for fd, (_, _, end) in self._open.items() if end <= now]:
            self._drop(fd).close()
        return known

    def _take(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as e:
            if e.errno in (errno.EBADF, errno.EINVAL):
                raise PipeClosedError("the end was closed") from e
            return  # gone before it was taken
        sock.setblocking(False)
        if len(self._open) >= MOST_STRANGERS:
            self._drop(next(iter(self._open))).close()
        self._open[sock.fileno()] = sock, bytearray(), time.monotonic() + _STRANGER_S
        self._poll.register(sock, select.POLLIN)

    def _read(self, fd: int) -> tuple[socket.socket, bytes] | None:
        if fd not in self._open:  # dropped in this round
            return None
        sock, shown, _ = self._open[fd]
        need = len(self._magic) + 1 + len(self._token)
        try:
            more = sock.recv(need - len(shown))
        except BlockingIOError:
            return None
        except OSError:
            more = b""
        shown += more
        if more and len(shown) < need:
            return None
        self._drop(fd)
        magic, role, token = shown[: len(self._magic)], shown[len(self._magic)], shown[len(self._magic) + 1 :]
        if more and hmac.compare_digest(token, self._token) and magic == self._magic:
            return sock, bytes([role])
        sock.close()
        return None

    def _drop(self, fd: int) -> socket.socket:
        self._poll.unregister(fd)
        return self._open.pop(fd)[0]


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(_resolve(address)[1][0]).is_loopback


def listen_on(address: str, backlog: int) -> socket.socket:
    """A listening socket on a port that is free; raises ConfigError where there is no such address here."""
    family, where = _resolve(address)
    if ipaddress.ip_address(where[0]).is_unspecified:
        raise ConfigError(f"listen: got {address!r}; give the one address that the peer reaches this host by")
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _enlarge(sock)  # what it accepts has the same
        sock.bind(where)
        sock.listen(backlog)
        sock.setblocking(False)
    except OSError as e:
        sock.close()
        raise ConfigError(f"listen: {address!r} is no address of this host: {e}") from e
    return sock


def _resolve(address: str) -> tuple[socket.AddressFamily, Any]:
    try:
        family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise ConfigError(f"listen: {address!r} is no address: {e}") from e
    return family, where


def connect_to(host: str, port: int, deadline: float) -> socket.socket:
    """Raises PipeProtocolError, PipeClosedError where nobody listens there, PipeTimeoutError."""
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError as e:
        raise PipeProtocolError(f"the hello has no address: {host[:64]!r}") from e
    if not 0 < port < 1 << 16:
        raise PipeProtocolError(f"the hello has no port: {port}")
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        _enlarge(sock)
        sock.settimeout(seconds_left(deadline))
        sock.connect((host, port))
    except TimeoutError as e:
        sock.close()
        raise PipeTimeoutError("the peer has not come") from e
    except OSError as e:
        sock.close()
        raise PipeClosedError(f"the peer does not listen any more: {e.strerror}") from e
    return sock


def _enlarge(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_NBYTES)
