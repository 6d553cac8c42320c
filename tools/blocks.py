"""Blocks that a person names, where they are stored, and what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.byte_layout import blocks_of
from kvstore.errors import ConfigError, KVStoreError, NotStoredError
from kvstore.keys import KEY_NBYTES, BlockKey
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog, StoredChunk
from tools.choice import Choice
from tools.output import progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is stored."""

    catalog: Catalog
    chunk: StoredChunk
    key: BlockKey

    @property
    def fmt(self) -> StoredFormat | None:
        return self.chunk.space.fmt


@dataclass(frozen=True, slots=True)
class Block:
    """What was read of one.

    Attributes:
        reason: why its chunk does not verify; empty where it does.
        kv: shape `KVLayout.block_shape`; None where it is bad, or K and V cannot be told apart.
        payload: uint8, of the block alone; None where it is bad, or others of its chunk lie between.
    """

    place: Place
    reason: str
    kv: torch.Tensor | None = None
    payload: torch.Tensor | None = None


def find(catalogs: Sequence[Catalog], choice: Choice) -> list[list[Place]]:
    """Every place of each block that is named and stored, in the order of the choice; of a prompt, those of
    its blocks that are stored, in its order.

    Raises:
        NotStoredError: a key is that of no block, or of several; or no block of a prompt is stored.
    """
    starts = choice.starts()
    if starts:
        known = ((str(place.key), place) for place in places(catalogs))
        return list(by_start(starts, known, "is stored here").values())
    wanted: dict[BlockKey, list[Place]] = {
        key: [] for of_one in prompts_by_format(formats_of(catalogs), choice).values() for key in of_one
    }
    for place in places(catalogs):
        if place.key in wanted and choice.means(place.chunk.space.namespace):
            wanted[place.key].append(place)
    stored = [found for found in wanted.values() if found]
    if not stored:
        raise NotStoredError("nothing of this prompt is stored here")
    return stored


def formats_of(catalogs: Sequence[Catalog]) -> list[StoredFormat]:
    return [fmt for catalog in catalogs for fmt in catalog.formats()]


def prompts_by_format(formats: Sequence[StoredFormat], choice: Choice) -> dict[int, list[BlockKey]]:
    """A prompt's keys in KV of each format, by its place in the sequence; of those whose keys can be worked out.

    Raises:
        ConfigError: the prompt is none, or its keys cannot be worked out in any of them.
    """
    found: dict[int, list[BlockKey]] = {}
    problem: ConfigError | None = None
    for i, fmt in enumerate(formats):
        try:
            found[i] = choice.of_prompt(fmt)
        except ConfigError as e:
            problem = e
    if problem is not None and not found:
        raise problem
    return found


def places(catalogs: Sequence[Catalog]) -> Iterator[Place]:
    """Everything that is stored, block by block; with progress."""
    for catalog in catalogs:
        with progress(f"{catalog.tier} {catalog.path}", None) as advance:
            for chunk in catalog.chunks():
                advance(1)
                for at in range(0, len(chunk.key_bytes), KEY_NBYTES):
                    yield Place(catalog, chunk, BlockKey(chunk.key_bytes[at : at + KEY_NBYTES]))


def read(place: Place) -> Block:
    """Read and verify."""
    import torch

    row, position, reason = _row(place)
    fmt = place.fmt
    if row is None or fmt is None:
        return Block(place, reason)
    slot = fmt.slot
    payload = torch.from_numpy(row[: slot.payload_nbytes].copy())
    alone = payload if slot.blocks_per_chunk == 1 else None
    try:
        kv = blocks_of(payload, fmt.layout, slot.blocks_per_chunk, fmt.byte_layout, fmt.tp_size)[position]
    except KVStoreError:
        return Block(place, "", payload=alone)
    return Block(place, "", kv, alone)


def why_bad(place: Place) -> str:
    """Verify, without looking at the numbers: why it is not sound; empty where it is."""
    return _row(place)[2]


def _row(place: Place) -> tuple[NDArray[np.uint8] | None, int, str]:
    """The chunk as a slot, which of its blocks it is, and why that cannot be said."""
    verdict, fmt = place.catalog.read(place.chunk), place.fmt
    if verdict.reason or verdict.row is None or fmt is None:
        return None, 0, verdict.reason or "cannot be read"
    n = fmt.slot.blocks_per_chunk
    held = verdict.row[fmt.slot.body_nbytes :][: n * KEY_NBYTES].reshape(n, -1)
    position = next((i for i, key in enumerate(held) if key.tobytes() == place.key), None)
    return (None, 0, "its chunk holds other blocks") if position is None else (verdict.row, position, "")


def read_any(found: Sequence[Place]) -> Block:
    """From the first place where it is sound; else as it is in the last one."""
    block = read(found[0])
    for place in found[1:]:
        if not block.reason:
            break
        block = read(place)
    return block


def by_start(starts: Sequence[str], known: Iterable[tuple[str, T]], where: str) -> dict[str, list[T]]:
    """What a person's starts of keys mean, of all keys that are known, each with what it is the key of.

    Args:
        where: they are known, for people: "is stored here".
    Raises:
        NotStoredError: no key begins so, or several do.
    """
    found: dict[str, dict[str, list[T]]] = {start: {} for start in starts}
    shortest = min((len(start.partition(".")[0]) for start in found), default=0)
    by_head: dict[str, list[str]] = {}
    for start in found:
        by_head.setdefault(start[:shortest], []).append(start)
    for text, one in known:
        for start in by_head.get(text[:shortest], ()):
            if text.startswith(start):
                found[start].setdefault(text, []).append(one)
    for start, there in found.items():
        if not there:
            raise NotStoredError(f"KEY: no block whose key begins with {start!r} {where}")
        if len(there) > 1:
            some = ", ".join(text[: len(start) + 8] for text in sorted(there)[:3])
            raise NotStoredError(f"KEY: {len(there)} keys begin with {start!r} ({some}, ...); give more of it")
    return {start: next(iter(there.values())) for start, there in found.items()}


def same_content(formats: Sequence[StoredFormat]) -> dict[str, tuple[Any, Any]]:
    """Fields in which the first two formats that differ do; empty where all are of one content."""
    for fmt in formats[1:]:
        first = formats[0]
        differs = {
            name: (first.content.get(name), fmt.content.get(name))
            for name in sorted(first.content.keys() | fmt.content.keys())
            if first.content.get(name) != fmt.content.get(name)
        }
        if differs:
            return differs
    return {}
