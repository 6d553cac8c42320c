"""Compares the numbers of pairs of blocks, and adds up what it finds. What is a pair is `tools.diff`'s to say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from kvstore.errors import ConfigError
from tools.difference import Difference, Divergence
from tools.held import Held
from tools.layer_sums import LayerSums, Tolerance, names_of_parts
from tools.output import progress

Pair = tuple[Held, Held]


class Comparison:
    """Attributes:
    found: so far.
    """

    def __init__(self, tolerance: Tolerance) -> None:
        self.found = Difference(is_exact=tolerance.is_exact)
        self._tolerance = tolerance
        self._sums: LayerSums | None = None

    def add(self, pairs: Iterable[Pair], total: int, said: str = "comparing") -> None:
        """Read and compare ``total`` pairs more; with progress.

        Raises:
            ConfigError: blocks are of different shapes, or of several identities.
        """
        for pair, a, b in self._read(pairs, total, said):
            if self._sums is None:
                self._sums = LayerSums(a.shape[0], a.shape[1])
            elif a.shape[:2] != self._sums.shape:
                raise ConfigError(
                    f"blocks of {a.shape[0]} layers, and of {self._sums.shape[0]}, cannot be counted together"
                )
            token = first_token(pair)
            apart = self._sums.add(a, b, self._tolerance, token)
            if apart.any():
                self.found.blocks_apart += 1
                self.found.first = self.found.first or _divergence(pair[0], apart, token)
            self.found.common += 1

    def result(self) -> Difference:
        if self._sums is not None:
            self.found.layers = self._sums.layers()
        return self.found

    def _read(self, pairs: Iterable[Pair], total: int, said: str) -> Iterator[tuple[Pair, torch.Tensor, torch.Tensor]]:
        """Pairs with their numbers; those that cannot be read are noted."""
        with progress(said, total) as advance:
            for pair in pairs:
                advance(1)
                a, b = pair[0].read(), pair[1].read()
                if a is None or b is None:
                    self.found.unreadable.add(1, [str(pair[0].key)])
                    continue
                if a.shape != b.shape:
                    raise ConfigError(f"blocks of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
                yield pair, a, b


def first_token(pair: Pair) -> int | None:
    """The first of a pair's tokens: of the prompt or, where one is a file, of that."""
    a, b = pair
    return b.token if a.token is None else a.token


def _divergence(block: Held, apart: torch.Tensor, position: int | None) -> Divergence:
    """The first token, and of that the first layer; ``apart`` has shape (layers, kv, heads, tokens, size)."""
    token = int(apart.flatten(0, 2).any(-1).any(0).nonzero()[0])
    layer, part = (int(i) for i in apart[:, :, :, token].flatten(2).any(-1).nonzero()[0])
    name = names_of_parts(apart.shape[1])[part]
    return Divergence(str(block.key), None if position is None else position + token, token, layer, name)
