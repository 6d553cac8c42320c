"""Which blocks an option of `kvstore purge` names: namespaces with keys, for models of one tokenizer share keys."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.journal_view import JournalView
from kvstore.journal_writer import tenant_digest
from kvstore.keys import BLOCK_HASH_NBYTES, KEY_NBYTES
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.removal import Candidates
from tools.blocks import find
from tools.choice import Choice
from tools.output import age


@dataclass(frozen=True, slots=True)
class Selection:
    """Blocks by namespace.

    Attributes:
        ids: namespace -> keys, or the first bytes of keys: a block hash is that of all KV cache groups.
        nbytes: of each of those.
    """

    ids: Mapping[bytes, Iterable[bytes]]
    nbytes: int

    def of(self, found: Candidates) -> NDArray[np.bool_]:
        """Which blocks of which chunks; shape (n, blocks)."""
        are_meant = np.zeros(found.keys.shape[:2], dtype=np.bool_)
        for i, space in enumerate(found.spaces):
            ids = b"".join(self.ids.get(space.namespace, ()))
            if ids:
                wanted = np.frombuffer(ids, dtype=f"V{self.nbytes}")
                rows = np.flatnonzero(found.space_of == i)
                heads = np.ascontiguousarray(found.keys[rows, :, : self.nbytes]).view(wanted.dtype)[..., 0]
                are_meant[rows] = np.isin(heads, wanted)
        return are_meant


def of_choice(catalogs: Sequence[Catalog], choice: Choice) -> Selection:
    """Keys, a prompt or a request, where they are stored.

    Raises:
        ConfigError, NotStoredError: see `tools.blocks.find`.
    """
    nbytes = KEY_NBYTES if choice.starts() else BLOCK_HASH_NBYTES
    ids: dict[bytes, set[bytes]] = {}
    for there in find(catalogs, choice):
        for place in there:
            ids.setdefault(place.chunk.space.namespace, set()).add(bytes(place.key[:nbytes]))
    return Selection(ids, nbytes)


def of_tenant(view: JournalView | None, tenant: str) -> tuple[Selection, str]:
    """All that a tenant's requests asked for or stored, and how far the journal goes back.

    Args:
        tenant: the salt, or its digest as ``kvstore ls --journal`` shows it.
    Raises:
        ConfigError: there is no journal, or it knows no such tenant.
    """
    if view is None or not tenant:
        raise ConfigError("--of-tenant: only a journal knows tenants; give a salt, and --journal too")
    hashes = view.hashes_of_tenant(tenant_digest(tenant)) or view.hashes_of_tenant(tenant.lower())
    if not any(hashes.values()):
        raise ConfigError(f"--of-tenant: the journal has no requests of {tenant!r}")
    return Selection(hashes, BLOCK_HASH_NBYTES), age((time.time_ns() - view.first_ns) / 1e9)
