"""`ProcessIo`: the I/O service in a process of its own, started again when it dies.

While the process is down its tiers answer with misses. Host slots that a read was filling
come back when the process that filled them has been reaped, not before.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec
import numpy as np

from kvstore.arena import HostArena
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, IdentityMismatchError, KVStoreError
from kvstore.io_messages import (
    Answer,
    Call,
    Channel,
    Find,
    Found,
    Message,
    Read,
    ReadCame,
    ReadEnd,
    Start,
    Started,
    Store,
    StoreDone,
)
from kvstore.io_service import CLOSE_TIMEOUT_S, NOWHERE, IoService, Located
from kvstore.jobs import Indices, NothingRead, ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, SlotCodec, Slots
from kvstore.tiers.base import FoundChunks, TierStats
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

_START_TIMEOUT_S: Final = 120.0
_FIND_TIMEOUT_S: Final = 2.0
_CALL_TIMEOUT_S: Final = 30.0
_KILL_TIMEOUT_S: Final = 10.0


class ProcessIo(IoService):
    """Starts the process, and again with back-off after it died."""

    def __init__(self, config: StoreConfig, arena: HostArena, codec: SlotCodec, namespace: bytes) -> None:
        """Raises ConfigError as `ThreadIo` does."""
        self._config, self._arena, self._namespace = config, arena, namespace
        self._health = TierHealth("I/O process")
        self._lock = threading.Lock()
        self._closed = False
        self._num_died = 0
        self._starting: threading.Thread | None = None
        self._connection: _Connection | None = _Connection(config, arena, namespace, self._died)

    def find_prefix(self, keys: Sequence[BlockKey]) -> Located:
        connection = self._running()
        found = None if connection is None else connection.ask(Find(0, b"".join(keys)), _FIND_TIMEOUT_S)
        if not isinstance(found, Found):
            return NOWHERE
        n = len(found.num_keys)
        chunks = FoundChunks(np.arange(n), np.array(found.num_keys, dtype=np.int64), np.zeros(n, dtype=np.uint64))
        return Located((connection, found.id), chunks)

    def read(self, located: Located, host_slots: Slots, deadline: float) -> ReadJob:
        connection = self._running()
        found_by, find_id = located.source
        if connection is None or connection is not found_by:
            return NothingRead(len(located))
        return connection.read(find_id, int(located.chunks.places[0]), host_slots, deadline)

    def store(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        connection = self._running()
        if connection is None:
            on_done(host_slots)
        else:
            connection.store(host_slots, keys, namespace, on_done)

    def flush(self, deadline: float) -> bool:
        return self._call("flush", deadline=deadline) is True

    def set_namespace(self, namespace: bytes) -> None:
        with self._lock:
            self._namespace = namespace
        connection = self._running()
        if connection is not None and connection.call("set_namespace", namespace, _CALL_TIMEOUT_S) is None:
            connection.kill()  # it must not go on under the old namespace

    def purge(self, keys: Sequence[BlockKey]) -> int:
        return int(self._call("purge", b"".join(keys)) or 0)

    def stats(self) -> list[TierStats]:
        answer = self._call("stats")
        if isinstance(answer, list):
            return [TierStats(**fields) for fields in answer]
        names = [n for n in ("disk", "shared") if getattr(self._config, n) is not None]
        return [TierStats(name=name, state="off") for name in names]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connection, starting = self._connection, self._starting
        if starting is not None:
            starting.join(_START_TIMEOUT_S)
            connection = self._connection
        if connection is not None:
            connection.close()

    def _call(self, verb: str, payload: bytes = b"", *, deadline: float | None = None) -> Any:
        connection = self._running()
        if connection is None:
            return None
        timeout_s = _CALL_TIMEOUT_S if deadline is None else max(0.0, deadline - time.monotonic())
        answer = connection.call(verb, payload, timeout_s)
        return None if answer is None or answer.error else answer.value

    def _running(self) -> _Connection | None:
        """The process that runs; starts it again in the background where it is time to."""
        with self._lock:
            connection = self._connection
            if connection is None and not self._closed and self._starting is None and self._health.allow():
                self._starting = threading.Thread(target=self._restart, name="kvstore-io-restart", daemon=True)
                self._starting.start()
            return connection

    def _died(self, connection: _Connection) -> None:
        with self._lock:
            if self._closed or self._connection is not connection:
                return
            self._connection = None
            self._num_died += 1
        self._health.fail(ChildProcessError(f"ended with code {connection.exit_code}"))

    def _restart(self) -> None:
        try:
            namespace = self._namespace
            connection = _Connection(self._config, self._arena, namespace, self._died)
        except (OSError, KVStoreError) as e:
            self._health.fail(e)
            with self._lock:
                self._starting = None
            return
        with self._lock:
            self._connection, self._starting = connection, None
        self._health.recover()
        if namespace != self._namespace:
            self.set_namespace(self._namespace)


class _Connection:
    """One life of the I/O process."""

    def __init__(
        self, config: StoreConfig, arena: HostArena, namespace: bytes, died: Callable[[_Connection], None]
    ) -> None:
        self._died = died
        self.exit_code: int | None = None
        self._lock = threading.Lock()
        self._next_id = 1
        self._waiting: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._reads: dict[int, _ProcessReadJob] = {}
        self._stores: dict[int, tuple[set[int], Callable[[Slots], None]]] = {}
        self._gone = False
        if arena.fd is None:
            raise ValueError("an I/O process needs an arena that it can map")
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "kvstore.io_process", str(theirs.fileno()), str(arena.fd)],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), arena.fd),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            )
        self._channel = Channel(mine, process_side=False)
        try:
            self._handshake(mine, Start(0, config.to_dict(), namespace, len(arena.rows)))
        except BaseException:
            self._process.kill()
            self._process.wait(_KILL_TIMEOUT_S)
            self._channel.close()
            raise
        self._receiver = threading.Thread(target=self._receive, name="kvstore-io", daemon=True)
        self._receiver.start()

    def ask(self, message: Message, timeout_s: float) -> Message | None:
        """Send a question and wait for its answer; None where none came."""
        answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        with self._lock:
            if self._gone:
                return None
            number = self._number()
            self._waiting[number] = answers
        try:
            self._channel.send(msgspec.structs.replace(message, id=number))
            return answers.get(timeout=timeout_s)
        except (OSError, queue.Empty):
            return None
        finally:
            with self._lock:
                self._waiting.pop(number, None)

    def call(self, verb: str, payload: bytes, timeout_s: float) -> Answer | None:
        answer = self.ask(Call(0, verb, payload, time.monotonic() + timeout_s), timeout_s)
        return answer if isinstance(answer, Answer) else None

    def read(self, find_id: int, first: int, host_slots: Slots, deadline: float) -> ReadJob:
        """Read chunks ``first``, ... of those that an earlier `Find` has found."""
        job = _ProcessReadJob(len(host_slots), deadline)
        with self._lock:
            if self._gone:
                return NothingRead(len(host_slots))
            number = self._number()
            self._reads[number] = job
        self._send(Read(number, find_id, first, host_slots.tolist(), deadline))
        return job

    def store(self, host_slots: Slots, keys: KeyArray, namespace: bytes, on_done: Callable[[Slots], None]) -> None:
        slots = host_slots.tolist()
        with self._lock:
            gone = self._gone
            if not gone:
                number = self._number()
                self._stores[number] = (set(slots), on_done)
        if gone:
            on_done(host_slots)
        else:
            self._send(Store(number, slots, keys.tobytes(), namespace))

    def close(self) -> None:
        """Let it finish its writes; kill it where it does not."""
        self.call("close", b"", CLOSE_TIMEOUT_S + _KILL_TIMEOUT_S)
        try:
            self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._channel.shutdown()
        self._receiver.join(_KILL_TIMEOUT_S)

    def kill(self) -> None:
        self._process.kill()

    def _handshake(self, sock: socket.socket, start: Start) -> None:
        sock.settimeout(_START_TIMEOUT_S)
        self._channel.send(start)
        started = self._channel.receive()
        sock.settimeout(None)
        if not isinstance(started, Started):
            raise ConfigError(f"the I/O process did not start (exit code {self._process.poll()}); see its output above")
        if started.mismatch_path:
            raise IdentityMismatchError(started.mismatch_path, started.mismatch)
        if started.error:
            raise ConfigError(started.error)

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError:  # gone: the receiver sees it and settles all that is open
            logger.debug("the I/O process is gone")

    def _number(self) -> int:
        self._next_id += 1
        return self._next_id

    def _receive(self) -> None:
        try:
            while (message := self._channel.receive()) is not None:
                self._dispatch(message)
        except KVStoreError as e:
            logger.error("I/O process: %s; it is killed", e)
            self.kill()
        self._settle()

    def _dispatch(self, message: Any) -> None:
        match message:
            case ReadCame() | ReadEnd():
                job = self._reads.get(message.id)
                if job is not None and job.take(message):
                    with self._lock:
                        self._reads.pop(message.id, None)
            case StoreDone():
                self._stored(message)
            case _:
                answers = self._waiting.get(message.id)
                if answers is not None:
                    answers.put(message)

    def _stored(self, message: StoreDone) -> None:
        with self._lock:
            left, on_done = self._stores.get(message.id, (set(), None))
            mine = left.intersection(message.host_slots)
            left -= mine
            if not left:
                self._stores.pop(message.id, None)
        if on_done is not None and mine:
            on_done(np.fromiter(mine, dtype=np.int64))

    def _settle(self) -> None:
        """The process is gone, and with it every transfer into the arena: answer what is open."""
        try:
            self.exit_code = self._process.wait(_KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.exit_code = self._process.wait()
        with self._lock:
            self._gone = True
            waiting, reads, stores = (
                list(self._waiting.values()),
                list(self._reads.values()),
                list(self._stores.values()),
            )
            self._reads, self._stores = {}, {}
        for answers in waiting:
            answers.put(None)
        for job in reads:
            job.lost()
        for left, on_done in stores:
            on_done(np.fromiter(left, dtype=np.int64))
        self._channel.close()
        self._died(self)


class _ProcessReadJob(ReadJob):
    """A read that the process runs; fed by the receiver thread."""

    def __init__(self, num_chunks: int, deadline: float) -> None:
        self._deadline = deadline
        self._lock = threading.Lock()
        self._open = set(range(num_chunks))  # not reported yet: the process may still write there
        self._queue: queue.SimpleQueue[list[tuple[int, bool]] | None] = queue.SimpleQueue()
        self._release: Callable[[Indices], None] | None = None
        self._ended = False

    def take(self, message: ReadCame | ReadEnd) -> bool:
        """Note a report; True once nothing more can come."""
        with self._lock:
            if isinstance(message, ReadEnd):
                self._ended = True
                self._queue.put(None)
                return not self._open
            indices = [i for i in message.indices if i in self._open]
            self._open.difference_update(indices)
            release = self._release
            if release is None and not message.late:
                self._queue.put(
                    [(i, ok) for i, ok in zip(message.indices, message.ok, strict=True) if i in set(indices)]
                )
            elif release is None:
                self._queue.put([(i, False) for i in indices])
            done = self._ended and not self._open
        if release is not None and indices:
            release(indices)
        return done

    def lost(self) -> None:
        """The process is gone: nothing is being written any more."""
        self.take(ReadCame(0, sorted(self._open), [False] * len(self._open), late=True))
        self._queue.put(None)

    def __iter__(self) -> Iterator[tuple[int, bool]]:
        while True:
            try:
                reported = self._queue.get(timeout=max(0.0, self._deadline - time.monotonic()))
            except queue.Empty:
                return
            if reported is None:
                return
            yield from reported

    def abandon(self, release: Callable[[Indices], None]) -> None:
        with self._lock:
            self._release = release
            unread: Indices = []
            while not self._queue.empty():
                unread += [i for i, _ in self._queue.get() or []]
        if unread:
            release(unread)
