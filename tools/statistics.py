"""Numbers that say whether K and V are in order: of a layer, or of each of its heads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from rich.console import RenderableType

from tools.output import table

COLUMNS: Final = (
    *("layer", "part", "head", "min", "max", "mean", "norm", "zeros", "NaN", "Inf"),
    *("of max", "exponents", "subnormal", "saturated"),
)
_PIECE: Final = 1 << 19  # numbers that are looked at together
_ADDED: Final = (
    *("total", "finite", "sum", "squares", "zeros", "nan", "inf", "saturated", "subnormals"),
    *("min", "max", "largest", "min_exponent", "max_exponent"),
)
PARTS: Final = {1: ("latent",), 2: ("K", "V")}  # by kv_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class PartStatistics:
    """Numbers of the K or the V of one layer, or of one head of it; of all that are finite, but for the counts.

    Attributes:
        head: None where it is all of them.
        min, max, mean, norm: NaN where nothing is finite.
        of_max: the largest magnitude, as a share of the dtype's largest number.
        min_exponent, max_exponent: of two, of all that are neither zero nor infinite; None without any.
        subnormals: numbers so small that the dtype holds them with fewer digits.
        saturated: numbers of the dtype's largest magnitude, as clipping to fp8 makes them.
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
    of_max: float
    min_exponent: int | None
    max_exponent: int | None
    subnormals: int
    subnormal_share: float
    saturated: int

    def cells(self) -> list[object]:
        """As `COLUMNS`, without the head where it is none."""
        exponents = "" if self.min_exponent is None else f"{self.min_exponent}..{self.max_exponent}"
        numbers = [f"{x:.4g}" for x in (self.min, self.max, self.mean, self.norm)]
        counts = [self.zeros, self.nan, self.inf]
        head = [] if self.head is None else [self.head]
        of_range = [f"{self.of_max:.2%}", exponents, f"{self.subnormal_share:.2%}", self.saturated]
        return [self.layer, self.part, *head, *numbers, *counts, *of_range]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Accumulator:
    """Takes in the numbers of several rows, heads or just one, piece by piece.

    Args:
        dtype: in which they are stored.
    """

    def __init__(self, num_rows: int, dtype: torch.dtype) -> None:
        self._limits = torch.finfo(dtype) if dtype.is_floating_point else None
        self._largest = self._limits.max if self._limits else torch.iinfo(dtype).max
        start = {"min": math.inf, "max": -math.inf, "min_exponent": math.inf, "max_exponent": -math.inf}
        self._columns = {name: torch.full((num_rows,), start.get(name, 0.0), dtype=torch.float64) for name in _ADDED}

    def add(self, stored: torch.Tensor) -> None:
        """Take in (num_rows, n) numbers."""
        for first in range(0, stored.shape[1], max(1, _PIECE // len(stored))):
            self._add(stored[:, first : first + max(1, _PIECE // len(stored))].to(torch.float64))

    def _add(self, values: torch.Tensor) -> None:
        columns = self._columns
        finite, size = values.isfinite(), values.abs()
        only = torch.where(finite, values, 0.0)
        counted = finite & (values != 0) if self._limits else torch.zeros_like(finite)
        exponents = torch.frexp(only)[1].to(torch.float64) - 1
        for name, least in (
            ("min", torch.where(finite, values, math.inf)),
            ("min_exponent", torch.where(counted, exponents, math.inf)),
        ):
            columns[name] = torch.minimum(columns[name], least.amin(-1))
        for name, most in (
            ("max", torch.where(finite, values, -math.inf)),
            ("max_exponent", torch.where(counted, exponents, -math.inf)),
            ("largest", only.abs()),
        ):
            columns[name] = torch.maximum(columns[name], most.amax(-1))
        columns["total"] += values.shape[1]
        columns["finite"] += finite.sum(-1)
        columns["sum"] += only.sum(-1)
        columns["squares"] += only.square().sum(-1)
        columns["zeros"] += (values == 0).sum(-1)
        columns["nan"] += values.isnan().sum(-1)
        columns["inf"] += values.isinf().sum(-1)
        columns["saturated"] += (finite & (size >= self._largest)).sum(-1)
        if self._limits:
            columns["subnormals"] += (counted & (size < self._limits.smallest_normal)).sum(-1)

    def rows(self, layer: int, part: str, *, per_head: bool) -> list[PartStatistics]:
        """What they come to, by row."""
        lists = {name: column.tolist() for name, column in self._columns.items()}
        found = []
        for head in range(len(lists["total"])):
            row = {name: column[head] for name, column in lists.items()}
            found.append(self._row(row, layer, part, head if per_head else None))
        return found

    def _row(self, row: dict[str, float], layer: int, part: str, head: int | None) -> PartStatistics:
        some = bool(row["finite"])
        has_exponents = math.isfinite(row["min_exponent"])
        return PartStatistics(
            layer=layer,
            part=part,
            head=head,
            min=row["min"] if some else math.nan,
            max=row["max"] if some else math.nan,
            mean=row["sum"] / row["finite"] if some else math.nan,
            norm=math.sqrt(row["squares"]) if some else math.nan,
            zeros=int(row["zeros"]),
            nan=int(row["nan"]),
            inf=int(row["inf"]),
            of_max=row["largest"] / self._largest,
            min_exponent=int(row["min_exponent"]) if has_exponents else None,
            max_exponent=int(row["max_exponent"]) if has_exponents else None,
            subnormals=int(row["subnormals"]),
            subnormal_share=row["subnormals"] / max(1.0, row["total"]),
            saturated=int(row["saturated"]),
        )


def statistics_of(block: torch.Tensor, *, per_head: bool) -> list[PartStatistics]:
    """Of each layer's K and V, or latent, of a block, (num_layers, kv_dim, num_kv_heads, tokens, head_size)."""
    numbers: dict[tuple[int, str], Accumulator] = {}
    add_block(numbers, block, per_head=per_head)
    return [row for (layer, part), one in numbers.items() for row in one.rows(layer, part, per_head=per_head)]


def add_block(numbers: dict[tuple[int, str], Accumulator], block: torch.Tensor, *, per_head: bool) -> None:
    """Take a block, (num_layers, kv_dim, num_kv_heads, tokens, head_size), into the numbers of each (layer, part)."""
    for layer, of_layer in enumerate(block):
        for part, values in zip(PARTS[block.shape[1]], of_layer, strict=True):
            rows = values.flatten(1) if per_head else values.reshape(1, -1)
            if (layer, part) not in numbers:
                numbers[layer, part] = Accumulator(len(rows), block.dtype)
            numbers[layer, part].add(rows)


def statistics_table(statistics: Sequence[PartStatistics]) -> RenderableType:
    """For people."""
    columns = [name for name in COLUMNS if name != "head" or statistics[0].head is not None]
    return table("", columns, (s.cells() for s in statistics), left=2)
