"""`kvstore inspect`: identity and layout of what is stored, or the numbers in one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import RenderableType

from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.blocks import Block, Choice, Place, find, read
from tools.ls import problem_lines, problems_of
from tools.output import lines, table
from tools.places import find_catalogs

COLUMNS: Final = ("layer", "part", "head", "min", "max", "mean", "norm", "zeros", "NaN", "Inf", "subnormal", "of range")
_SOME_KEYS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatistics:
    """Numbers of K or V of one layer of a block, or of one head of it; of all that are finite, but for the counts.

    Attributes:
        head: None: of all heads together.
        subnormal: how many are too small to be exact.
        of_range: the greatest magnitude, as a share of the dtype's greatest; 1 where numbers are saturated.
    """

    layer: int
    part: str
    head: int | None
    min: float
    max: float
    mean: float
    norm: float
    zeros: int
    nan: int
    inf: int
    subnormal: int
    of_range: float


def statistics_of(kv: torch.Tensor, *, per_head: bool = False) -> list[PartStatistics]:
    """Of each layer's K and V, or latent, and of each head of them; all at once.

    Args:
        kv: shape ``KVLayout.block_shape``.
    """
    info = torch.finfo(kv.dtype) if kv.dtype.is_floating_point else torch.iinfo(kv.dtype)
    values = kv.to(torch.float64)  # float8 has no arithmetic of its own
    values_LPHX = values.flatten(3) if per_head else values.flatten(2).unsqueeze(2)
    finite = values_LPHX.isfinite()
    n = finite.sum(-1)
    zeroed = values_LPHX.where(finite, 0.0)
    smallest = float(getattr(info, "smallest_normal", 0.0))
    nothing = torch.where(n > 0, 0.0, float("nan"))
    least = values_LPHX.where(finite, float("inf")).amin(-1) + nothing
    greatest = values_LPHX.where(finite, float("-inf")).amax(-1) + nothing
    columns = {
        "min": least.where(n > 0, nothing),
        "max": greatest.where(n > 0, nothing),
        "mean": zeroed.sum(-1) / n,
        "norm": zeroed.square().sum(-1).sqrt() + nothing,
        "zeros": (values_LPHX == 0).sum(-1),
        "nan": values_LPHX.isnan().sum(-1),
        "inf": values_LPHX.isinf().sum(-1),
        "subnormal": ((zeroed != 0) & (zeroed.abs() < smallest)).sum(-1),
        "of_range": zeroed.abs().amax(-1) / float(info.max) + nothing,
    }
    numbers = {name: column.tolist() for name, column in columns.items()}
    parts = "KV" if kv.shape[1] == 2 else "L"
    return [
        PartStatistics(
            layer=layer, part=part, head=head if per_head else None,
            **{name: column[layer][i][head] for name, column in numbers.items()},
        )
        for layer in range(kv.shape[0])
        for i, part in enumerate(parts)
        for head in range(values_LPHX.shape[2])
    ]  # fmt: skip


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block where it was found.

    Attributes:
        reason: why its chunk does not verify; empty where it does.
        statistics: none where K and V cannot be told apart.
    """

    tier: str
    path: str
    place: str
    namespace: str
    key: str
    reason: str
    statistics: list[PartStatistics]

    @classmethod
    def of(cls, place: Place, block: Block, *, per_head: bool) -> StoredBlock:
        statistics = [] if block.kv is None else statistics_of(block.kv, per_head=per_head)
        chunk, catalog = place.chunk, place.catalog
        namespace = chunk.space.namespace.hex()
        return cls(catalog.tier, str(catalog.path), chunk.name, namespace, str(place.key), block.reason, statistics)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.reason}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        state = f"BAD: {self.reason}" if self.reason else "verified"
        yield from lines(f"block {self.key}", f"{self.tier} {self.path}, {self.place}: {state}")
        if self.statistics:
            rows = ([_cell(v) for v in asdict(s).values()] for s in self.statistics)
            yield table("", COLUMNS, rows, left=2)
        elif not self.reason:
            yield from lines("what K and V are in this byte layout is not known here")


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


def find_block(
    path: Path, key: str, integrity_key_file: str | None = None, *, per_head: bool = False
) -> list[StoredBlock]:
    """One block in every place where it is stored.

    Args:
        key: as `kvstore inspect --json` and logs show it, or as much of its start as is unique.
    Raises:
        ConfigError: there is nothing of a tier there.
        KeyFormatError: this is no start of a key.
        NotStoredError: no block has such a key, or several have.
    """
    (found,) = find(find_catalogs(path, integrity_key_file), Choice(keys=(key,)))
    return [StoredBlock.of(place, read(place), per_head=per_head) for place in found]


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
    return "all" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def block_parts(blocks: Sequence[StoredBlock]) -> Iterator[RenderableType]:
    """For people."""
    for block in blocks:
        yield from block.parts()
