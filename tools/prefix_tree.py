"""`kvstore ls --tree`: which prompts share which heads, where those are stored, and who uses them.

Which block follows which only a journal knows. Blocks between two forks are one branch.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from kvstore.journal_entries import NO_NODE
from kvstore.journal_view import JournalView
from kvstore.keys import BLOCK_HASH_NBYTES
from tools.blocks import places
from tools.journal_stats import last_used
from tools.output import age, lines, printable
from tools.places import find_catalogs

MOST_ROWS: Final = 40
_MOST_DEPTH: Final = 100


@dataclass(slots=True)
class Branch:
    """Blocks that follow each other, up to where prompts part.

    Attributes:
        first: index of its first block in the prompt.
        key: hash of that block.
        requests, hits: that asked for its first block, and that found it.
        tenant: digest of whose it is; empty: nobody's in particular.
        stored: tier -> how many of its blocks are stored there now.
        more: branches that go on from it and are not shown.
    """

    first: int
    blocks: int
    key: str
    requests: int
    hits: int
    tenant: str
    last_used_ns: int
    stored: dict[str, int]
    branches: list[Branch] = field(default_factory=list)
    more: int = 0

    def to_dict(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self.__slots__ if name != "branches"}
        return {**own, "branches": [branch.to_dict() for branch in self.branches]}

    def text(self, block_size: int) -> Text:
        """For people."""
        tokens = f"{self.first * block_size} to {(self.first + self.blocks) * block_size - 1}"
        where = ", ".join(f"{tier} {n} of {self.blocks}" for tier, n in self.stored.items() if n) or "not stored"
        said = (
            f"{self.key[:12]}  tokens {tokens} ({self.blocks} blocks): {self.requests} requests, {self.hits} hits, "
            f"{age((time.time_ns() - self.last_used_ns) / 1e9)} ago; {where}"
        )
        return Text(printable(said + (f"; tenant {self.tenant}" if self.tenant else "")))


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """The prompts of a journal: the most asked for first."""

    block_size: int
    roots: list[Branch]
    more: int
    problems: list[str]

    def to_dict(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size, "more": self.more, "problems": self.problems,
            "prefixes": [branch.to_dict() for branch in self.roots],
        }  # fmt: skip

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if not self.roots:
            yield from lines("the journal has no prompts of a full block")
        for root in self.roots:
            tree = Tree(root.text(self.block_size))
            open_ = [(root, tree)]
            while open_:
                branch, shown = open_.pop()
                for child in branch.branches:
                    open_.append((child, shown.add(child.text(self.block_size))))
                if branch.more:
                    shown.add(Text(f"and {branch.more} more"))
            yield tree
        if self.more:
            yield from lines(f"and {self.more} more prompts that share nothing with these; --limit shows more")
        yield from lines(*(f"problem in the journal: {text}" for text in self.problems))


def prefix_tree(path: Path, journal: Path, limit: int | None = None) -> PrefixTree:
    """Put it together.

    Args:
        limit: branches, of those that most requests ask for; default `MOST_ROWS`.
    Raises:
        ConfigError: there is nothing of a tier at the path, or no journal.
    """
    view = JournalView.of(journal)
    maker = _Maker(view, _stored(path, view))
    roots, more = maker.grow(MOST_ROWS if limit is None else limit)
    size = next((n for one in reversed(view.opened) if isinstance(n := one.content.get("block_size"), int)), 0)
    return PrefixTree(size, roots, more, view.problems)


def _stored(path: Path, view: JournalView) -> dict[str, set[int]]:
    """Tier -> nodes that are stored there."""
    stored: dict[str, set[int]] = {}
    for place in places(find_catalogs(path)):
        node = view.node_of(place.key[:BLOCK_HASH_NBYTES])
        if node != NO_NODE:
            stored.setdefault(place.catalog.tier, set()).add(node)
    return stored


class _Maker:
    def __init__(self, view: JournalView, stored: dict[str, set[int]]) -> None:
        self._view, self._stored = view, stored
        self._asked, self._hits, self._used = view.asked_by_node(), view.hits_by_node(), last_used(view)
        self._children: dict[int, list[int]] = defaultdict(list)
        for node, parent in enumerate(view.parents):
            if self._asked[node]:  # not what was generated, and never asked for
                self._children[parent].append(node)
        self._tenants = self._tenant_of_each()

    def grow(self, limit: int) -> tuple[list[Branch], int]:
        """The branches that most requests ask for, each below the one it goes on from; and how many roots are left."""
        waiting: list[tuple[int, int, int, Branch | None]] = []
        roots: list[Branch] = []

        def wait(nodes: Sequence[int], above: Branch | None, depth: int) -> None:
            for node in nodes:
                heapq.heappush(waiting, (-self._asked[node], node, depth, above))

        wait(self._children[NO_NODE], None, 0)
        left = Counter[int]()
        shown = 0
        while waiting:
            _, node, depth, above = heapq.heappop(waiting)
            if shown >= limit or depth >= _MOST_DEPTH:
                left[id(above) if above is not None else 0] += 1
                if above is not None:
                    above.more += 1
                continue
            branch, last = self._branch(node)
            (roots if above is None else above.branches).append(branch)
            shown += 1
            wait(self._children[last], branch, depth + 1)
        return roots, left[0]

    def _branch(self, node: int) -> tuple[Branch, int]:
        """From a node to where prompts part, or end; and the last node."""
        view, nodes = self._view, [node]
        while len(after := self._children[nodes[-1]]) == 1 and self._asked[after[0]] == self._asked[node]:
            nodes.append(after[0])
        made = Branch(
            first=view.depths[node] - 1,
            blocks=len(nodes),
            key=view.hashes[node].hex(),
            requests=self._asked[node],
            hits=self._hits[node],
            tenant=self._tenants.get(node, ""),
            last_used_ns=self._used[node],
            stored={tier: sum(n in found for n in nodes) for tier, found in self._stored.items()},
        )
        return made, nodes[-1]

    def _tenant_of_each(self) -> dict[int, str]:
        """A salt is part of every hash of a prompt, so that a block is one tenant's, or nobody's."""
        found: dict[int, str] = {}
        for request in self._view.requests:
            node = request.last
            while request.tenant and node != NO_NODE and node not in found:
                found[node] = request.tenant
                node = self._view.parents[node]
        return found
