"""A store's end of one I/O process: starts it, asks it, and settles all that is open when it is gone.

Host slots that a read was filling come back when the process that filled them has been
reaped, not before.
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
from collections.abc import Callable, Iterator
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
    Message,
    Read,
    ReadCame,
    ReadEnd,
    Start,
    Started,
    Store,
    StoreDone,
)
from kvstore.io_service import CLOSE_TIMEOUT_S
from kvstore.jobs import Indices, NothingRead, ReadJob
from kvstore.slot import KeyArray, Slots

logger = logging.getLogger(__name__)

START_TIMEOUT_S: Final = 120.0
_KILL_TIMEOUT_S: Final = 10.0


class Connection:
    """One life of the I/O process."""

    def __init__(
        self, config: StoreConfig, arena: HostArena, namespace: bytes, died: Callable[[Connection], None]
    ) -> None:
        self._died = died
        self.exit_code: int | None = None
        self._lock = threading.Lock()
        self._next_id = 1
        self._waiting: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._reads: dict[int, ProcessReadJob] = {}
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
        job = ProcessReadJob(len(host_slots), deadline)
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
        sock.settimeout(START_TIMEOUT_S)
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
        except Exception:
            logger.exception("I/O process: a message of its could not be dealt with; it is killed")
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


class ProcessReadJob(ReadJob):
    """A read that the process runs; fed by the receiver thread."""

    def __init__(self, num_chunks: int, deadline: float) -> None:
        self._deadline = deadline
        self._lock = threading.Lock()
        self._open = set(range(num_chunks))  # not reported yet: the process may still write there
        self._queue: queue.SimpleQueue[tuple[int, bool] | None] = queue.SimpleQueue()
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
            if release is None:
                good = set() if message.late else {i for i, ok in zip(message.indices, message.ok, strict=True) if ok}
                for i in indices:
                    self._queue.put((i, i in good))
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
            yield reported

    def abandon(self, release: Callable[[Indices], None]) -> None:
        with self._lock:
            self._release = release
            unread: Indices = []
            while not self._queue.empty():
                reported = self._queue.get()
                unread += [] if reported is None else [reported[0]]
        if unread:
            release(unread)
