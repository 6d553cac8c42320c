"""`kvstore gc` and `kvstore purge`: what is to go, by size, age, namespace, model or key; and that it goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import RenderableType

from kvstore.errors import ConfigError
from kvstore.journal_view import JournalView
from kvstore.journal_writer import tenant_digest
from kvstore.keys import BlockKey, keys_to_array
from kvstore.slot import read_integrity_key
from kvstore.tiers.catalog import Space
from kvstore.tiers.removal import Candidates, candidates
from tools.blocks import find
from tools.choice import Choice
from tools.output import age, lines, progress, size, table
from tools.places import find_catalogs

COLUMNS = ("tier", "path", "chunks", "blocks", "bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to go. Of those that are given a chunk must meet all; ``max_nbytes`` then takes the oldest of those.

    Attributes:
        keys: that the chunk holds one of.
        model: the model's whole name. namespace: its first digits.
        older_than_s: stored (disk), or last used, to the hour (shared), so long ago.
        old_epochs: of namespaces that only stores find which wrote to them since their reset.
        max_nbytes: the oldest go, until the directory holds no more than this.
    """

    keys: Sequence[BlockKey] | None = None
    model: str | None = None
    namespace: str | None = None
    tier: str | None = None
    older_than_s: float | None = None
    old_epochs: bool = False
    max_nbytes: int | None = None

    def of(self, found: Candidates, now_ns: int) -> NDArray[np.bool_]:
        """Which chunks; shape (n,)."""
        are_meant = np.array([self._means(space) for space in found.spaces], dtype=np.bool_)
        where: NDArray[np.bool_] = np.zeros(len(found), dtype=np.bool_)
        where[:] = are_meant[found.space_of]
        if self.keys is not None:
            where &= _hold_one(found.keys, keys_to_array(self.keys))
        if self.older_than_s is not None:
            where &= found.times_ns <= now_ns - int(self.older_than_s * 1e9)
        if self.max_nbytes is not None:
            where &= _oldest(found, where, int(found.nbytes.sum()) - self.max_nbytes)
        return where

    def _means(self, space: Space) -> bool:
        fmt = space.fmt
        if self.tier is not None and space.tier != self.tier:
            return False
        if self.model is not None and (fmt is None or fmt.content.get("model") != self.model):
            return False
        if self.old_epochs and (fmt is None or space.namespace == fmt.initial_namespace):
            return False
        return self.namespace is None or space.namespace.hex().startswith(self.namespace.lower())


@dataclass(slots=True)
class Part:
    """Of one directory."""

    tier: str
    path: str
    chunks: int
    blocks: int
    nbytes: int


@dataclass(slots=True)
class Removed:
    """What has gone, or would go.

    Attributes:
        is_whole: False where it was interrupted.
    """

    is_dry_run: bool
    parts_: list[Part] = field(default_factory=list)
    is_whole: bool = True

    def to_dict(self) -> dict[str, Any]:
        return {"dry_run": self.is_dry_run, "whole": self.is_whole, "removed": [asdict(part) for part in self.parts_]}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        rows = [(p.tier, p.path, p.chunks, p.blocks, size(p.nbytes)) for p in self.parts_ if p.chunks]
        what = "would go" if self.is_dry_run else "removed"
        if rows:
            yield table(what, COLUMNS, rows, left=2)
        else:
            yield from lines(f"nothing {'would go' if self.is_dry_run else 'was to go'}")
        if not self.is_whole:
            yield from lines("interrupted: the rest is as it was")


def remove(
    path: Path,
    wanted: Wanted,
    *,
    integrity_key_file: str | None = None,
    confirm: Callable[[Removed], bool] | None = None,
) -> Removed:
    """Remove chunks of all directories in a path.

    Args:
        confirm: asked with what would go; None: a dry run.
    Raises:
        ConfigError: there is nothing of a tier there.
        RemovalError: a directory cannot be written.
    """
    key = read_integrity_key(integrity_key_file)
    chosen: list[tuple[Candidates, NDArray[np.bool_], Part]] = []
    for catalog in find_catalogs(path, integrity_key_file):
        found = candidates(catalog, key)
        where = wanted.of(found, time.time_ns())
        part = Part(catalog.tier, str(catalog.path), int(where.sum()), found.num_blocks(where),
                    int(found.nbytes[where].sum()))  # fmt: skip
        chosen.append((found, where, part))
    would = Removed(is_dry_run=True, parts_=[part for _, _, part in chosen])
    if confirm is None or not any(part.chunks for _, _, part in chosen) or not confirm(would):
        return would if confirm is None else Removed(is_dry_run=False)
    removed = Removed(is_dry_run=False)
    for found, where, part in chosen:
        _remove(found, where, part, removed)
        if not removed.is_whole:
            break
    return removed


def _remove(found: Candidates, where: NDArray[np.bool_], part: Part, removed: Removed) -> None:
    gone = 0

    def count(n: int) -> None:
        nonlocal gone
        gone += n
        advance(n)

    with progress(f"{part.tier} {part.path}", part.chunks) as advance:
        try:
            part.chunks = found.remove(where, count)
        except KeyboardInterrupt:
            part.chunks, removed.is_whole = gone, False
    left = np.flatnonzero(where)[: part.chunks]
    mine = np.zeros(len(where), dtype=np.bool_)
    mine[left] = True
    part.blocks, part.nbytes = found.num_blocks(mine), int(found.nbytes[mine].sum())
    removed.parts_.append(part)


def keys_of(path: Path, choice: Choice, integrity_key_file: str | None) -> list[BlockKey]:
    """Keys that a person has chosen and that are stored."""
    return [there[0].key for there in find(find_catalogs(path, integrity_key_file), choice)]


def keys_of_tenant(journal: Path | None, tenant: str) -> tuple[list[BlockKey], str]:
    """Keys of all that a tenant's requests asked for or stored, and how far the journal goes back.

    Args:
        tenant: the salt, or its digest as ``kvstore ls --journal`` shows it.
    Raises:
        ConfigError: there is no journal, or it knows no such tenant.
    """
    if journal is None or not tenant:
        raise ConfigError("--of-tenant: only a journal knows tenants; give a salt, and --journal too")
    view = JournalView.of(journal)
    hashes = view.hashes_of_tenant(tenant_digest(tenant)) or view.hashes_of_tenant(tenant.lower())
    if not hashes:
        raise ConfigError(f"--of-tenant: the journal has no requests of {tenant!r}")
    num_groups = max(opened.num_groups for opened in view.opened)
    keys = [BlockKey.of(block_hash, group) for block_hash in sorted(hashes) for group in range(num_groups)]
    return keys, age((time.time_ns() - view.first_ns) / 1e9)


def check_given(options: dict[str, object]) -> None:
    """Raises ConfigError where nothing says what is to go."""
    if not any(options.values()):
        raise ConfigError(f"say what is to go: one of {', '.join(options)}")


def _hold_one(keys: NDArray[np.uint8], wanted: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which chunks hold one of these keys."""
    item = f"V{keys.shape[2]}"
    voids = np.ascontiguousarray(keys).view(item).reshape(keys.shape[:2])
    are_wanted: NDArray[np.bool_] = np.isin(voids, np.ascontiguousarray(wanted).view(item).reshape(-1))
    return np.asarray(are_wanted.any(axis=1))


def _oldest(found: Candidates, where: NDArray[np.bool_], excess: int) -> NDArray[np.bool_]:
    """Of these, the oldest whose sizes add up to so much."""
    order = np.flatnonzero(where)[np.argsort(found.times_ns[where], kind="stable")]
    before = np.cumsum(found.nbytes[order]) - found.nbytes[order]
    chosen = np.zeros(len(where), dtype=np.bool_)
    chosen[order[before < excess]] = True
    return chosen
