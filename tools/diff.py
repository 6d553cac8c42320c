"""`kvstore diff`: which blocks only one of two has, and how far the numbers of the others are apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import RenderableType

from kvstore.errors import ConfigError
from kvstore.keys import BlockKey
from kvstore.prefix_file import PrefixFile
from tools.blocks import find, places, read_any
from tools.choice import Choice
from tools.output import lines, progress, table
from tools.places import find_catalogs

COLUMNS: Final = ("layer", "part", "max |a-b|", "relative", "cosine")
_SHOWN: Final = 5
Read = Callable[[], torch.Tensor | None]
"""A block's numbers, shape `KVLayout.block_shape`; None where they are damaged, or cannot be told."""


@dataclass(slots=True)
class LayerDifference:
    """K or V of one layer, over all blocks that both have.

    Attributes:
        relative: norm of the difference, as a share of a's norm.
        cosine: of the two, as vectors; 1 where they point the same way.
    """

    layer: int
    part: str
    max_abs: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where the numbers are apart for the first time.

    Attributes:
        token: within its block, and ``position`` over the blocks that were compared.
    """

    key: str
    position: int
    token: int
    layer: int
    part: str


@dataclass(slots=True)
class Difference:
    """Attributes:
    first_layer: the lowest layer in which a number is apart anywhere; None where none is.
    """

    common: int = 0
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    first: Divergence | None = None
    first_layer: int | None = None

    @property
    def is_equal(self) -> bool:
        return not (self.only_a or self.only_b or self.unreadable or self.first)

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.is_equal, **asdict(self)}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        for what, keys in (("only a has", self.only_a), ("only b has", self.only_b), ("unreadable", self.unreadable)):
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                yield from lines(f"{what}: {', '.join(key[:16] for key in keys[:_SHOWN])}{more}")
        if self.layers:
            rows = ([str(d.layer), d.part, *(f"{v:.3g}" for v in (d.max_abs, d.relative)), f"{d.cosine:.6f}"]
                    for d in self.layers)  # fmt: skip
            yield table(f"{self.common} blocks that both have", COLUMNS, rows, left=2)
        if self.first is not None:
            at = self.first
            yield from lines(
                f"apart from token {at.position} on (token {at.token} of block {at.key[:16]}): layer {at.layer}, "
                f"{at.part}",
                f"the lowest layer that is apart anywhere: {self.first_layer}",
            )
        else:
            yield from lines(
                f"{self.common} blocks are equal, within the tolerance" if self.common else "none in common"
            )


def diff(
    a: Path, b: Path, choice: tuple[Choice | None, Choice | None], *, atol: float, rtol: float, by_position: bool
) -> Difference:
    """Compare what two stores' directories, or dumps, hold.

    Args:
        choice: which of a's, and of b's, blocks; by default all.
        atol, rtol: numbers are apart where ``|a - b| > atol + rtol * |b|``.
        by_position: the first with the first, and so on, whatever their keys: the same prompt by two models.
    Raises:
        ConfigError, NotStoredError: see `tools.blocks`.
    """
    with ExitStack() as stack:
        of_a, of_b = (_blocks(path, chosen, stack) for path, chosen in zip((a, b), choice, strict=True))
        pairs: list[tuple[BlockKey, Read, Read]]
        if by_position:
            if len(of_a) != len(of_b):
                raise ConfigError(f"--by-position: a has {len(of_a)} blocks, and b {len(of_b)}")
            pairs = [(key, mine, theirs) for (key, mine), theirs in zip(of_a.items(), of_b.values(), strict=True)]
            found = Difference()
        else:
            pairs = [(key, mine, of_b[key]) for key, mine in of_a.items() if key in of_b]
            found = Difference(only_a=[str(k) for k in of_a if k not in of_b],
                               only_b=[str(k) for k in of_b if k not in of_a])  # fmt: skip
        _compare(found, pairs, atol, rtol)
    return found


def _blocks(path: Path, choice: Choice | None, stack: ExitStack) -> dict[BlockKey, Read]:
    if path.is_file():
        if choice is not None and choice.starts() == []:
            raise ConfigError(f"{path} is a file; a prompt's blocks are looked for in directories")
        file = PrefixFile(path)
        stack.callback(file.close)
        if file.header.is_raw:
            raise ConfigError(f"{path}: what K and V are in it cannot be told")
        starts = () if choice is None else tuple(choice.starts())
        return {
            key: partial(file.block, i) for i, key in enumerate(file.keys) if not starts or str(key).startswith(starts)
        }
    catalogs = find_catalogs(path)
    if choice is not None:
        return {found[0].key: partial(_read, found) for found in find(catalogs, choice)}
    found: dict[BlockKey, list[Any]] = {}
    for place in places(catalogs):
        found.setdefault(place.key, []).append(place)
    return {key: partial(_read, there) for key, there in found.items()}


def _read(there: Sequence[Any]) -> torch.Tensor | None:
    return read_any(there).kv


def _compare(found: Difference, pairs: Sequence[tuple[BlockKey, Read, Read]], atol: float, rtol: float) -> None:
    sums: torch.Tensor | None = None  # a², b², ab, (a-b)², by layer and part
    most: torch.Tensor | None = None
    apart_LP: torch.Tensor | None = None
    position = 0
    with progress("comparing", len(pairs)) as advance:
        for key, mine, theirs in pairs:
            advance(1)
            a, b = mine(), theirs()
            if a is None or b is None:
                found.unreadable.append(str(key))
                continue
            if a.shape != b.shape:
                raise ConfigError(f"blocks of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
            a, b = a.to(torch.float64), b.to(torch.float64)
            apart = ~((a - b).abs() <= atol + rtol * b.abs()) & ~(a.isnan() & b.isnan())
            delta = (a - b).abs().nan_to_num(nan=float("inf"))
            if sums is None or most is None or apart_LP is None:
                sums, most = (
                    torch.zeros(4, *a.shape[:2], dtype=torch.float64),
                    torch.zeros(a.shape[:2], dtype=torch.float64),
                )
                apart_LP = torch.zeros(a.shape[:2], dtype=torch.bool)
            sums += torch.stack([(x * y).flatten(2).sum(-1) for x, y in ((a, a), (b, b), (a, b), (delta, delta))])
            most = torch.maximum(most, delta.flatten(2).amax(-1))
            apart_LP |= apart.flatten(2).any(-1)
            if found.first is None and apart.any():
                found.first = _first(key, apart, position)
            found.common += 1
            position += a.shape[3]
    if sums is not None and most is not None and apart_LP is not None:
        found.layers = _layers(sums, most)
        lowest = apart_LP.any(-1).nonzero()
        found.first_layer = int(lowest[0]) if len(lowest) else None


def _first(key: BlockKey, apart: torch.Tensor, position: int) -> Divergence:
    """The first token, and of that the first layer; ``apart`` has shape (layers, kv, heads, tokens, size)."""
    token = int(apart.flatten(0, 2).any(-1).any(0).nonzero()[0])
    layer, part = (int(i) for i in apart[:, :, :, token].flatten(2).any(-1).nonzero()[0])
    return Divergence(str(key), position + token, token, layer, _names(apart.shape[1])[part])


def _layers(sums: torch.Tensor, most: torch.Tensor) -> list[LayerDifference]:
    aa, bb, ab, dd = sums
    relative = (dd / aa).sqrt().nan_to_num(nan=0.0, posinf=float("inf"))
    cosine = (ab / (aa * bb).sqrt()).nan_to_num(nan=1.0)
    return [
        LayerDifference(layer, name, float(most[layer, i]), float(relative[layer, i]), float(cosine[layer, i]))
        for layer in range(most.shape[0])
        for i, name in enumerate(_names(most.shape[1]))
    ]


def _names(kv_dim: int) -> str:
    return "KV" if kv_dim == 2 else "L"
