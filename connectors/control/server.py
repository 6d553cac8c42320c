"""The end that answers."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
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
    ControlError,
    ControlRefusedError,
    End,
    Handle,
    Peer,
    Refused,
    bounded_decoder,
    checked_address,
)
from connectors.curve_keys import CurveKeys, key_bytes
from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

_NO_NUMBER: Final = bytes(NUMBER_NBYTES)  # answers what had none; clients count from 1
_LOG_EVERY_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class _Asker:
    route: bytes
    number: bytes
    nbytes: int
    deadline: float


class ControlServer(End):
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
        bind_to, ipv6 = checked_address("listen", listen, keys)
        if keys is not None and not keys.peers:
            raise ConfigError("keys: nobody would be let in; put the peers' public keys into the folder peers/")
        self._handle, self._keys, self._max_in_flight = handle, keys, max_in_flight
        self._decoder = bounded_decoder(messages)
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
            self._router.rcvhwm, self._router.sndhwm = QUEUED_REQUESTS, MAX_ASKS
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
            for _ in range(BATCH):
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
        number = frames[1].bytes if len(frames) > 1 and len(frames[1]) == NUMBER_NBYTES else _NO_NUMBER
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
        if len(number) != NUMBER_NBYTES or len(timeout) != TIMEOUT_NBYTES or len(body) > self._max_frame_nbytes:
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
