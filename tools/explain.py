"""`kvstore explain`: block by block, why a prompt hits or misses in each tier.

What is stored now comes from the tiers' directories; what was in a server's memory, and why a block is
there no more, from the journal. Without one, what is not stored is only that.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.journal_entries import Move, Request
from kvstore.journal_view import JournalView
from kvstore.keys import BlockKey
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.asked import Asked, asked_of, difference, model_of
from tools.blocks import Place, places, why_bad
from tools.choice import Choice
from tools.explanation import Explained, Explanation, Finding
from tools.ls import problems_of
from tools.output import age, progress
from tools.places import find_catalogs

MAX_BLOCKS: Final = 1 << 17
_NAMES: Final = ("host", "disk", "shared")
_WHY: Final = {
    "evicted": "evicted", "purged": "purged", "corrupt": "was damaged", "reset": "before a reset",
    "by_other": "removed by another process",
}  # fmt: skip


def explain(
    path: Path,
    choice: Choice,
    *,
    journal: Path | None = None,
    model: str = "",
    other_tenants: Sequence[str] = (),
    integrity_key_file: str | None = None,
    at_its_end: bool = False,
) -> Explanation:
    """Explain a prompt, a request of the journal, or single keys.

    Args:
        model: which identity is asked for, where the path or the journal know several: its model's name, or a part.
        other_tenants: salts under which the prompt may be stored too.
        at_its_end: see `JournalView.of`.
    Raises:
        ConfigError: a wrong argument, nothing of a tier at the path, or no journal.
        NotStoredError: nobody knows of such a request or key.
    """
    catalogs = find_catalogs(path, integrity_key_file)
    view = JournalView.of(journal, at_its_end=at_its_end) if journal is not None else None
    asked = asked_of(catalogs, view, choice, model, other_tenants)
    if len(asked.keys) > MAX_BLOCKS:
        raise ConfigError(f"{len(asked.keys)} blocks are too many to explain; at most {MAX_BLOCKS}")
    return _Explainer(catalogs, view, asked, other_tenants).run()


class _Explainer:
    def __init__(
        self, catalogs: Sequence[Catalog], view: JournalView | None, asked: Asked, other_tenants: Sequence[str]
    ) -> None:
        self._catalogs, self._view, self._asked, self._other_tenants = catalogs, view, asked, other_tenants
        self._now_ns = time.time_ns()
        known = {catalog.tier for catalog in catalogs} | set(view.tiers() if view else ())
        self._tiers: list[str] = [tier for tier in _NAMES if tier in known]

    def run(self) -> Explanation:
        asked, found = self._asked, self._stored()
        blocks, is_usable, is_prompt = list[Explained](), True, asked.first is not None
        with progress("checking", len(asked.keys)) as advance:
            for i, (key, then) in enumerate(zip(asked.keys, self._then(), strict=True)):
                tiers = {tier: self._finding(tier, i, key, found) for tier in self._tiers}
                is_usable = (is_usable or not is_prompt) and any(finding.is_hit for finding in tiers.values())
                blocks.append(Explained((asked.first or 0) + i, str(key), tiers, then, is_usable))
                advance(1)
        problems = problems_of(self._catalogs)
        if self._view is not None and self._view.problems:
            problems[f"journal: {self._view.path}"] = self._view.problems
        return Explanation(
            model=asked.model,
            is_prompt=is_prompt,
            block_size=asked.formats[0].layout.block_size if asked.formats else 0,
            tiers=self._tiers,
            blocks=blocks,
            request=asked.request,
            notes=self._notes(blocks),
            problems=problems,
        )

    def _stored(self) -> dict[BlockKey, list[Place]]:
        """Where the keys, and those of the same tokens for others, lie in the directories."""
        found: dict[BlockKey, list[Place]] = {key: [] for key in self._asked.keys}
        for others in self._asked.others:
            found.update({key: [] for key in others})
        for place in places(self._catalogs):
            if place.key in found:
                found[place.key].append(place)
        return found

    def _finding(self, tier: str, i: int, key: BlockKey, found: dict[BlockKey, list[Place]]) -> Finding:
        here = [place for place in found[key] if place.catalog.tier == tier]
        bad, sound = "", list[Place]()
        for place in here:
            if self._is_asked(place):
                reason = why_bad(place)
                if reason:
                    bad = reason
                else:
                    sound.append(place)
                    if len(self._asked.formats) < 2:
                        break
        if sound:
            return Finding("stored", self._stored_for(sound))
        if bad:
            return Finding("corrupt", f"damaged: {bad}")
        for place in here:
            return self._foreign(place)
        for other, (why, said) in (self._asked.others[i] if i < len(self._asked.others) else {}).items():
            if any(place.catalog.tier == tier for place in found[other]):
                return Finding(why, f"stored for {said}")
        return self._told(tier, key)

    def _is_asked(self, place: Place) -> bool:
        namespace, fmt = self._asked.namespace, place.fmt
        if namespace is None:
            namespace = fmt.initial_namespace if fmt is not None else b""
            return place.chunk.space.namespace == namespace and (not self._asked.formats or self._is_same(fmt))
        return place.chunk.space.namespace == namespace

    def _is_same(self, fmt: StoredFormat | None) -> bool:
        return fmt is not None and any(fmt.content == mine.content for mine in self._asked.formats)

    def _stored_for(self, sound: Sequence[Place]) -> str:
        """Of keys that several identities have, whose."""
        if len(self._asked.formats) < 2:
            return "stored"
        models = (f"{model_of(p.fmt)}@{str(p.fmt.content.get('revision'))[:12]}" for p in sound if p.fmt is not None)
        return "stored for " + ", ".join(sorted(set(models)))

    def _foreign(self, place: Place) -> Finding:
        """The same key in another namespace."""
        fmt, mine = place.fmt, self._asked.formats
        if fmt is not None and mine and not self._is_same(fmt):
            return Finding("identity", f"stored for {difference(mine[0], fmt)}")
        return Finding("epoch", "stored in another epoch: before a reset, or by a store that was reset")

    def _told(self, tier: str, key: BlockKey) -> Finding:
        """What the journal knows of a block that is not in a directory."""
        view = self._view
        if view is None:
            return Finding("unknown", "not stored")
        move = view.move_of(tier, bytes(key))
        if move is None:
            node = view.node_of(key.block_hash)
            is_known = bool(view.requests) and (node >= 0 or tier == "host")
            return Finding("never stored", "never stored") if is_known else Finding(
                "unknown", f"not stored, in the {age((self._now_ns - view.first_ns) / 1e9)} that the journal knows"
            )  # fmt: skip
        since = age((self._now_ns - move.t_ns) / 1e9)
        if move.why:
            return Finding(move.why, f"{_WHY.get(move.why, move.why)} {since} ago{self._by(tier, move)}")
        if tier == "host":
            if (life := view.life_of(move.pid)) == "ended":
                return Finding("ended", f"was in memory of process {move.pid}, which has ended")
            if life == "silent":
                silent = age(view.silent_s(move.pid))
                return Finding("silent", f"was in memory of process {move.pid}, which is silent for {silent}")
            return Finding("stored", "in memory")
        return Finding("gone", f"stored {since} ago, and gone; who removed it is not in the journal")

    def _by(self, tier: str, move: Move) -> str:
        """What evicted it: its tier was full."""
        view = self._view
        if move.why != "evicted" or view is None:
            return ""
        if tier == "shared":
            return " by gc, for size or age"
        samples = [s.numbers for s in view.samples if s.pid == move.pid and s.tier == tier]
        capacity = next((s["capacity_blocks"] for s in reversed(samples) if s.get("capacity_blocks")), None)
        return ": its tier was full" + (f", with room for {capacity:.0f} blocks" if capacity else "")

    def _then(self) -> Iterator[str]:
        """Where the request found each block. Late is only what a tier had then; behind a block that none had, all are
        computed."""
        request, first = self._asked.request, self._asked.first or 0
        ends = [] if request is None else list(accumulate(request.hits.values()))
        was_there = True
        for i, key in enumerate(self._asked.keys, start=first):
            if request is None:
                yield ""
            elif (at := bisect_right(ends, i)) < len(ends):
                yield list(request.hits)[at]
            else:
                was_there = was_there and request.is_late and self._was_there(key, request)
                yield "late" if was_there else "computed"

    def _was_there(self, key: BlockKey, request: Request) -> bool:
        view = self._view
        return view is not None and any(view.had(t, key, request.t_ns, request.pid) for t in self._tiers)

    def _notes(self, blocks: Iterable[Explained]) -> list[str]:
        notes = []
        if (request := self._asked.request) is not None and self._asked.formats:
            block_size = self._asked.formats[0].layout.block_size
            rest = request.num_tokens - request.num_blocks * block_size
            if 0 < rest < block_size:
                notes.append(f"the last {rest} tokens fill no block, and are always computed")
        if self._view is None:
            notes.append("without --journal it cannot be said why a block is not stored, or what memory held")
        never = any(f.why == "never stored" for b in blocks for f in b.tiers.values())
        if never and self._asked.first is not None and request is None and not self._other_tenants:
            notes.append("a prompt that another tenant stored has other keys: give its salt with --other-tenant to see")
        return notes
