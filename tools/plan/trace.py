"""Reads traces: JSON lines, each a request with ``hash_ids``, numbers that name its blocks, prefix first.

The format of the Mooncake traces. Lines are bounded, and what is none is refused with its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.journal import is_journal
from kvstore.journal_view import JournalView
from kvstore.stored_format import StoredFormat
from tools.output import progress

MAX_LINE_NBYTES: Final = 16 << 20
MAX_ACCESSES: Final = 1 << 28
_BATCH: Final = 4096
_HOT_SHARE: Final = 0.01
_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)

_Id = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Line(msgspec.Struct, frozen=True):
    hash_ids: Annotated[list[_Id], msgspec.Meta(max_length=1 << 20)]


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests, one after the other.

    Attributes:
        ids: int64; request i has ``ids[starts[i]:starts[i + 1]]``.
        starts: int64, (num_requests + 1,).
        rate: the share of blocks that is left of the whole trace; 1.0: all.
        hot_accesses, hot_hits: of blocks that are in so many requests that they are not simulated: hits, but for
            the first time.
    """

    ids: NDArray[np.int64]
    starts: NDArray[np.int64]
    rate: float = 1.0
    hot_accesses: int = 0
    hot_hits: int = 0

    @property
    def num_requests(self) -> int:
        return len(self.starts) - 1

    def requests(self) -> Iterator[list[int]]:
        ids, starts = self.ids.tolist(), self.starts.tolist()
        for first, end in zip(starts[:-1], starts[1:], strict=True):
            yield ids[first:end]

    def sampled(self, most: int) -> Trace:
        """At most about so many accesses: those of some blocks, chosen by a hash of their ids; requests without
        any go. Source: SHARDS (Waldspurger et al., FAST 2015)."""
        if len(self.ids) <= most:
            return self
        blocks, which, counts = np.unique(self.ids, return_inverse=True, return_counts=True)
        are_hot = counts > self.num_requests * _HOT_SHARE
        rate = min(1.0, most / max(1, int(counts[~are_hot].sum())))
        mixed = blocks.astype(np.uint64) * _GOLDEN
        mixed ^= mixed >> np.uint64(29)
        mixed *= _GOLDEN
        chosen = ((mixed >> np.uint64(32)) < np.uint64(int(rate * (1 << 32)))) & ~are_hot
        kept = chosen[which]
        counted = np.concatenate(([0], np.cumsum(kept)))[self.starts]
        starts = np.unique(counted)  # requests without any begin where the next one does
        hot = counts[are_hot]
        return Trace(self.ids[kept], starts.astype(np.int64), rate, int(hot.sum()), int((hot - 1).sum()))


def read_source(path: Path) -> tuple[Trace, JournalView | None]:
    """A file's, or a journal's requests, and what else a journal says.

    Raises:
        ConfigError: it is neither, or has no request.
    """
    if not path.is_dir():
        return read_trace(path), None
    if not is_journal(path):
        raise ConfigError(f"TRACE: the directory {str(path)!r} holds no journal; give a journal's, or a file")
    view = JournalView.of(path)
    return trace_of(view), view


def read_trace(path: Path) -> Trace:
    """All of a file.

    Raises:
        ConfigError: it cannot be read, or a line is no request; says which.
    """
    decoder = msgspec.json.Decoder(_Line)
    parts: list[NDArray[np.int64]] = []
    lengths: list[int] = []
    batch: list[int] = []
    total = 0
    try:
        with path.open("rb") as file, progress(f"reading {path.name}", None) as advance:
            for number in range(1, 1 << 62):
                line = file.readline(MAX_LINE_NBYTES + 1)
                if not line:
                    break
                if len(line) > MAX_LINE_NBYTES:
                    raise ConfigError(f"TRACE: line {number} of {path} is longer than {MAX_LINE_NBYTES >> 20} MiB")
                if not line.strip():
                    continue
                ids = _ids(decoder, line, number, path)
                batch += ids
                lengths.append(len(ids))
                total += len(ids)
                if total > MAX_ACCESSES:
                    raise ConfigError(f"TRACE: {path} has more than {MAX_ACCESSES} blocks in all; give a part of it")
                if len(lengths) % _BATCH == 0:
                    parts.append(np.array(batch, dtype=np.int64))
                    batch = []
                    advance(_BATCH)
    except OSError as e:
        raise ConfigError(f"TRACE: {str(path)!r} cannot be read ({e.strerror})") from e
    parts.append(np.array(batch, dtype=np.int64))
    if not total:
        raise ConfigError(f"TRACE: {path} has no requests; give JSON lines with hash_ids")
    return Trace(np.concatenate(parts), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def trace_of(view: JournalView) -> Trace:
    """The requests of a journal; its blocks' numbers are the view's nodes.

    Raises:
        ConfigError: there are none.
    """
    parts, lengths, total = [], [], 0
    with progress("reading the journal", len(view.requests)) as advance:
        for nodes in view.prompts():
            advance(1)
            if nodes and total + len(nodes) <= MAX_ACCESSES:
                parts.append(np.array(nodes, dtype=np.int64))
                lengths.append(len(nodes))
                total += len(nodes)
    if not parts:
        raise ConfigError(f"TRACE: the journal {view.path} has no requests of a full block")
    return Trace(np.concatenate(parts), np.concatenate(([0], np.cumsum(lengths))).astype(np.int64))


def format_of(view: JournalView) -> StoredFormat | None:
    """Of a journal's newest blocks; None where its identities do not say."""
    for one in reversed(view.opened):
        with suppress(ValueError):
            return StoredFormat.of(one.content, one.placed)
    return None


def _ids(decoder: msgspec.json.Decoder[_Line], line: bytes, number: int, path: Path) -> list[int]:
    try:
        ids = decoder.decode(line).hash_ids
    except (msgspec.MsgspecError, RecursionError) as e:
        raise ConfigError(f"TRACE: line {number} of {path} is no request ({e}); give JSON with hash_ids") from e
    return list(dict.fromkeys(ids))  # a prefix's blocks all differ
