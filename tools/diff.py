"""`kvstore diff`: which blocks of two belong together, and which only one of them has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError, NotStoredError
from kvstore.keys import BlockKey
from tools.choice import Choice
from tools.comparison import Comparison, first_token
from tools.difference import Counted, Difference, Missing
from tools.held import Held, held, stored
from tools.layer_sums import Tolerance
from tools.stored_keys import Part, StoredKeys, parts

MOST_BLOCKS: Final = 1_500_000  # whose keys are in memory at a time, some 100 bytes each
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

    @property
    def is_whole_store(self) -> bool:
        return self.choice is None and not self.path.is_file()


def diff(
    a: Side, b: Side, *, tolerance: Tolerance, by_position: bool, integrity_key_file: str | None = None
) -> Difference:
    """Compare what two stores' directories, or dumps, hold. Memory does not grow with stores.

    Args:
        by_position: block i of a's prompt, file or keys with block i of b's, whatever their keys: the same prompt by
            two models.
    Raises:
        ConfigError, NotStoredError: see `tools.held`; blocks have no positions; there is nothing to compare.
    """
    comparison = Comparison(tolerance)
    if by_position or not (a.is_whole_store or b.is_whole_store):
        with held(a.path, a.choice, integrity_key_file) as of_a, held(b.path, b.choice, integrity_key_file) as of_b:
            if by_position:
                _compare(comparison, _by_index(of_a, a.path), _by_index(of_b, b.path))
            else:
                _compare(comparison, _by_key(of_a), _by_key(of_b))
    elif a.is_whole_store and b.is_whole_store:
        _compare_stores(comparison, *(StoredKeys(side.path, integrity_key_file) for side in (a, b)))
    elif a.is_whole_store:
        store = StoredKeys(a.path, integrity_key_file)
        with held(b.path, b.choice, integrity_key_file) as of_b:
            theirs = _by_key(of_b)
            _compare(comparison, _also_stored(store, theirs, comparison.found.only_a), theirs)
    else:
        store = StoredKeys(b.path, integrity_key_file)
        with held(a.path, a.choice, integrity_key_file) as of_a:
            mine = _by_key(of_a)
            _compare(comparison, mine, _also_stored(store, mine, comparison.found.only_b))
    found = comparison.result()
    if not found.common and not found.num_not_compared:
        raise NotStoredError(f"nothing was compared: neither {str(a.path)!r} nor {str(b.path)!r} holds a block")
    return found


# -- blocks that are named, and files


def _by_key(blocks: Iterable[Held]) -> dict[BlockKey, Held]:
    return {block.key: block for block in blocks}


def _by_index(blocks: Sequence[Held], path: Path) -> dict[int, Held]:
    by_index: dict[int, Held] = {}
    for block in blocks:
        assert block.index is not None
        other = by_index.setdefault(block.index, block)
        if other is not block:
            raise ConfigError(
                f"--by-position: {str(path)!r} has this prompt of {other.model!r} and of {block.model!r}; give a PATH "
                "that holds one"
            )
    return by_index


def _compare(comparison: Comparison, mine: Mapping[At, Held], theirs: Mapping[At, Held]) -> None:
    """Those of which both have one, by position where they have any; what only one has is noted."""
    found = comparison.found
    for only, blocks, others in ((found.only_a, mine, theirs), (found.only_b, theirs, mine)):
        missing = [Missing(str(block.key), block.token) for at, block in blocks.items() if at not in others]
        only.add(len(missing), missing)
    pairs = [(block, theirs[at]) for at, block in mine.items() if at in theirs]
    if None not in map(first_token, pairs):
        pairs.sort(key=lambda pair: first_token(pair) or 0)
    comparison.add(pairs, len(pairs))


# -- whole stores


def _compare_stores(comparison: Comparison, a: StoredKeys, b: StoredKeys) -> None:
    ranges = parts(a.counts() + b.counts(), MOST_BLOCKS)
    for number, first_bytes in enumerate(ranges, start=1):
        _compare_part(comparison, a, b, first_bytes, f"part {number} of {len(ranges)}")


def _compare_part(comparison: Comparison, a: StoredKeys, b: StoredKeys, first_bytes: range, said: str) -> None:
    """Note what only one has, then compare the numbers of what both have."""
    mine, theirs = a.part(first_bytes, said), b.part(first_bytes, said)
    at = theirs.find(mine.keys)
    _note(comparison.found.only_a, mine, at < 0)
    _note(comparison.found.only_b, theirs, mine.find(theirs.keys) < 0)
    both = mine.in_order(at >= 0)
    pairs = (
        (stored(a.places(mine, i)), stored(b.places(theirs, j)))
        for i, j in zip(both.tolist(), at[both].tolist(), strict=True)
    )
    comparison.add(pairs, len(both), f"{said}: comparing")


def _also_stored(store: StoredKeys, named: Mapping[BlockKey, Held], only: Counted[Missing]) -> dict[BlockKey, Held]:
    """Those of these blocks that the store has too; its others are noted."""
    found: dict[BlockKey, Held] = {}
    ranges = parts(store.counts(), MOST_BLOCKS)
    for number, first_bytes in enumerate(ranges, start=1):
        part = store.part(first_bytes, f"part {number} of {len(ranges)}")
        is_named = part.is_any_of(named)
        _note(only, part, ~is_named)
        found |= {part.key(i): stored(store.places(part, i)) for i in part.in_order(is_named).tolist()}
    return found


def _note(only: Counted[Missing], part: Part, which: NDArray[np.bool_]) -> None:
    blocks = part.in_order(which).tolist()
    only.add(len(blocks), (Missing(str(part.key(i)), None) for i in blocks))
