"""The I/O process: a `ThreadIo` over the store's arena, driven by messages.

Started by `kvstore.io_client`; ends when its store closes it or is gone. Runs apart so that
neither the interpreter lock nor a crash or hang in here reaches the engine.
"""

from __future__ import annotations

import logging
import queue
import signal
import socket
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from cachetools import LRUCache

from kvstore.arena import HostArena
from kvstore.config import StoreConfig
from kvstore.errors import IdentityMismatchError, KVStoreError
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
from kvstore.io_service import NOWHERE, Located, ThreadIo
from kvstore.jobs import NothingRead
from kvstore.keys import KEY_NBYTES, array_to_keys
from kvstore.slot import SlotCodec, SlotFormat, read_integrity_key

logger = logging.getLogger(__name__)

_COLLECTORS: Final = 4
_QUEUED_READS: Final = 1024
_FOUND_CHUNKS: Final = 1 << 20  # remembered between a find and its reads
_REPORT_NBYTES: Final = 2 << 20
_JOIN_S: Final = 5.0


def main() -> int:
    """``python -m kvstore.io_process SOCKET_FD ARENA_FD``"""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the store decides when it ends
    channel = Channel(socket.socket(fileno=int(sys.argv[1])), process_side=True)
    start = channel.receive()
    if not isinstance(start, Start):
        return 2
    try:
        process = IoProcess(channel, start, int(sys.argv[2]))
    except IdentityMismatchError as e:
        channel.send(Started(0, str(e), e.path, {k: (str(a), str(b)) for k, (a, b) in e.differences.items()}))
        return 1
    except (KVStoreError, OSError) as e:
        channel.send(Started(0, str(e)))
        return 1
    channel.send(Started(0))
    process.serve()
    return 0


class IoProcess:
    """Answers one store's messages. Reads are collected by a few threads, the rest by one."""

    def __init__(self, channel: Channel, start: Start, arena_fd: int) -> None:
        config = StoreConfig.from_dict(start.config)
        self._channel = channel
        self._fmt = SlotFormat.of(config.identity, config.blocks_per_chunk)
        self._arena = HostArena.attach(arena_fd, start.num_slots, self._fmt.slot_nbytes)
        codec = SlotCodec(self._fmt, read_integrity_key(config.integrity_key_file))
        self._io = ThreadIo(config, self._arena, codec, start.namespace)
        self._found: LRUCache[int, Located] = LRUCache(_FOUND_CHUNKS, getsizeof=len)
        self._reads: queue.Queue[tuple[Read, Located] | None] = queue.Queue(_QUEUED_READS)
        self._calls: queue.Queue[Call | None] = queue.Queue(_QUEUED_READS)
        threads = [threading.Thread(target=self._collect, daemon=True) for _ in range(_COLLECTORS)]
        self._threads = [*threads, threading.Thread(target=self._serve_calls, daemon=True)]
        for thread in self._threads:
            thread.start()

    def serve(self) -> None:
        """Answer until the store closes this process or is gone."""
        while (message := self._channel.receive()) is not None:
            match message:
                case Find():
                    self._find(message)
                case Read():
                    found = self._found.get(message.find_id, NOWHERE)
                    part = found[message.first : message.first + len(message.host_slots)]
                    self._reads.put((message, part), timeout=_JOIN_S)
                case Store():
                    self._store(message)
                case Call(verb="close"):
                    self._close()
                    self._channel.send(Answer(message.id))
                    return
                case Call():
                    self._calls.put(message, timeout=_JOIN_S)
        self._close()

    def _close(self) -> None:
        self._io.close()
        for _ in range(_COLLECTORS):
            self._reads.put(None, timeout=_JOIN_S)
        self._calls.put(None, timeout=_JOIN_S)
        for thread in self._threads:
            thread.join(_JOIN_S)

    def _find(self, message: Find) -> None:
        keys = array_to_keys(np.frombuffer(message.keys, dtype=np.uint8))
        located = self._io.find_prefix(keys)[:_FOUND_CHUNKS]
        if len(located):
            self._found[message.id] = located
        self._channel.send(Found(message.id, located.chunks.num_keys.tolist(), located.tier))

    def _store(self, message: Store) -> None:
        slots = np.asarray(message.host_slots, dtype=np.int64)
        keys = np.frombuffer(message.keys, dtype=np.uint8).reshape(len(slots), -1, KEY_NBYTES)
        self._io.store(slots, keys, message.namespace, lambda done: self._send(StoreDone(message.id, done.tolist())))

    def _collect(self) -> None:
        while (item := self._reads.get()) is not None:
            message, located = item
            try:
                self._read(message, located)
            except Exception:  # the store sees the chunks as late, never as read
                logger.exception("a read failed")
            self._send(ReadEnd(message.id))

    def _read(self, message: Read, located: Located) -> None:
        n = len(message.host_slots)
        try:
            if len(located) == n:
                job = self._io.read(located, np.asarray(message.host_slots, dtype=np.int64), message.deadline)
            else:
                job = NothingRead(n)  # what was found is forgotten
        except Exception:  # nothing was started: the store has its slots back
            logger.exception("a read could not be started")
            job = NothingRead(n)
        step = max(1, _REPORT_NBYTES // self._fmt.slot_nbytes)
        came: list[tuple[int, bool]] = []

        def report() -> None:
            if came:
                self._send(ReadCame(message.id, [i for i, _ in came], [ok for _, ok in came]))
                came.clear()

        def late(indices: list[int]) -> None:
            self._send(ReadCame(message.id, indices, [False] * len(indices), late=True))

        try:
            for result in job:
                came.append(result)
                if len(came) >= step:
                    report()
        finally:
            report()
            job.abandon(late)

    def _serve_calls(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._send(Answer(call.id, self._call(call)))
            except Exception as e:  # answered, so that the store's wait ends
                logger.exception("%s failed", call.verb)
                self._send(Answer(call.id, error=str(e)))

    def _call(self, call: Call) -> Any:
        match call.verb:
            case "flush":
                return self._io.flush(call.deadline)
            case "set_namespace":
                return self._io.set_namespace(call.payload)
            case "purge":
                return self._io.purge(array_to_keys(np.frombuffer(call.payload, dtype=np.uint8)))
            case "stats":
                return [asdict(stats) for stats in self._io.stats()]
            case "take_events":
                return [(event.kind, event.tier, event.packed_keys, event.why) for event in self._io.take_events()]
            case _:
                raise KVStoreError(f"unknown call {call.verb!r}")

    def _send(self, message: Message) -> None:
        try:
            self._channel.send(message)
        except OSError:  # the store is gone; `serve` sees it too
            time.sleep(0)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    sys.exit(main())
