"""`ProcessIo`: the I/O service in a process of its own, started again when it dies.

While the process is down its tiers answer with misses. What must not be lost meanwhile, a
purge or a reset, the next process is told before it is used.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from kvstore.arena import HostArena
from kvstore.config import StoreConfig
from kvstore.errors import KVStoreError
from kvstore.events import TierEvent
from kvstore.io_connection import START_TIMEOUT_S, Connection
from kvstore.io_messages import (
    Find,
    Found,
)
from kvstore.io_service import NOWHERE, IoService, Located
from kvstore.jobs import NothingRead, ReadJob
from kvstore.keys import BlockKey
from kvstore.slot import KeyArray, SlotCodec, Slots
from kvstore.tiers.base import FoundChunks, TierStats
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

_FIND_TIMEOUT_S: Final = 2.0
_CALL_TIMEOUT_S: Final = 30.0


class ProcessIo(IoService):
    """Starts the process, and again with back-off after it died."""

    def __init__(self, config: StoreConfig, arena: HostArena, codec: SlotCodec, namespace: bytes) -> None:
        """Raises ConfigError as `ThreadIo` does."""
        self._config, self._arena, self._namespace = config, arena, namespace
        self._health = TierHealth("I/O process")
        self._lock = threading.Lock()
        self._closed = False
        self._num_died = 0
        self._owed: list[tuple[str, bytes]] = []  # what the next process is told before it is used
        self._starting: threading.Thread | None = None
        self._connection: Connection | None = None
        connection = Connection(config, arena, namespace, self._died)
        try:
            self._use(connection)
        except KVStoreError as e:  # it has died already
            self._health.fail(e)

    def find_prefix(self, keys: Sequence[BlockKey]) -> Located:
        connection = self._running()
        found = None if connection is None else connection.ask(Find(0, b"".join(keys)), _FIND_TIMEOUT_S)
        if not isinstance(found, Found):
            return NOWHERE
        n = len(found.num_keys)
        chunks = FoundChunks(np.arange(n), np.array(found.num_keys, dtype=np.int64), np.zeros(n, dtype=np.uint64))
        return Located((connection, found.id), chunks, found.tier)

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
        self._deliver("set_namespace", namespace)

    def purge(self, keys: Sequence[BlockKey]) -> int:
        return int(self._deliver("purge", b"".join(keys)) or 0)

    def stats(self) -> list[TierStats]:
        answer = self._call("stats")
        if isinstance(answer, list):
            return [TierStats(**fields) for fields in answer]
        names = [n for n in ("disk", "shared") if getattr(self._config, n) is not None]
        return [TierStats(name=name, state="off") for name in names]

    def take_events(self) -> list[TierEvent]:
        answer = self._call("take_events") if self._config.event_log_blocks else None
        return [TierEvent(*fields) for fields in answer] if isinstance(answer, list) else []

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connection, starting = self._connection, self._starting
        if starting is not None:
            starting.join(START_TIMEOUT_S)
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

    def _deliver(self, verb: str, payload: bytes) -> Any:
        """Call what must not be lost: where the process is down, or does not do it, the next one is told first."""
        with self._lock:
            self._owed.append((verb, payload))
        connection = self._running()
        if connection is None:
            return None
        answer = connection.call(verb, payload, _CALL_TIMEOUT_S)
        if answer is None or answer.error:
            connection.kill()
            return None
        with self._lock:
            self._owed.remove((verb, payload))
        return answer.value

    def _use(self, connection: Connection) -> None:
        """Tell a new process what is owed, and use it from then on.

        Raises:
            KVStoreError: it has not done it, or is gone.
        """
        while True:
            with self._lock:
                if connection.exit_code is not None:
                    raise KVStoreError(f"ended with code {connection.exit_code}")
                if not self._owed:
                    self._connection, self._starting = connection, None
                    return
                verb, payload = self._owed[0]
            answer = connection.call(verb, payload, _CALL_TIMEOUT_S)
            if answer is None or answer.error:
                connection.kill()
                raise KVStoreError(f"{verb} failed: {'no answer' if answer is None else answer.error}")
            with self._lock:
                self._owed.remove((verb, payload))

    def _running(self) -> Connection | None:
        """The process that runs; starts it again in the background where it is time to."""
        with self._lock:
            connection = self._connection
            if connection is None and not self._closed and self._starting is None and self._health.allow():
                self._starting = threading.Thread(target=self._restart, name="kvstore-io-restart", daemon=True)
                self._starting.start()
            return connection

    def _died(self, connection: Connection) -> None:
        with self._lock:
            if self._closed or self._connection is not connection:
                return
            self._connection = None
            self._num_died += 1
        self._health.fail(ChildProcessError(f"ended with code {connection.exit_code}"))

    def _restart(self) -> None:
        try:
            connection = Connection(self._config, self._arena, self._namespace, self._died)
            self._use(connection)
        except (OSError, KVStoreError) as e:
            self._health.fail(e)
            with self._lock:
                self._starting = None
        else:
            self._health.recover()
