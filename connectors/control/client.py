"""The end that asks."""

from __future__ import annotations

import contextlib
import logging
import queue
import time
from collections.abc import Callable
from enum import Enum
from typing import Any, Final

import msgspec

from connectors.control.end import (
    BATCH,
    MAX_ASKS,
    MAX_FRAME_NBYTES,
    MAX_TIMEOUT_S,
    NUMBER_NBYTES,
    QUEUED_REQUESTS,
    TIMEOUT_NBYTES,
    ControlClosedError,
    ControlError,
    ControlRefusedError,
    ControlTimeoutError,
    End,
    Refused,
    bounded_decoder,
    checked_address,
)
from connectors.curve_keys import CurveKeys, is_key
from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

CONNECT_S: Final = 5.0  # a peer that cannot be reached for so long is not waited for
_RECONNECT_MS: Final = 50
_RECONNECT_MAX_MS: Final = 1000


class _PeerState(Enum):
    NOT_YET = "not yet connected"
    NO_HANDSHAKE = "connected, but its keys and ours are not accepted: does each end know the other's public key?"
    HERE = "connected"
    GONE = "gone"


class ControlClient(End):
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
        connect_to, ipv6 = checked_address("address", address, keys)
        if (keys is None) != (server_key is None):
            raise ConfigError("server_key: give it with keys, and only then: it is the server's public key")
        if server_key is not None and not is_key(server_key):
            raise ConfigError(f"server_key: {server_key!r} is no key; give what is in the server's public.key")
        self._address, self._connect_to = address, connect_to
        self._decoder = bounded_decoder(messages | Refused)
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
            self._dealer.sndhwm = self._dealer.rcvhwm = QUEUED_REQUESTS
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
            ControlTimeoutError: none came in time, or no connection in `CONNECT_S`; what comes later is dropped.
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
        begun, waits_s = time.monotonic(), (min(timeout_s, CONNECT_S), timeout_s)
        try:
            for wait_s in waits_s:
                with contextlib.suppress(queue.Empty):
                    answer = answers.get(timeout=max(0.0, begun + wait_s - time.monotonic()))
                    break
                if wait_s == timeout_s or self._state is not _PeerState.HERE:
                    raise ControlTimeoutError(f"no answer from {self._address} in {wait_s:g} s{self._why()}")
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
        for _ in range(BATCH):
            frames = self._receive(self._dealer, 2)
            if frames is None:
                return
            if len(frames) != 2 or len(frames[0]) != NUMBER_NBYTES:
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
            head = [number.to_bytes(NUMBER_NBYTES, "little"), left_ms.to_bytes(TIMEOUT_NBYTES, "little")]
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
