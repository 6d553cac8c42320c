"""How far K and V of two prompts are apart, layer by layer, added up block after block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

_NONE: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Numbers are apart where ``|a - b| > atol + rtol * |b|``, and where only one of them is NaN, or infinite."""

    atol: float = 0.0
    rtol: float = 0.0

    @property
    def is_exact(self) -> bool:
        return not self.atol and not self.rtol


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """K or V of one layer, over all blocks that both have. Where both have NaN, or the same infinity, they are equal,
    and those numbers count nowhere else.

    Attributes:
        part: "K", "V", or "L": a latent.
        apart: how many numbers are.
        token: the first of which a number is apart; None where none is, or blocks have no order.
        max_abs: NaN where one has NaN and the other a number.
        relative: norm of the difference, as a share of a's norm.
        cosine: of the two, as vectors: 1 where they point the same way, or both are zero; 0 where one is zero; NaN
            where one has NaN, or infinities.
        norm_a, norm_b, nan_a, nan_b, inf_a, inf_b: of each: its norm, how many are NaN, and infinite.
    """

    layer: int
    part: str
    apart: int
    token: int | None
    max_abs: float
    relative: float
    cosine: float
    norm_a: float
    norm_b: float
    nan_a: int
    nan_b: int
    inf_a: int
    inf_b: int


class LayerSums:
    """Sums over blocks, each of shape (num_layers, kv_dim)."""

    def __init__(self, num_layers: int, kv_dim: int) -> None:
        self.shape = (num_layers, kv_dim)
        self._sums = torch.zeros(4, num_layers, kv_dim, dtype=torch.float64)  # a², b², ab, (a-b)²
        self._counts = torch.zeros(5, num_layers, kv_dim, dtype=torch.int64)  # apart; NaN a, b; infinite a, b
        self._most = torch.zeros(num_layers, kv_dim, dtype=torch.float64)
        self._first = torch.full((num_layers, kv_dim), _NONE, dtype=torch.int64)

    def add(self, a: torch.Tensor, b: torch.Tensor, tolerance: Tolerance, token: int | None) -> torch.Tensor:
        """One more block of each, shape `KVLayout.block_shape`; which numbers are apart.

        Args:
            token: the block's first.
        """
        a, b = a.to(torch.float64), b.to(torch.float64)
        same = (a == b) | (a.isnan() & b.isnan())
        delta = torch.where(same, 0.0, (a - b).abs())
        apart = ~same & ~(delta.isfinite() & (delta <= tolerance.atol + tolerance.rtol * b.abs()))
        counted = (apart, a.isnan(), b.isnan(), a.isinf(), b.isinf())
        self._counts += torch.stack([_by_part(which).sum(-1) for which in counted])
        a, b = (torch.where(same & ~x.isfinite(), 0.0, x) for x in (a, b))
        products = ((a, a), (b, b), (a, b), (delta, delta))
        self._sums += torch.stack([_by_part(x * y).sum(-1) for x, y in products])
        self._most = torch.maximum(self._most, _by_part(delta).amax(-1))  # also of NaN
        if token is not None:
            tokens_LPT = apart.any(-1).any(2)
            first = torch.where(tokens_LPT.any(-1), tokens_LPT.to(torch.uint8).argmax(-1) + token, _NONE)
            self._first = torch.minimum(self._first, first)
        return apart

    def layers(self) -> list[LayerDifference]:
        aa, bb, ab, dd = self._sums
        relative = torch.where(dd == 0, 0.0, (dd / aa).sqrt())
        cosine = (ab / (aa.sqrt() * bb.sqrt())).clamp(-1, 1)
        cosine = torch.where((aa == 0) ^ (bb == 0), 0.0, torch.where((aa == 0) & (bb == 0), 1.0, cosine))
        found = []
        for layer in range(self.shape[0]):
            for i, name in enumerate(names_of_parts(self.shape[1])):
                at = (layer, i)
                apart, *counts = (int(n[at]) for n in self._counts)
                first = int(self._first[at])
                most, share, angle = (float(x[at]) for x in (self._most, relative, cosine))
                norms = (float(aa[at].sqrt()), float(bb[at].sqrt()))
                token = None if first == _NONE else first
                found.append(LayerDifference(layer, name, apart, token, most, share, angle, *norms, *counts))
        return found


def names_of_parts(kv_dim: int) -> str:
    return "KV" if kv_dim == 2 else "L"


def _by_part(values: torch.Tensor) -> torch.Tensor:
    """(layers, kv, heads, tokens, size) -> (layers, kv, all of them)."""
    return values.flatten(2)
