"""Writes a journal: one thread, which asks for events and counters and takes what requests tell it.

Whoever serves a request hands over a reference and goes on. What the thread cannot keep up with is
dropped and counted. Storage that fails turns the journal off, with one warning; it comes back by itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from kvstore.config import JournalConfig
from kvstore.errors import ConfigError
from kvstore.events import TierEvent
from kvstore.journal import (
    MAGIC,
    MAX_HASHES,
    MAX_MOVES,
    MAX_TEXT,
    SUFFIX,
    AnyRecord,
    Asked,
    Closed,
    Ended,
    Lost,
    Moved,
    Opened,
    Reset,
    Sample,
    frame,
    move_ids,
    segments,
)
from kvstore.keys import BLOCK_HASH_NBYTES, BlockKey
from kvstore.tiers.base import TierStats
from kvstore.tiers.health import TierHealth

logger = logging.getLogger(__name__)

_INTERVAL_S: Final = 0.5
_MAX_WAITING_BLOCKS: Final = 1 << 18
_MAX_WAITING: Final = 1 << 14
_SEGMENTS: Final = 8  # that a capacity is cut into
_REMEMBERED: Final = 16  # one of so many blocks of a prompt: what others share with it is written from there on
_CLOSE_TIMEOUT_S: Final = 10.0
_TENANT: Final = b"kvstore tenant 1\0"


def tenant_digest(salt: str) -> str:
    """What a journal calls a tenant: 16 hex digits, or nothing without a salt."""
    return hashlib.sha256(_TENANT + salt.encode()).hexdigest()[:16] if salt else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLookup:
    """One request's prompt, and what was found of it.

    Attributes:
        is_end: the request is over, and keys are those of all that it has stored; what was found means nothing.
        keys: of all its full blocks, of one KV cache group, from the first on; not changed any more.
        tenant: `tenant_digest` of its salt.
        adapter: digest of the adapter's content, in hex.
        hits: leading blocks, by the tier that had them.
    """

    keys: Sequence[BlockKey]
    request_id: str = ""
    tenant: str = ""
    adapter: str = ""
    num_tokens: int = 0
    hits: Mapping[str, int] = field(default_factory=dict)
    waited_s: float = 0.0
    is_late: bool = False
    is_end: bool = False
    t_ns: int = field(default_factory=time.time_ns)


class JournalWriter:
    """Thread-safe; `close` it.

    Args:
        opened: says who writes; asked whenever a segment begins.
        take_events: what came into tiers and left them since the last call; called by the thread.
        stats: of all tiers; likewise.
    Raises:
        ConfigError: the path is no directory, or may not be written.
    """

    def __init__(
        self,
        config: JournalConfig,
        opened: Callable[[], Opened],
        take_events: Callable[[], Sequence[TierEvent]],
        stats: Callable[[], Iterable[TierStats]],
    ) -> None:
        self._config, self._opened, self._take_events, self._stats = config, opened, take_events, stats
        self._health = TierHealth(f"journal {config.path}")
        self._lock = threading.Lock()  # what waits
        self._writing = threading.Lock()  # the segment, and who takes events
        self._waiting: deque[PromptLookup | Reset] = deque()
        self._waiting_blocks = self._lost_records = self._lost_blocks = 0
        self._sampled_at = float("-inf")
        self._segment: int | None = None  # descriptor
        self._nbytes = 0  # of the segment
        self._number = 0  # of the segment, among this process's
        self._names: dict[str, int] = {}
        self._known: dict[bytes, int] = {}  # hashes of some blocks of prompts -> the segment that has them
        self._make_directory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvstore-journal", daemon=True)
        self._thread.start()

    def asked(self, lookup: PromptLookup) -> None:
        """Note a request; waits for nothing."""
        with self._lock:
            if len(self._waiting) >= _MAX_WAITING or self._waiting_blocks + len(lookup.keys) > _MAX_WAITING_BLOCKS:
                self._lost_records += 1
                self._lost_blocks += len(lookup.keys)
                return
            self._waiting.append(lookup)
            self._waiting_blocks += len(lookup.keys)

    def ended(self, keys: Sequence[BlockKey], request_id: str, tenant: str) -> None:
        """Note what a request that is over has stored; ``tenant``: its digest."""
        self.asked(PromptLookup(keys=keys, request_id=request_id, tenant=tenant, is_end=True))

    def reset(self, namespace: bytes) -> None:
        """Note that what follows is of another namespace."""
        with self._lock:
            self._waiting.append(Reset(t_ns=time.time_ns(), namespace=namespace))

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Take events and write what waits, now; False where what is written already takes longer than that."""
        if not self._writing.acquire(timeout=timeout_s):
            return False
        try:
            self._write_all()
        finally:
            self._writing.release()
        return True

    def close(self) -> None:
        """Write what waits, and end the thread."""
        self._stop.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning("journal %s: closed while its file system does not answer", self._config.path)

    # -- inside

    def _make_directory(self) -> None:
        path = self._config.path
        try:
            os.makedirs(path, mode=0o700, exist_ok=True)
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(f"{path} may not be written")
        except (FileExistsError, NotADirectoryError, PermissionError) as e:
            raise ConfigError(
                f"journal.path: {path!r} cannot be used ({e}); give a directory that this user may write"
            ) from e
        except OSError as e:
            self._health.fail(e)

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            with self._writing:
                self._write_all()
        with self._writing:
            self._sampled_at = float("-inf")  # the last state is worth a sample
            self._write_all(Closed(t_ns=time.time_ns()))
            self._end_segment()

    def _write_all(self, *last: AnyRecord) -> None:
        """By who holds ``_writing``."""
        records: list[PromptLookup | AnyRecord] = []
        try:
            records = [*self._records(), *last]
            if records and self._health.allow():
                self._write(records)
                self._health.recover()
            else:
                self._lose(records)
        except Exception as e:  # a journal is not worth a server
            if not isinstance(e, OSError):
                logger.exception("journal %s: could not be written", self._config.path)
            self._health.fail(e)
            self._lose(records)
            self._end_segment()
            self._known = {h: number for h, number in self._known.items() if number != self._number}

    def _lose(self, records: Iterable[PromptLookup | AnyRecord]) -> None:
        """Count requests that are not written, or perhaps not."""
        lost = [record for record in records if isinstance(record, PromptLookup)]
        with self._lock:
            self._lost_records += len(lost) + sum(r.records for r in records if isinstance(r, Lost))
            self._lost_blocks += sum(len(r.keys) for r in lost) + sum(r.blocks for r in records if isinstance(r, Lost))

    def _records(self) -> Iterator[PromptLookup | AnyRecord]:
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
            lost = Lost(t_ns=time.time_ns(), records=self._lost_records, blocks=self._lost_blocks)
            self._waiting_blocks = self._lost_records = self._lost_blocks = 0
        if lost.records:
            yield lost
        yield from waiting
        now = time.time_ns()
        for (tier, why), events in groupby(self._take_events(), key=lambda event: (event.tier, event.why or "")):
            ids = move_ids(b"".join(event.packed_keys for event in events))
            for at in range(0, len(ids), MAX_MOVES):
                yield Moved(t_ns=now, tier=tier, why=why, ids=ids[at : at + MAX_MOVES].tobytes())
        if time.monotonic() - self._sampled_at >= self._config.sample_s:
            self._sampled_at = time.monotonic()
            yield Sample(t_ns=time.time_ns(), tiers={stats.name: _numbers(stats) for stats in self._stats()})

    def _write(self, records: Sequence[PromptLookup | AnyRecord]) -> None:
        parts: list[bytes] = []
        for item in records:
            if self._segment is None or self._nbytes + sum(map(len, parts)) > self._config.capacity_nbytes // _SEGMENTS:
                self._append(parts)
                parts = []
                self._begin_segment()
            parts.append(frame(self._asked(item) if isinstance(item, PromptLookup) else item))
        self._append(parts)

    def _append(self, parts: list[bytes]) -> None:
        data = b"".join(parts)
        while data and self._segment is not None:
            n = os.write(self._segment, data)
            self._nbytes += n
            data = data[n:]

    def _asked(self, lookup: PromptLookup) -> Asked | Ended:
        hashes = [bytes(key[:BLOCK_HASH_NBYTES]) for key in lookup.keys]
        n = next((i for i in range(len(hashes), 0, -1) if hashes[i - 1] in self._known), 0)
        hashes = hashes[: n + MAX_HASHES]
        self._known |= dict.fromkeys((*hashes[n + -n % _REMEMBERED :: _REMEMBERED], *hashes[-1:]), self._number)
        parent, new, request = hashes[n - 1] if n else b"", b"".join(hashes[n:]), lookup.request_id[:MAX_TEXT]
        if lookup.is_end:
            return Ended(t_ns=lookup.t_ns, request=request, tenant=lookup.tenant, depth=n, parent=parent, hashes=new)
        return Asked(
            t_ns=lookup.t_ns,
            request=request,
            tenant=lookup.tenant,
            adapter=lookup.adapter,
            num_tokens=lookup.num_tokens,
            depth=n,
            parent=parent,
            hashes=new,
            hits=dict(lookup.hits),
            waited_s=max(0.0, lookup.waited_s),
            is_late=lookup.is_late,
        )

    def _begin_segment(self) -> None:
        self._end_segment()
        os.makedirs(self._config.path, mode=0o700, exist_ok=True)
        self._prune()
        self._number += 1
        name = f"{time.time_ns():020d}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._segment = os.open(os.path.join(self._config.path, name), flags, 0o600)
        self._names[name] = self._number
        self._nbytes = 0
        self._append([MAGIC, frame(self._opened())])

    def _end_segment(self) -> None:
        if self._segment is not None:
            descriptor, self._segment = self._segment, None
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _prune(self) -> None:
        """Make room for one more segment, and forget what the segments that have gone said."""
        found = segments(Path(self._config.path))
        left = sum(segment.nbytes for segment in found)
        for segment in found:
            if left <= self._config.capacity_nbytes * (_SEGMENTS - 1) // _SEGMENTS:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(segment.path)
            left -= segment.nbytes
        there = {segment.path.name for segment in segments(Path(self._config.path))}
        self._names = {name: number for name, number in self._names.items() if name in there}
        kept = set(self._names.values())
        self._known = {block_hash: number for block_hash, number in self._known.items() if number in kept}


def _numbers(stats: TierStats) -> dict[str, float]:
    """Of one tier, as numbers; 1.0 for a state that is "on"."""
    fields: dict[str, Any] = {name: getattr(stats, name) for name in TierStats.__dataclass_fields__}
    numbers = {name: float(value) for name, value in fields.items() if isinstance(value, int | float)}
    return {**numbers, "is_on": float(stats.state == "on")}
