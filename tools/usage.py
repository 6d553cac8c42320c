"""Who asked for what is stored: requests, hits and tenants by namespace, from a journal.

A journal knows which kind of tier had a block, not in which directory: so that this is said by namespace, once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from rich.console import RenderableType

from kvstore.journal_entries import Request
from tools.journal_stats import TIERS, hits_by_tier
from tools.output import lines, table

_OTHER: Final = "other"
_MOST_TENANTS: Final = 8


@dataclass(slots=True, kw_only=True)
class Usage:
    """Requests of one namespace, as far as a journal goes back.

    Attributes:
        asked_blocks: full blocks of all prompts.
        hits: tier -> leading blocks of prompts that were found there.
        tenants: digest, empty without one -> requests.
    """

    namespace: str
    requests: int = 0
    asked_blocks: int = 0
    hits: Counter[str] = field(default_factory=Counter)
    tenants: Counter[str] = field(default_factory=Counter)

    @property
    def hit_blocks(self) -> int:
        return self.hits.total()

    def add(self, request: Request) -> None:
        self.requests += 1
        self.asked_blocks += request.num_blocks
        self.hits.update(hits_by_tier(request))
        self.tenants[request.tenant] += 1

    def to_dict(self) -> dict[str, Any]:
        return {
            "namespace": self.namespace, "requests": self.requests, "asked_blocks": self.asked_blocks,
            "hit_blocks": self.hit_blocks, "hits": dict(self.hits), "tenants": dict(self.tenants.most_common()),
        }  # fmt: skip

    def cells(self, tiers: Sequence[str]) -> tuple[object, ...]:
        """For people; see `usage_parts`."""
        by_tier = Counter[str]()
        for tier, n in self.hits.items():
            by_tier[_named(tier)] += n
        tenants = len(self.tenants.keys() - {""})
        return (self.requests, tenants, self.asked_blocks, self.hit_blocks, *(by_tier[tier] for tier in tiers))


def usage_of(requests: Iterable[Request]) -> dict[str, Usage]:
    """By namespace."""
    found: dict[str, Usage] = {}
    for request in requests:
        namespace = request.namespace.hex()
        found.setdefault(namespace, Usage(namespace=namespace)).add(request)
    return found


def usage_parts(usage: Sequence[Usage], models: Mapping[str, str]) -> Iterator[RenderableType]:
    """For people; ``models``: of each namespace."""
    known = {_named(tier) for one in usage for tier in one.hits}
    tiers = [tier for tier in (*TIERS, _OTHER) if tier in known]
    columns = ("model", "namespace", "requests", "tenants", "asked", "hits", *tiers)
    rows = ((models[one.namespace], one.namespace[:12], *one.cells(tiers)) for one in usage)
    yield table("requests, blocks they asked for, and where those were found", columns, rows, left=2)
    yield from _tenants(usage)


def _named(tier: str) -> str:
    return tier if tier in TIERS else _OTHER


def _tenants(usage: Sequence[Usage]) -> Iterator[RenderableType]:
    """Who asks most, of the tenants that the journal knows."""
    counts = Counter[str]()
    for one in usage:
        counts.update(one.tenants)
    if set(counts) - {""}:
        most = counts.most_common(_MOST_TENANTS)
        said = ", ".join(f"{tenant or 'no tenant'} {n}" for tenant, n in most)
        yield from lines(f"requests by tenant: {said}{', ...' if len(counts) > len(most) else ''}")
