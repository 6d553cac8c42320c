"""Small questions and answers between two hosts: which keys, which slots, hellos of pipes. Never KV.

    ask ── ControlClient ── DEALER ════ CURVE, TCP ════ ROUTER ── ControlServer ── handle

Each end has one thread that owns its sockets; the server's also runs ``handle``. A request is
three frames: a number (uint64), how long its asker waits (uint32, ms), a message in msgpack. An
answer is two: the number, a message. Integers are little-endian. Frames are bounded before they
are stored, messages by their types before memory is allocated for them. With keys
(`connectors.curve_keys`) both ends prove who they are and all is encrypted; without, only
loopback is spoken to.

What ZeroMQ does not bound is the number of frames of one message: whoever was let in (without keys:
any process of this host) can fill memory with one that never ends. When one ends, what is too many is dropped.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import queue
import re
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from functools import partial
from types import ModuleType, TracebackType
from typing import Annotated, Any, Final, Self

import msgspec

from connectors.curve_keys import CurveKeys, is_key, key_bytes
from kvstore.errors import ConfigError, KVStoreError, MissingExtraError

logger = logging.getLogger(__name__)

MAX_FRAME_NBYTES: Final = 1 << 20
MAX_ASKS: Final = 1024  # in flight, of one client; a server queues as many answers for each
MAX_TIMEOUT_S: Final = 3600.0
MAX_REASON_NCHARS: Final = 256

_NUMBER_NBYTES: Final = 8
_TIMEOUT_NBYTES: Final = 4
_NO_NUMBER: Final = bytes(_NUMBER_NBYTES)  # answers what had none; clients count from 1
_CURVE_NBYTES: Final = 64  # more than CURVE adds to a frame
_QUEUED_REQUESTS: Final = 64  # of one peer, in ZeroMQ; then TCP holds it up
_BATCH: Final = 64
_HEARTBEAT_MS: Final = 2000
_GONE_AFTER_MS: Final = 6000
_HANDSHAKE_MS: Final = 5000
_RECONNECT_MS: Final = 50
_RECONNECT_MAX_MS: Final = 1000
_JOIN_TIMEOUT_S: Final = 10.0
_LOG_EVERY_S: Final = 10.0
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
    public, secret = _import_zmq().curve_keypair()
    return public.decode("ascii"), secret.decode("ascii")


class _End(ABC):
    """One end: a thread that owns the sockets, a way to wake it, and its end."""

    def __init__(self, name: str) -> None:
        self._zmq = _import_zmq()
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


@dataclass(frozen=True, slots=True)
class _Asker:
    route: bytes
    number: bytes
    nbytes: int
    deadline: float


class ControlServer(_End):
    """Answers requests with what ``handle`` returns.

    Args:
        listen: ``tcp://127.0.0.1:0``; a port of 0 takes a free one. Other than loopback needs ``keys``.
        handle: called by this object's thread, so quick: it returns an answer, or a future of one that is
            sent when it is done. Raises `ControlRefusedError` to refuse; of any other error the peer
            learns only that there was one.
        messages: requests: a type or union of tagged msgspec structs, all lengths in them bounded.
        keys: only these ``peers`` are let in; others are told nothing.
        max_in_flight: futures that are not done. With so many, requests are refused before they are
            handled. A future is given up at its asker's deadline, and counts until it is done.
    Raises:
        ConfigError: ``listen`` is no such address, is taken, or needs keys; or the keys are no pair, or
            without peers.
        TypeError: ``messages`` are not bounded.
        MissingExtraError: pyzmq is not installed.
    """

    def __init__(
        self,
        listen: str,
        handle: Handle,
        *,
        messages: Any,
        keys: CurveKeys | None,
        max_frame_nbytes: int = MAX_FRAME_NBYTES,
        max_in_flight: int = 256,
    ) -> None:
        bind_to, ipv6 = _checked_address("listen", listen, keys)
        if keys is not None and not keys.peers:
            raise ConfigError("keys: nobody would be let in; put the peers' public keys into the folder peers/")
        self._handle, self._keys, self._max_in_flight = handle, keys, max_in_flight
        self._decoder = _bounded_decoder(messages)
        self._max_frame_nbytes = max_frame_nbytes
        self._peers = {} if keys is None else {key_bytes(key): key for key in keys.peers.values()}
        self._futures: dict[int, tuple[Future[Any], _Asker]] = {}
        self._late: set[int] = set()  # of the futures, those that were given up
        self._num_futures = 0
        self._done: deque[int] = deque()
        self._log = _RareLog()
        super().__init__("kvstore-control")
        zmq = self._zmq
        with self._opening("listen", listen):
            self._router = self._socket(zmq.ROUTER, max_frame_nbytes, keys, ipv6=ipv6)
            self._router.rcvhwm, self._router.sndhwm = _QUEUED_REQUESTS, MAX_ASKS
            self._zap = self._context.socket(zmq.REP)  # is asked about public keys
            self._zap.bind("inproc://zeromq.zap.01")
            if keys is not None:
                self._router.curve_server = True
                self._router.zap_domain = b"kvstore"
                self._router.zap_enforce_domain = True
            self._router.bind(bind_to)
            self._address: str = self._router.last_endpoint.decode("ascii")
        logger.info("control channel listens at %s, %s keys", self._address, "without" if keys is None else "with")
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, with the real port; raises ControlError where its thread has died."""
        if self._problem:
            raise ControlError(f"the control channel at {self._address} has died of {self._problem}")
        return self._address

    @property
    def counts(self) -> dict[str, int]:
        """What went wrong, by kind, since the start."""
        return dict(self._log.counts)

    # -- the thread

    def _serve(self) -> None:
        poller = self._zmq.Poller()
        for what in (self._router, self._zap, self._wake_fd):
            poller.register(what, self._zmq.POLLIN)
        while not self._closing:
            poller.poll(self._next_deadline_ms())
            self._wakes_taken()
            self._let_peers_in()
            self._answer_done()
            self._give_up_late()
            for _ in range(_BATCH):
                frames = self._receive(self._router, 4)
                if frames is None:
                    break
                self._take(frames)

    def _settle(self) -> None:
        for future, _ in list(self._futures.values()):
            future.cancel()

    def _let_peers_in(self) -> None:
        """Answer ZeroMQ's questions about public keys (ZAP, RFC 27)."""
        while (frames := self._receive(self._zap, 8)) is not None:
            _, number, _, _, _, mechanism, *credentials = (frame.bytes for frame in frames)
            known = self._peers.get(credentials[0]) if mechanism == b"CURVE" and len(credentials) == 1 else None
            if known is None:
                self._log("unknown_peers", "a peer whose key is not among ours was turned away")
            # 300 and not 400: the connection is closed without a word
            status, user = (b"300", b"") if known is None else (b"200", known.encode("ascii"))
            self._zap.send_multipart([b"1.0", number, status, b"", user, b""])

    def _take(self, frames: list[Any]) -> None:
        peer = self._peer_of(frames[0].bytes, frames[-1])
        if peer is None:
            self._log("malformed", "a message of unknown origin was dropped")
            return
        number = frames[1].bytes if len(frames) > 1 and len(frames[1]) == _NUMBER_NBYTES else _NO_NUMBER
        asker = _Asker(frames[0].bytes, number, sum(map(len, frames[1:])), 0.0)
        try:
            timeout_s, request = self._parse(frames)
        except Exception as e:  # of msgspec: DecodeError, but UnicodeDecodeError and RecursionError too
            self._refuse(asker, "malformed", "malformed request", e)
            return
        if len(self._futures) >= self._max_in_flight:
            self._refuse(asker, "busy", "too many requests in flight")
            return
        asker = _Asker(asker.route, asker.number, asker.nbytes, time.monotonic() + timeout_s)
        self._answer(asker, partial(self._handle, peer, request))

    def _peer_of(self, route: bytes, frame: Any) -> Peer | None:
        if route[:1] != b"\0":  # chosen by the peer, who could choose another's
            return None
        if self._keys is None:
            return Peer(route.hex())
        try:
            return Peer(str(frame.get("User-Id")))
        except self._zmq.ZMQError:
            return None

    def _parse(self, frames: list[Any]) -> tuple[float, Any]:
        _, number, timeout, body = frames
        if len(number) != _NUMBER_NBYTES or len(timeout) != _TIMEOUT_NBYTES or len(body) > self._max_frame_nbytes:
            raise ControlError("frames of wrong sizes")
        timeout_s = int.from_bytes(timeout.bytes, "little") / 1000
        return min(timeout_s, MAX_TIMEOUT_S), self._decoder.decode(body.buffer)

    def _answer(self, asker: _Asker, produce: Callable[[], Any]) -> None:
        """Send what it returns, or that it raises; what is a future, later."""
        try:
            answer = produce()
            if isinstance(answer, Future):
                self._wait_for(asker, answer)
                return
            body = msgspec.msgpack.encode(answer)
        except ControlRefusedError as e:
            self._send(asker, msgspec.msgpack.encode(Refused(e.reason)))
        except Exception as e:
            self._refuse(asker, "failed", "the request failed", e)
        else:
            if len(body) > self._max_frame_nbytes:
                self._refuse(asker, "failed", "the answer is too large")
            else:
                self._send(asker, body)

    def _wait_for(self, asker: _Asker, future: Future[Any]) -> None:
        self._num_futures += 1
        self._futures[self._num_futures] = (future, asker)
        future.add_done_callback(partial(self._is_done, self._num_futures))

    def _is_done(self, which: int, _: Future[Any]) -> None:
        """Called by whichever thread has done it."""
        self._done.append(which)
        with self._lock:
            self._wake()

    def _answer_done(self) -> None:
        while self._done:
            which = self._done.popleft()
            future, asker = self._futures.pop(which)
            if which in self._late:
                self._late.discard(which)
            else:
                self._answer(asker, future.result)

    def _give_up_late(self) -> None:
        now = time.monotonic()
        late = [w for w, (_, asker) in self._futures.items() if w not in self._late and asker.deadline <= now]
        for which in late:
            future, asker = self._futures[which]
            self._late.add(which)
            self._log("late", f"a request took too long ({asker.nbytes} bytes)")  # who asked knows it
            future.cancel()

    def _next_deadline_ms(self) -> float | None:
        deadlines = [asker.deadline for which, (_, asker) in self._futures.items() if which not in self._late]
        return max(0.0, min(deadlines) - time.monotonic()) * 1000 + 1 if deadlines else None

    def _refuse(self, asker: _Asker, kind: str, reason: str, error: Exception | None = None) -> None:
        self._log(kind, f"{reason} ({asker.nbytes} bytes{'' if error is None else ', ' + _where(error)})")
        self._send(asker, msgspec.msgpack.encode(Refused(reason)))

    def _send(self, asker: _Asker, body: bytes) -> None:
        """To whoever is still there: a ROUTER drops what is for a peer that is gone, or does not read."""
        self._router.send_multipart([asker.route, asker.number, body], self._zmq.NOBLOCK)


class _PeerState(Enum):
    NOT_YET = "not yet connected"
    NO_HANDSHAKE = "connected, but its keys and ours are not accepted: does each end know the other's public key?"
    HERE = "connected"
    GONE = "gone"


class ControlClient(_End):
    """Asks a `ControlServer`; any number of threads at a time.

    It connects, and connects again, by itself. Until it has first connected, asks wait for it; when a
    peer that was there is gone they fail at once, those in flight and, until it is back, those that
    are new. A peer that dies is noticed when its connection breaks, one that hangs or is cut off after
    at most 8 s without a heartbeat. Heartbeats are answered by ZeroMQ itself: against a handler that
    hangs only the deadline helps.

    Args:
        address: ``tcp://host:port``; other than loopback needs keys.
        messages: answers: a type or union of tagged msgspec structs, all lengths in them bounded.
        keys, server_key: this end's keys, and the public key that the server must prove to hold
            (such as ``keys.peers["prefill"]``). Both or neither.
    Raises:
        ConfigError: ``address`` is none, or needs keys; or the keys are no pair.
        TypeError: ``messages`` are not bounded.
        MissingExtraError: pyzmq is not installed.
    """

    def __init__(
        self,
        address: str,
        *,
        messages: Any,
        keys: CurveKeys | None,
        server_key: str | None,
        max_frame_nbytes: int = MAX_FRAME_NBYTES,
        max_in_flight: int = MAX_ASKS,
    ) -> None:
        connect_to, ipv6 = _checked_address("address", address, keys)
        if (keys is None) != (server_key is None):
            raise ConfigError("server_key: give it with keys, and only then: it is the server's public key")
        if server_key is not None and not is_key(server_key):
            raise ConfigError(f"server_key: {server_key!r} is no key; give what is in the server's public.key")
        self._address, self._connect_to = address, connect_to
        self._decoder = _bounded_decoder(messages | Refused)
        self._max_frame_nbytes, self._max_in_flight = max_frame_nbytes, min(max_in_flight, MAX_ASKS)
        self._state = _PeerState.NOT_YET
        self._reconnect_at: float | None = None
        self._num_asks = 0
        self._waiting: dict[int, queue.SimpleQueue[bytes | ControlError]] = {}
        self._unsent: dict[int, tuple[bytes, float]] = {}  # of those that wait: body, deadline
        super().__init__("kvstore-control-client")
        zmq = self._zmq
        with self._opening("address", address):
            self._dealer = self._socket(zmq.DEALER, max_frame_nbytes, keys, ipv6=ipv6)
            self._dealer.sndhwm = self._dealer.rcvhwm = _QUEUED_REQUESTS
            self._dealer.immediate = True  # nothing is queued for a peer that is not there
            self._dealer.reconnect_ivl, self._dealer.reconnect_ivl_max = _RECONNECT_MS, _RECONNECT_MAX_MS
            if server_key is not None:
                self._dealer.curve_serverkey = server_key.encode("ascii")
            retries = zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECT_DELAYED
            events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | retries
            self._monitor = self._dealer.get_monitor_socket(events)
            self._dealer.connect(connect_to)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the peer is connected, and was heard of lately."""
        return self._state is _PeerState.HERE and not self._closing and not self._problem

    def ask(self, request: msgspec.Struct, timeout_s: float) -> Any:
        """Send a request and wait for its answer; one of ``messages``.

        Raises:
            ControlTimeoutError: none came in time; what comes later is dropped.
            ControlClosedError: this end was closed, or the peer is gone.
            ControlRefusedError: the peer refuses; it has not begun to carry the request out, unless its
                reason says that it failed, or is the handler's.
            ControlError: too large, too many in flight, or what came is no answer.
        """
        if not 0 <= timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s is {timeout_s}; it must be 0 to {MAX_TIMEOUT_S:g}")
        body = msgspec.msgpack.encode(request)
        if len(body) > self._max_frame_nbytes:
            raise ControlError(f"a request of {len(body)} bytes is over {self._max_frame_nbytes}")
        answers: queue.SimpleQueue[bytes | ControlError] = queue.SimpleQueue()
        number = self._enqueue(body, time.monotonic() + timeout_s, answers)
        try:
            answer = answers.get(timeout=timeout_s)
        except queue.Empty:
            raise ControlTimeoutError(f"no answer from {self._address} in {timeout_s:g} s{self._why()}") from None
        finally:
            with self._lock:
                self._waiting.pop(number, None)
                self._unsent.pop(number, None)
        if isinstance(answer, ControlError):
            raise answer
        return self._decode(answer)

    def _enqueue(self, body: bytes, deadline: float, answers: queue.SimpleQueue[bytes | ControlError]) -> int:
        with self._lock:
            error = self._not_open()
            if error is not None:
                raise error
            if self._state is _PeerState.GONE:
                raise ControlClosedError(f"peer is gone: {self._address}")
            if len(self._waiting) >= self._max_in_flight:
                raise ControlError(f"{len(self._waiting)} requests are in flight to {self._address}; no more are taken")
            self._num_asks += 1
            self._waiting[self._num_asks] = answers
            self._unsent[self._num_asks] = (body, deadline)
            self._wake()
            return self._num_asks

    def _decode(self, data: bytes) -> Any:
        try:
            answer = self._decoder.decode(data)
        except Exception as e:
            raise ControlError(f"{self._address} sent what is no answer ({type(e).__name__})") from None
        if isinstance(answer, Refused):
            raise ControlRefusedError(answer.reason)
        return answer

    def _not_open(self) -> ControlError | None:
        if self._problem:
            return ControlError(f"the control channel to {self._address} has died of {self._problem}")
        return ControlClosedError(f"the control channel to {self._address} was closed") if self._closing else None

    def _why(self) -> str:
        return "" if self._state is _PeerState.HERE else f" ({self._state.value})"

    # -- the thread

    def _serve(self) -> None:
        zmq = self._zmq
        poller = zmq.Poller()
        poller.register(self._wake_fd, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        wanted = zmq.POLLIN
        while not self._closing:
            poller.register(self._dealer, wanted)
            poller.poll(
                None if self._reconnect_at is None else 1000 * max(0.0, self._reconnect_at - time.monotonic()) + 1
            )
            self._wakes_taken()
            self._take_answers()
            self._watch_peer()
            self._reconnect()
            wanted = zmq.POLLIN if self._send_unsent() else zmq.POLLIN | zmq.POLLOUT

    def _settle(self) -> None:
        # `_problem` or `_closing` is set: nobody begins to wait any more
        self._fail_all(lambda: self._not_open() or ControlClosedError("closed"))

    def _take_answers(self) -> None:
        for _ in range(_BATCH):
            frames = self._receive(self._dealer, 2)
            if frames is None:
                return
            if len(frames) != 2 or len(frames[0]) != _NUMBER_NBYTES:
                continue
            with self._lock:
                answers = self._waiting.get(int.from_bytes(frames[0].bytes, "little"))
            if answers is not None:
                answers.put(frames[1].bytes)

    def _watch_peer(self) -> None:
        zmq = self._zmq
        while (frames := self._receive(self._monitor, 2)) is not None:
            event = int.from_bytes(frames[0].bytes[:2], "little")
            if event == zmq.EVENT_DISCONNECTED:
                self._reconnect_at = time.monotonic() + _RECONNECT_MAX_MS / 1000
                self._peer_is_gone()
                continue
            self._reconnect_at = None
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._state = _PeerState.HERE
                logger.info("control channel to %s is connected", self._address)
            elif event == zmq.EVENT_CONNECTED and self._state is _PeerState.NOT_YET:
                self._state = _PeerState.NO_HANDSHAKE

    def _peer_is_gone(self) -> None:
        if self._state is _PeerState.HERE:
            self._state = _PeerState.GONE
            logger.info("control channel to %s: peer is gone", self._address)
            self._fail_all(lambda: ControlClosedError(f"peer is gone: {self._address}"))

    def _reconnect(self) -> None:
        """ZeroMQ tries again by itself, but not after a peer has broken the protocol."""
        if self._reconnect_at is not None and time.monotonic() >= self._reconnect_at:
            self._reconnect_at = None
            with contextlib.suppress(self._zmq.ZMQError):
                self._dealer.disconnect(self._connect_to)
            self._dealer.connect(self._connect_to)

    def _send_unsent(self) -> bool:
        """False where ZeroMQ takes no more for now."""
        while True:
            with self._lock:
                number, (body, deadline) = next(iter(self._unsent.items()), (0, (b"", 0.0)))
            if number == 0:
                return True
            left_ms = max(0, int((deadline - time.monotonic()) * 1000))
            head = [number.to_bytes(_NUMBER_NBYTES, "little"), left_ms.to_bytes(_TIMEOUT_NBYTES, "little")]
            try:
                self._dealer.send_multipart([*head, body], self._zmq.NOBLOCK)
            except self._zmq.Again:
                return False
            with self._lock:
                self._unsent.pop(number, None)

    def _fail_all(self, error: Callable[[], ControlError]) -> None:
        with self._lock:
            waiting = list(self._waiting.values())
            self._unsent.clear()
        for answers in waiting:
            answers.put(error())


class _RareLog:
    """Counts, and logs each kind at most every 10 s: peers must not fill the log."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._logged: dict[str, tuple[float, int]] = {}

    def __call__(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        now, (then, count) = time.monotonic(), self._logged.get(kind, (0.0, 0))
        if count == 0 or now - then >= _LOG_EVERY_S:
            self._logged[kind] = (now, self.counts[kind])
            logger.warning("control channel: %s; %d of these since the last time", text, self.counts[kind] - count)


def _where(error: BaseException) -> str:
    """Of what class it is and where it was raised. Not what it says: that may be of a request."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace is not None else ""
    return type(error).__name__ + place


def _checked_address(setting: str, address: str, keys: CurveKeys | None) -> tuple[str, bool]:
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


def _bounded_decoder(messages: Any) -> msgspec.msgpack.Decoder[Any]:
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


def _import_zmq() -> ModuleType:
    try:
        import zmq
    except ImportError as e:
        raise MissingExtraError("pyzmq", "p2p") from e
    return zmq
