"""`kvstore inspect`: identity and layout of what is stored, or the numbers in one block."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import RenderableType

from kvstore.byte_layout import blocks_of
from kvstore.errors import KeyFormatError, KVStoreError
from kvstore.keys import BlockKey
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog, StoredChunk, Verdict
from tools.ls import problem_lines, problems_of
from tools.output import lines, table
from tools.places import find_catalogs

STATISTICS: Final = ("layer", "part", "min", "max", "mean", "norm", "zeros", "NaN", "Inf")
_SOME_KEYS: Final = 3
_KEY_START: Final = re.compile(r"[0-9a-f]{1,64}(\.[0-9]{1,10})?")


class NotStoredError(KVStoreError):
    """No block, or more than one, is stored under a key that a person gave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatistics:
    """Numbers of the K or the V of one layer of a block; of all that are finite, but for the counts."""

    layer: int
    part: str
    min: float
    max: float
    mean: float
    norm: float
    zeros: int
    nan: int
    inf: int

    @classmethod
    def of(cls, layer: int, part: str, values: torch.Tensor) -> PartStatistics:
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        finite = values[values.isfinite()]
        if not finite.numel():
            finite = torch.full((1,), float("nan"), dtype=values.dtype)
        return cls(
            layer=layer,
            part=part,
            min=float(finite.min()),
            max=float(finite.max()),
            mean=float(finite.mean()),
            norm=float(finite.norm()),
            zeros=int((values == 0).sum()),
            nan=nan,
            inf=inf,
        )


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block where it was found.

    Attributes:
        reason: why its chunk does not verify; empty where it does.
        position: of the block in its chunk; None where that cannot be told.
    """

    tier: str
    path: str
    place: str
    namespace: str
    key: str
    reason: str
    position: int | None
    statistics: list[PartStatistics]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.reason}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        state = f"BAD: {self.reason}" if self.reason else "verified"
        yield from lines(f"block {self.key}", f"{self.tier} {self.path}, {self.place}, block {self.position}: {state}")
        if self.statistics:
            yield table("", STATISTICS, ([_cell(v) for v in asdict(s).values()] for s in self.statistics), left=2)


def describe(path: Path) -> tuple[dict[str, Any], list[RenderableType]]:
    """Identity, placement and layout of every directory, as data and for people.

    Raises:
        ConfigError: there is nothing of a tier there.
    """
    catalogs, data, parts = find_catalogs(path), [], list[RenderableType]()
    for catalog in catalogs:
        for fmt in catalog.formats():
            layout = _layout(fmt)
            place = {"tier": catalog.tier, "path": str(catalog.path)}
            keys = _some_keys(catalog, fmt)
            data.append({**place, "identity": fmt.content, "placement": fmt.placed, "layout": layout, "keys": keys})
            rows = [*fmt.content.items(), *fmt.placed.items(), *layout.items(), *(("a key", key) for key in keys)]
            parts.append(table(f"{catalog.tier} {catalog.path}", ("what", "value"), rows, left=2))
    problems = problems_of(catalogs)
    return {"stored": data, "problems": problems}, [*parts, *problem_lines(problems)]


def find_block(path: Path, key: str, integrity_key_file: str | None = None) -> list[StoredBlock]:
    """One block in every place where it is stored.

    Args:
        key: as `kvstore inspect --json` and logs show it, or as much of its start as is unique.
    Raises:
        ConfigError: there is nothing of a tier there.
        KeyFormatError: this is no start of a key.
        NotStoredError: no block has such a key, or several have.
    """
    if not _KEY_START.fullmatch(key.lower()):
        raise KeyFormatError(f"KEY: {key!r} is not allowed; give up to 64 hex digits, then optionally .GROUP")
    catalogs = find_catalogs(path, integrity_key_file)
    found = [(catalog, chunk, match) for catalog in catalogs for chunk, match in _matches(catalog, key.lower())]
    matches = sorted({str(match) for _, _, match in found})
    if not matches:
        raise NotStoredError(f"KEY: no block whose key begins with {key!r} is stored in {path}")
    if len(matches) > 1:
        some = ", ".join(match[: len(key) + 8] for match in matches[:3])
        raise NotStoredError(f"KEY: {len(matches)} keys begin with {key!r} ({some}, ...); give more of it")
    return [_block(catalog, chunk, match) for catalog, chunk, match in found]


def _matches(catalog: Catalog, start: str) -> Iterator[tuple[StoredChunk, BlockKey]]:
    for chunk in catalog.chunks():
        for key in chunk.keys:
            if str(key).startswith(start):
                yield chunk, key


def _block(catalog: Catalog, chunk: StoredChunk, key: BlockKey) -> StoredBlock:
    verdict = catalog.read(chunk)
    position = _position(chunk, key, verdict)
    statistics: list[PartStatistics] = []
    if verdict.row is not None and position is not None and chunk.space.fmt is not None:
        statistics = statistics_of(verdict.row, chunk.space.fmt, position)
    namespace = chunk.space.namespace.hex()
    where = (catalog.tier, str(catalog.path), chunk.name)
    return StoredBlock(*where, namespace, str(key), verdict.reason, position, statistics)


def _position(chunk: StoredChunk, key: BlockKey, verdict: Verdict) -> int | None:
    """Where in its chunk a block lies: on disk the index says so, in a file its trailer."""
    if isinstance(chunk.place, int):
        return chunk.keys.index(key)
    if verdict.row is None or chunk.space.fmt is None:
        return None
    slot = chunk.space.fmt.slot
    held = verdict.row[slot.body_nbytes :][: slot.blocks_per_chunk * len(key)].reshape(slot.blocks_per_chunk, -1)
    at = [i for i, row in enumerate(held) if row.tobytes() == key]
    return at[0] if at else None


def statistics_of(row: NDArray[np.uint8], fmt: StoredFormat, position: int) -> list[PartStatistics]:
    """Statistics of each layer's K and V of one block of a slot, shape (slot_nbytes,)."""
    layout, slot = fmt.layout, fmt.slot
    payload = torch.from_numpy(row[: slot.payload_nbytes].copy())
    blocks_BL2HTD = blocks_of(payload, layout, slot.blocks_per_chunk, fmt.byte_layout, fmt.tp_size)
    return [
        PartStatistics.of(layer, part, blocks_BL2HTD[position, layer, i].to(torch.float64))
        for layer in range(layout.num_layers)
        for i, part in enumerate("KV"[: layout.kv_dim])
    ]


def _layout(fmt: StoredFormat) -> dict[str, Any]:
    return {
        "block_shape": list(fmt.layout.block_shape),
        "block_nbytes": fmt.layout.block_nbytes,
        "slot_nbytes": fmt.slot.slot_nbytes,
        "initial_namespace": fmt.initial_namespace.hex(),
    }


def _some_keys(catalog: Catalog, fmt: StoredFormat) -> list[str]:
    chunks = (chunk for chunk in catalog.chunks() if chunk.space.fmt is fmt)
    return [str(chunk.keys[0]) for chunk in islice(chunks, _SOME_KEYS)]


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def block_parts(blocks: Sequence[StoredBlock]) -> Iterator[RenderableType]:
    """For people."""
    for block in blocks:
        yield from block.parts()
