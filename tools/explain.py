"""`kvstore explain`: block by block, why a prompt hits or misses in each tier.

What is stored now comes from the tiers' directories; what was in a server's memory, and why a block is
there no more, from the journal. Without one, what is not stored is only that.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rich.console import RenderableType

from kvstore.errors import ConfigError, NotStoredError
from kvstore.journal_view import JournalView, Move, Request
from kvstore.keys import BlockKey
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.blocks import Place, places, prompts_by_format, read, same_content
from tools.choice import Choice, only_request
from tools.ls import problem_lines, problems_of
from tools.output import age, lines, progress, table
from tools.places import find_catalogs

MAX_BLOCKS: Final = 1 << 17
_NAMES: Final = ("host", "disk", "shared")
_WHY: Final = {
    "evicted": "evicted", "purged": "purged", "corrupt": "was damaged", "reset": "before a reset",
    "by_other": "removed by another process",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One block in one tier.

    Attributes:
        why: "stored"; else "never stored", "evicted", "purged", "corrupt", "reset", "by_other", "identity", "epoch",
            "tenant", "ended" (the process whose memory it was in), "gone" (who removed it is not in the journal), or
            "unknown" (no journal, or it does not reach back so far).
        detail: for people.
    """

    why: str
    detail: str

    @property
    def is_hit(self) -> bool:
        return self.why == "stored"


@dataclass(frozen=True, slots=True)
class Explained:
    """One block.

    Attributes:
        then: the tier that had it when the request asked; "computed", "late" where its deadline had passed; empty
            where no request was given.
        is_usable: it and all blocks before it are stored somewhere.
    """

    index: int
    key: str
    tiers: dict[str, Finding]
    then: str
    is_usable: bool


@dataclass(frozen=True, slots=True)
class Explanation:
    """A prompt's blocks, and what was known."""

    model: str
    block_size: int
    tiers: list[str]
    blocks: list[Explained]
    request: Request | None
    notes: list[str] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def num_usable(self) -> int:
        return sum(block.is_usable for block in self.blocks)

    def to_dict(self) -> dict[str, Any]:
        request = self.request
        asked = None
        if request is not None:
            asked = {
                "request": request.request_id, "time_ns": request.t_ns, "tenant": request.tenant,
                "namespace": request.namespace.hex(), "num_tokens": request.num_tokens, "hits": request.hits,
                "waited_s": request.waited_s, "is_late": request.is_late,
            }  # fmt: skip
        return {
            "model": self.model, "block_size": self.block_size, "usable_blocks": self.num_usable,
            "blocks": [asdict(block) for block in self.blocks], "asked": asked, "notes": self.notes,
            "problems": self.problems,
        }  # fmt: skip

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        if (request := self.request) is not None:
            hits = ", ".join(f"{tier} {n}" for tier, n in request.hits.items()) or "nothing"
            yield from lines(
                f"request {request.request_id or '(without an id)'}, {age((time.time_ns() - request.t_ns) / 1e9)} ago: "
                f"{request.num_tokens} tokens; found were, in blocks: {hits}; waited {request.waited_s * 1e3:.0f} ms"
                + (", past its deadline" if request.is_late else "")
            )
        columns = ("blocks", "tokens", "first key", *self.tiers, *(("then",) if self.request else ()), "now")
        title = f"{self.model}: {self.num_usable} of {len(self.blocks)} blocks would be a hit now"
        yield table(title, columns, map(self._cells, self._runs()), left=len(columns))
        yield from lines(*self.notes)
        yield from problem_lines(self.problems)

    def _runs(self) -> Iterator[list[Explained]]:
        """Neighbours of which the same is to be said."""
        run: list[Explained] = []
        for block in self.blocks:
            if run and self._said(run[-1]) != self._said(block):
                yield run
                run = []
            run.append(block)
        if run:
            yield run

    def _said(self, block: Explained) -> tuple[object, ...]:
        return (*(f.detail for f in block.tiers.values()), block.then, block.is_usable)

    def _cells(self, run: list[Explained]) -> tuple[object, ...]:
        first, last = run[0], run[-1]
        numbers = f"{first.index}" if len(run) == 1 else f"{first.index} to {last.index}"
        tokens = f"{first.index * self.block_size} to {(last.index + 1) * self.block_size - 1}"
        is_stored = any(finding.is_hit for finding in first.tiers.values())
        now = "hit" if first.is_usable else "behind a miss" if is_stored else "miss"
        then = (first.then,) if self.request else ()
        return (numbers, tokens, first.key[:12], *(first.tiers[t].detail for t in self.tiers), *then, now)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is to be explained: keys of one identity, and the same tokens' keys under others.

    Attributes:
        namespace: in which it is looked for; None: in that of stores that have not been reset.
        others: key of the same block for others -> (why, what for people).
    """

    keys: list[BlockKey]
    fmt: StoredFormat | None
    namespace: bytes | None
    others: list[dict[BlockKey, tuple[str, str]]]
    request: Request | None = None


def explain(
    path: Path,
    choice: Choice,
    *,
    journal: Path | None = None,
    model: str = "",
    other_tenants: Sequence[str] = (),
    integrity_key_file: str | None = None,
) -> Explanation:
    """Explain a prompt, a request of the journal, or single keys.

    Args:
        model: which identity is asked for, where the path or the journal know several: a part of its model's name.
        other_tenants: salts under which the prompt may be stored too.
    Raises:
        ConfigError: a wrong argument, nothing of a tier at the path, or no journal.
        NotStoredError: nobody knows of such a request or key.
    """
    catalogs = find_catalogs(path, integrity_key_file)
    view = JournalView.of(journal) if journal is not None else None
    if choice.request is not None and view is not None:
        asked = _of_request(view, choice.request)
    else:
        starts = choice.starts()
        asked = _of_starts(catalogs, view, starts) if starts else _of_prompt(
            _formats(catalogs, view, model), choice, view, other_tenants
        )  # fmt: skip
    if len(asked.keys) > MAX_BLOCKS:
        raise ConfigError(f"{len(asked.keys)} blocks are too many to explain; at most {MAX_BLOCKS}")
    return _Explainer(catalogs, view, asked).run()


class _Explainer:
    def __init__(self, catalogs: Sequence[Catalog], view: JournalView | None, asked: _Asked) -> None:
        self._catalogs, self._view, self._asked = catalogs, view, asked
        self._now_ns = time.time_ns()
        known = {catalog.tier for catalog in catalogs} | set(view.tiers() if view else ())
        self._tiers: list[str] = [tier for tier in _NAMES if tier in known]

    def run(self) -> Explanation:
        asked, found = self._asked, self._stored()
        blocks, is_usable = [], True
        with progress("checking", len(asked.keys)) as advance:
            for i, key in enumerate(asked.keys):
                tiers = {tier: self._finding(tier, i, key, found) for tier in self._tiers}
                is_usable = is_usable and any(finding.is_hit for finding in tiers.values())
                blocks.append(Explained(i, str(key), tiers, self._then(i), is_usable))
                advance(1)
        fmt = asked.fmt
        problems = problems_of(self._catalogs)
        if self._view is not None and self._view.problems:
            problems[f"journal: {self._view.path}"] = self._view.problems
        return Explanation(
            model=str(fmt.content.get("model")) if fmt else "?",
            block_size=fmt.layout.block_size if fmt else 0,
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
        bad = ""
        for place in here:
            if self._is_asked(place):
                bad = read(place).reason
                if not bad:
                    return Finding("stored", "stored")
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
            return place.chunk.space.namespace == namespace and (self._asked.fmt is None or self._is_same(fmt))
        return place.chunk.space.namespace == namespace

    def _is_same(self, fmt: StoredFormat | None) -> bool:
        return fmt is not None and self._asked.fmt is not None and fmt.content == self._asked.fmt.content

    def _foreign(self, place: Place) -> Finding:
        """The same key in another namespace."""
        fmt, mine = place.fmt, self._asked.fmt
        if fmt is not None and mine is not None and not self._is_same(fmt):
            return Finding("identity", f"stored for {_difference(mine, fmt)}")
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
            if view.has_ended(move.pid):
                return Finding("ended", f"was in memory of process {move.pid}, which has ended")
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

    def _then(self, i: int) -> str:
        request = self._asked.request
        if request is None:
            return ""
        end = 0
        for tier, n in request.hits.items():
            end += n
            if i < end:
                return tier
        return "late" if request.is_late else "computed"

    def _notes(self, blocks: Iterable[Explained]) -> list[str]:
        notes = []
        fmt = self._asked.fmt
        if (request := self._asked.request) is not None and fmt is not None:
            rest = request.num_tokens - request.num_blocks * fmt.layout.block_size
            if 0 < rest < fmt.layout.block_size:
                notes.append(f"the last {rest} tokens fill no block, and are always computed")
        if self._view is None:
            notes.append("without --journal it cannot be said why a block is not stored, or what memory held")
        if any(f.why == "never stored" for b in blocks for f in b.tiers.values()) and request is None:
            notes.append("a prompt that another tenant stored has other keys: give its salt with --other-tenant to see")
        return notes


def _of_request(view: JournalView, request_id: str) -> _Asked:
    """The last request of that id."""
    request = only_request(view, request_id)
    keys = [BlockKey.of(block_hash) for block_hash in view.path_to(request.last)]
    if not keys:
        raise NotStoredError(f"--request: of {request_id!r} no full block is known: its prompt was shorter than one")
    fmt = next((f for o in reversed(view.opened) if (f := _format(o.content, o.placed)) is not None
                and f.initial_namespace == request.namespace), None)  # fmt: skip
    if fmt is None:  # it was asked after a reset
        fmt = next((f for o in reversed(view.opened) if (f := _format(o.content, o.placed)) is not None), None)
    return _Asked(keys, fmt, request.namespace, [], request)


def _of_starts(catalogs: Sequence[Catalog], view: JournalView | None, starts: Sequence[str]) -> _Asked:
    """Keys by their starts, from all that is stored or in the journal."""
    known: dict[str, set[BlockKey]] = {start: set() for start in starts}
    for start in starts:
        if len(start.partition(".")[0]) == 64:
            known[start].add(BlockKey.parse(start))
    journalled = (BlockKey.of(block_hash) for block_hash in view.hashes) if view is not None else ()
    for key in (*(place.key for place in places(catalogs)), *journalled):
        text = str(key)
        for start in starts:
            if text.startswith(start):
                known[start].add(key)
    for start, keys in known.items():
        if not keys:
            raise NotStoredError(f"KEY: nobody knows of a block whose key begins with {start!r}")
        if len(keys) > 1:
            raise NotStoredError(f"KEY: {len(keys)} keys begin with {start!r}; give more of it")
    formats = [fmt for catalog in catalogs for fmt in catalog.formats()]
    return _Asked([key for keys in known.values() for key in keys], formats[0] if formats else None, None, [])


def _of_prompt(
    formats: Sequence[StoredFormat], choice: Choice, view: JournalView | None, other_tenants: Sequence[str]
) -> _Asked:
    """A prompt's keys under the first identity, and under the others and other salts."""
    asked, *rest = formats
    keys = choice.of_prompt(asked)
    if not keys:
        raise NotStoredError(f"the prompt is shorter than one block of {asked.layout.block_size} tokens")
    others: list[dict[BlockKey, tuple[str, str]]] = [{} for _ in keys]
    alike = [fmt for fmt in rest if fmt.layout.block_size == asked.layout.block_size]
    with suppress(ConfigError):  # of none of these keys can be worked out
        for at, theirs in prompts_by_format(alike, choice).items():
            for i, key in enumerate(theirs):
                others[i].setdefault(key, ("identity", _difference(asked, alike[at])))
    for salt in dict.fromkeys(("", *other_tenants)):
        if salt != choice.tenant:
            said = "another tenant" if salt else "no tenant"
            for i, key in enumerate(replace(choice, tenant=salt).of_prompt(asked)):
                others[i].setdefault(key, ("tenant", said))
    for i, key in enumerate(keys):
        others[i].pop(key, None)
    namespace = None
    if view is not None:  # the newest store of this identity may have been reset
        mine = [o for o in view.opened if o.content == asked.content]
        namespace = mine[-1].namespace if mine else None
    return _Asked(keys, asked, namespace, others)


def _formats(catalogs: Sequence[Catalog], view: JournalView | None, model: str) -> list[StoredFormat]:
    """Every identity that is known, the one asked for first: the newest of the journal, else of the directories."""
    known = [f for o in reversed(view.opened if view else []) if (f := _format(o.content, o.placed)) is not None]
    known += [fmt for catalog in catalogs for fmt in catalog.formats()]
    unique = list({repr(sorted(fmt.content.items())): fmt for fmt in reversed(known)}.values())[::-1]
    wanted = [fmt for fmt in unique if model.lower() in str(fmt.content.get("model")).lower()]
    if not wanted:
        raise ConfigError(f"--model: {model!r} is not known here" if model else "PATH: nothing in it describes its KV")
    return [*wanted, *(fmt for fmt in unique if fmt not in wanted)]


def _format(content: dict[str, Any], placed: dict[str, Any]) -> StoredFormat | None:
    try:
        return StoredFormat.of(content, placed)
    except ValueError:
        return None


def _difference(mine: StoredFormat, other: StoredFormat) -> str:
    """Which fields differ, for people."""
    differs = same_content([mine, other])
    if not differs:
        return "the same identity, cut or laid out otherwise"
    texts = [f"{name} {theirs!r}, not {ours!r}" for name, (ours, theirs) in differs.items()]
    return "another identity: " + "; ".join(texts)
