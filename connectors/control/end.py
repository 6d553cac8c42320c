"""What both ends of a control channel have: a thread that owns the sockets, their options, and what is refused."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Annotated, Any, Final, Self

import msgspec

from connectors.curve_keys import CurveKeys
from kvstore.errors import ConfigError, KVStoreError, MissingExtraError

logger = logging.getLogger(__name__)

MAX_FRAME_NBYTES: Final = 1 << 20
MAX_ASKS: Final = 1024  # in flight, of one client; a server queues as many answers for each
MAX_TIMEOUT_S: Final = 3600.0
MAX_REASON_NCHARS: Final = 256
NUMBER_NBYTES: Final = 8
TIMEOUT_NBYTES: Final = 4
_CURVE_NBYTES: Final = 64  # more than CURVE adds to a frame
QUEUED_REQUESTS: Final = 64  # of one peer, in ZeroMQ; then TCP holds it up
BATCH: Final = 64
_HEARTBEAT_MS: Final = 2000
_GONE_AFTER_MS: Final = 6000
_HANDSHAKE_MS: Final = 5000
_JOIN_TIMEOUT_S: Final = 10.0
_ADDRESS: Final = re.compile(r"tcp://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.*_-]+):([0-9]{1,5})")


class ControlError(KVStoreError):
    """A request could not be made, or what came is no answer."""


class ControlTimeoutError(ControlError, TimeoutError):
    """The deadline has passed; the request may have been carried out."""


class ControlClosedError(ControlError):
    """This end was closed, or the peer is gone; the request may have been carried out."""


class ControlRefusedError(ControlError):
    """The peer refuses. A handler raises it to say why, in words that tell nothing of what is stored."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason[:MAX_REASON_NCHARS]


class Refused(msgspec.Struct, frozen=True, tag="control.refused", forbid_unknown_fields=True):
    """Answers a request that is not carried out."""

    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON_NCHARS)]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who asks.

    Attributes:
        id: the public key it has proved to hold; without keys a name of its connection, which proves nothing.
    """

    id: str


Handle = Callable[[Peer, Any], "msgspec.Struct | Future[Any]"]


def make_key_pair() -> tuple[str, str]:
    """A new public and secret key, in Z85; raises MissingExtraError."""
    public, secret = import_zmq().curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


class End(ABC):
    """One end: a thread that owns the sockets, a way to wake it, and its end."""

    def __init__(self, name: str) -> None:
        self._zmq = import_zmq()
        self._name = name
        self._problem = ""
        self._lock = threading.Lock()
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # -1: the thread has ended
        self._context = self._zmq.Context()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def problem(self) -> str:
        """What the thread died of; empty where it has not."""
        return self._problem

    def close(self) -> None:
        """End the thread and close the sockets. May be called twice, and by any thread."""
        with self._lock:
            self._closing = True
            self._wake()
        if self._thread is threading.current_thread():
            return
        self._thread.join(_JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("%s does not end: a handler has not returned for %g s", self._name, _JOIN_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @abstractmethod
    def _serve(self) -> None:
        """The thread, until ``_closing``."""

    @abstractmethod
    def _settle(self) -> None:
        """The thread has ended: answer all that is open."""

    def _run(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self._problem = type(e).__name__
            logger.exception("%s has died", self._name)
        finally:
            try:
                self._release()
            finally:
                self._settle()

    def _release(self) -> None:
        with self._lock:
            fd, self._wake_fd = self._wake_fd, -1
            os.close(fd)
        self._context.destroy(linger=0)

    @contextlib.contextmanager
    def _opening(self, setting: str, address: str) -> Iterator[None]:
        """Around what opens sockets: all is released where that fails."""
        try:
            yield
        except self._zmq.ZMQError as e:
            self._release()
            raise ConfigError(f"{setting}: {address} cannot be used ({e.strerror})") from e
        except BaseException:
            self._release()
            raise

    def _socket(self, kind: int, max_frame_nbytes: int, keys: CurveKeys | None, *, ipv6: bool) -> Any:
        zmq = self._zmq
        made = self._context.socket(kind)
        made.linger = 0
        made.ipv6 = ipv6
        made.maxmsgsize = max_frame_nbytes + (_CURVE_NBYTES if keys is not None else 0)
        made.heartbeat_ivl, made.heartbeat_timeout, made.heartbeat_ttl = _HEARTBEAT_MS, _GONE_AFTER_MS, _GONE_AFTER_MS
        made.handshake_ivl = _HANDSHAKE_MS
        if keys is not None:
            if not zmq.has("curve"):
                raise ConfigError("keys: this build of ZeroMQ has no CURVE; install pyzmq from a wheel")
            if zmq.curve_public(keys.secret.encode()) != keys.public.encode():
                raise ConfigError("keys: public.key does not belong to secret.key; copy it back, or make new ones")
            made.curve_publickey, made.curve_secretkey = keys.public.encode(), keys.secret.encode()
        return made

    def _receive(self, socket: Any, most: int) -> list[Any] | None:
        """One message: its frames, of which more than ``most + 1`` are dropped. None: nothing has come."""
        try:
            last = socket.recv(self._zmq.NOBLOCK, copy=False)
        except self._zmq.Again:
            return None
        frames = [last]
        while last.more:
            last = socket.recv(copy=False)
            if len(frames) <= most:
                frames.append(last)
        return frames

    def _wake(self) -> None:
        """Called with the lock held."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _wakes_taken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)


def checked_address(setting: str, address: str, keys: CurveKeys | None) -> tuple[str, bool]:
    """The address for ZeroMQ, and whether it is IPv6."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match[2]) > 65535:
        raise ConfigError(f"{setting}: {address!r} is no address; give tcp://HOST:PORT")
    host = "127.0.0.1" if match[1] == "localhost" else match[1]
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
        is_loopback, ipv6 = ip.is_loopback, ip.version == 6
    except ValueError:  # a name: nobody knows where it leads
        is_loopback = ipv6 = False
    if keys is None and not is_loopback:
        raise ConfigError(
            f"{setting}: {address} is not loopback, and without keys nobody knows who is at the other end; "
            "give an address like tcp://127.0.0.1:0, or keys made with: kvstore keygen FOLDER"
        )
    return f"tcp://{host}:{match[2]}", ipv6


def bounded_decoder(messages: Any) -> msgspec.msgpack.Decoder[Any]:
    """A strict decoder; raises TypeError where a length in the messages is not bounded."""
    _check_bounded(msgspec.inspect.type_info(messages), str(messages), set())
    return msgspec.msgpack.Decoder(messages)


def _check_bounded(info: msgspec.inspect.Type, path: str, seen: set[int]) -> None:
    if id(info) in seen:  # a type within itself
        return
    seen.add(id(info))
    if isinstance(info, msgspec.inspect.AnyType) or getattr(info, "max_length", 0) is None:
        raise TypeError(f"{path}: give it a type with msgspec.Meta(max_length=...)")
    for name in info.__struct_fields__:
        value = getattr(info, name)
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, msgspec.inspect.Field):
                _check_bounded(part.type, f"{path}.{part.name}", seen)
            elif isinstance(part, msgspec.inspect.Type):
                _check_bounded(part, path, seen)


def import_zmq() -> ModuleType:
    try:
        import zmq
    except ImportError as e:
        raise MissingExtraError("pyzmq", "p2p") from e
    return zmq
