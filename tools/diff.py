"""`kvstore diff`: which blocks only one of two has, and how far the numbers of the others are apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from kvstore.errors import ConfigError, NotStoredError
from tools.choice import Choice
from tools.difference import Difference, Divergence, Missing
from tools.held import Held, held
from tools.layer_sums import LayerSums, Tolerance, names_of_parts
from tools.output import progress

At = TypeVar("At")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that are compared.

    Attributes:
        path: a store's directory, or a dumped file.
        choice: which of its blocks; None: all.
    """

    path: Path
    choice: Choice | None = None


def diff(
    a: Side, b: Side, *, tolerance: Tolerance, by_position: bool, integrity_key_file: str | None = None
) -> Difference:
    """Compare what two stores' directories, or dumps, hold.

    Args:
        by_position: block i of a's prompt, file or keys with block i of b's, whatever their keys: the same prompt by
            two models.
    Raises:
        ConfigError, NotStoredError: see `tools.held`; blocks have no positions; there is nothing to compare.
    """
    with held(a.path, a.choice, integrity_key_file) as of_a, held(b.path, b.choice, integrity_key_file) as of_b:
        if by_position:
            mine, theirs = (_by_index(blocks, side.path) for blocks, side in ((of_a, a), (of_b, b)))
            found, pairs = _paired(mine, theirs)
        else:
            found, pairs = _paired({block.key: block for block in of_a}, {block.key: block for block in of_b})
        if not pairs and not found.only_a and not found.only_b:
            raise NotStoredError(f"nothing was compared: neither {str(a.path)!r} nor {str(b.path)!r} holds a block")
        _compare(found, pairs, tolerance)
    return found


def _by_index(blocks: Sequence[Held], path: Path) -> dict[int, Held]:
    by_index: dict[int, Held] = {}
    for block in blocks:
        if block.index is None:
            raise ConfigError(
                f"--by-position: the blocks of the store {str(path)!r} have no order; name them by --tokens, --text, "
                "--request or --key"
            )
        other = by_index.setdefault(block.index, block)
        if other is not block:
            raise ConfigError(
                f"--by-position: {str(path)!r} has this prompt of {other.model!r} and of {block.model!r}; give a PATH "
                "that holds one"
            )
    return by_index


def _paired(mine: Mapping[At, Held], theirs: Mapping[At, Held]) -> tuple[Difference, list[tuple[Held, Held]]]:
    """Those of which both have one, by position where they have any, and what only one has."""
    found = Difference(
        only_a=_missing(block for at, block in mine.items() if at not in theirs),
        only_b=_missing(block for at, block in theirs.items() if at not in mine),
    )
    pairs = [(block, theirs[at]) for at, block in mine.items() if at in theirs]
    tokens = [_token(pair) for pair in pairs]
    if None not in tokens:
        pairs.sort(key=lambda pair: _token(pair) or 0)
    return found, pairs


def _missing(blocks: Iterable[Held]) -> list[Missing]:
    return [Missing(str(block.key), block.token) for block in blocks]


def _token(pair: tuple[Held, Held]) -> int | None:
    """The first of a pair's tokens: of the prompt or, where one is a file, of that."""
    a, b = pair
    return b.token if a.token is None else a.token


def _compare(found: Difference, pairs: Sequence[tuple[Held, Held]], tolerance: Tolerance) -> None:
    sums: LayerSums | None = None
    for pair, a, b in _read(found, pairs):
        if sums is None:
            sums = LayerSums(a.shape[0], a.shape[1])
        elif a.shape[:2] != sums.shape:
            raise ConfigError(f"blocks of {a.shape[0]} layers, and of {sums.shape[0]}, cannot be counted together")
        token = _token(pair)
        apart = sums.add(a, b, tolerance, token)
        if apart.any():
            found.blocks_apart += 1
            found.first = found.first or _divergence(pair[0], apart, token)
        found.common += 1
    if sums is not None:
        found.layers = sums.layers()
        found.is_exact = tolerance.is_exact


def _read(
    found: Difference, pairs: Sequence[tuple[Held, Held]]
) -> Iterator[tuple[tuple[Held, Held], torch.Tensor, torch.Tensor]]:
    """Pairs with their numbers; those that cannot be read are noted."""
    with progress("comparing", len(pairs)) as advance:
        for pair in pairs:
            advance(1)
            a, b = pair[0].read(), pair[1].read()
            if a is None or b is None:
                found.unreadable.append(str(pair[0].key))
                continue
            if a.shape != b.shape:
                raise ConfigError(f"blocks of shape {tuple(a.shape)} and {tuple(b.shape)} cannot be compared")
            yield pair, a, b


def _divergence(block: Held, apart: torch.Tensor, position: int | None) -> Divergence:
    """The first token, and of that the first layer; ``apart`` has shape (layers, kv, heads, tokens, size)."""
    token = int(apart.flatten(0, 2).any(-1).any(0).nonzero()[0])
    layer, part = (int(i) for i in apart[:, :, :, token].flatten(2).any(-1).nonzero()[0])
    name = names_of_parts(apart.shape[1])[part]
    return Divergence(str(block.key), None if position is None else position + token, token, layer, name)
