"""`kvstore gc` and `kvstore purge`: what is to go, by size, age, namespace, model or key; and that it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.slot import read_integrity_key
from kvstore.tiers.catalog import Catalog, Space
from kvstore.tiers.removal import Candidates, candidates
from tools.names import check_namespace, check_there, model_like
from tools.output import progress
from tools.removed import Removed, Tenants
from tools.selection import Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to go. A block must meet all that are given, and its chunk goes as a whole; ``max_nbytes`` then takes the
    oldest of those chunks.

    Attributes:
        selections: a block must be in each.
        model: its name, or a part that is in no other one's. namespace: its first digits.
        older_than_s: stored (disk), or last used, to the hour (shared), so long ago.
        old_epochs: of namespaces that only stores find which wrote to them since their reset.
        max_nbytes: the oldest go, until the directory holds no more than this.
    """

    selections: Sequence[Selection] = ()
    model: str | None = None
    namespace: str | None = None
    tier: str | None = None
    older_than_s: float | None = None
    old_epochs: bool = False
    max_nbytes: int | None = None

    def __post_init__(self) -> None:
        if self.namespace is not None:
            check_namespace(self.namespace)

    def known_in(self, every: Sequence[Candidates], catalogs: Sequence[Catalog]) -> Wanted:
        """With the whole name of the model.

        Raises:
            NotStoredError: there is no such model, or no such namespace, in any of these.
        """
        spaces = [space for found in every for space in found.spaces]
        if self.namespace is not None:
            check_there(self.namespace, (space.namespace for space in spaces))
        if self.model is None:
            return self
        formats = [fmt for catalog in catalogs for fmt in catalog.formats()]
        return replace(self, model=model_like(self.model, (fmt.content.get("model") for fmt in formats)))

    def of(self, found: Candidates, now_ns: int) -> NDArray[np.bool_]:
        """Which blocks of which chunks; shape (n, blocks)."""
        are_meant = np.array([self._means(space) for space in found.spaces], dtype=np.bool_)
        where: NDArray[np.bool_] = np.zeros(len(found), dtype=np.bool_)
        where[:] = are_meant[found.space_of]
        named: NDArray[np.bool_] = np.asarray(found.keys.any(axis=2))
        for selection in self.selections:
            named &= selection.of(found)
        where &= named.any(axis=1)
        if self.older_than_s is not None:
            where &= found.times_ns <= now_ns - int(self.older_than_s * 1e9)
        if self.max_nbytes is not None:
            where &= _oldest(found, where, int(found.nbytes.sum()) - self.max_nbytes)
        return np.asarray(named & where[:, None])

    def _means(self, space: Space) -> bool:
        fmt = space.fmt
        if self.tier is not None and space.tier != self.tier:
            return False
        if self.model is not None and (fmt is None or str(fmt.content.get("model")) != self.model):
            return False
        if self.old_epochs and (fmt is None or space.namespace == fmt.initial_namespace):
            return False
        return self.namespace is None or space.namespace.hex().startswith(self.namespace.lower())


def remove(
    catalogs: Sequence[Catalog],
    wanted: Wanted,
    *,
    tenants: Tenants | None = None,
    integrity_key_file: str | None = None,
    confirm: Callable[[Removed], bool] | None = None,
) -> Removed:
    """Remove chunks of directories.

    Args:
        tenants: whose blocks are, as far as a journal knows; only to be told.
        confirm: asked with what would go; None: a dry run.
    Raises:
        NotStoredError: see `Wanted.known_in`; nothing was removed.
        RemovalError: a directory cannot be written.
    """
    key = read_integrity_key(integrity_key_file)
    every = [candidates(catalog, key) for catalog in catalogs]
    wanted, now_ns = wanted.known_in(every, catalogs), time.time_ns()
    chosen = [(found, wanted.of(found, now_ns)) for found in every]
    would = Removed(is_dry_run=True)
    for found, named in chosen:
        would.add(found, named, tenants)
    if confirm is None:
        return would
    removed = Removed(is_dry_run=False)
    if not would.rows or not confirm(would):
        return removed
    for catalog, (found, named) in zip(catalogs, chosen, strict=True):
        removed.add(found, named & _remove(catalog, found, named, removed)[:, None], tenants)
        if not removed.is_whole:
            break
    return removed


def _remove(catalog: Catalog, found: Candidates, named: NDArray[np.bool_], removed: Removed) -> NDArray[np.bool_]:
    """Which chunks have gone; shape (n,)."""
    gone, where = 0, np.asarray(named.any(axis=1))

    def count(n: int) -> None:
        nonlocal gone
        gone += n
        advance(n)

    with progress(f"{catalog.tier} {catalog.path}", int(where.sum())) as advance:
        try:
            gone = found.remove(where, count)
        except KeyboardInterrupt:
            removed.is_whole = False
    mine = np.zeros(len(where), dtype=np.bool_)
    mine[np.flatnonzero(where)[:gone]] = True
    return mine


def check_given(options: dict[str, object]) -> None:
    """Raises ConfigError where nothing says what is to go."""
    if not any(options.values()):
        raise ConfigError(f"say what is to go: one of {', '.join(options)}")


def _oldest(found: Candidates, where: NDArray[np.bool_], excess: int) -> NDArray[np.bool_]:
    """Of these, the oldest whose sizes add up to so much."""
    order = np.flatnonzero(where)[np.argsort(found.times_ns[where], kind="stable")]
    before = np.cumsum(found.nbytes[order]) - found.nbytes[order]
    chosen = np.zeros(len(where), dtype=np.bool_)
    chosen[order[before < excess]] = True
    return chosen
