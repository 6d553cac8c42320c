"""What `kvstore explain` is to explain: keys, and the identities that they are looked for under."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Final

from kvstore.errors import ConfigError, NotStoredError
from kvstore.journal_entries import Request
from kvstore.journal_view import JournalView
from kvstore.keys import BlockKey
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.blocks import Place, by_start, formats_of, places, prompts_by_format, same_content
from tools.choice import Choice, only_request
from tools.names import models_like

_WHOLE: Final = 64  # hex digits


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Keys of blocks, and the same tokens' keys under others.

    Attributes:
        formats: identities that are asked for; several, or none that is known, only of single keys.
        namespace: in which it is looked for; None: in that of stores that have not been reset.
        others: key of the same block for others -> (why, what for people).
        first: which block of the prompt the first key's is; None: they are single keys.
    """

    keys: list[BlockKey]
    formats: list[StoredFormat]
    namespace: bytes | None = None
    others: list[dict[BlockKey, tuple[str, str]]] = field(default_factory=list)
    request: Request | None = None
    first: int | None = 0

    @property
    def model(self) -> str:
        return ", ".join(dict.fromkeys(map(model_of, self.formats))) or "?"


def asked_of(
    catalogs: Sequence[Catalog], view: JournalView | None, choice: Choice, model: str, other_tenants: Sequence[str]
) -> Asked:
    """What a person has named.

    Raises:
        ConfigError: nothing describes its KV, or a prompt's keys cannot be worked out.
        NotStoredError: nobody knows of such a request, key or model.
    """
    if choice.request is not None and view is not None:
        return _of_request(view, choice.request, model)
    if starts := choice.starts():
        return _of_starts(catalogs, view, starts, model)
    return _of_prompt(_formats(catalogs, view, model), choice, view, other_tenants)


def model_of(fmt: StoredFormat) -> str:
    return str(fmt.content.get("model"))


def _of_request(view: JournalView, request_id: str, model: str) -> Asked:
    """The last request of that id."""
    request = only_request(view, request_id)
    nodes = view.nodes_to(request.last)
    if not nodes:
        raise NotStoredError(f"--request: of {request_id!r} no full block is known: its prompt was shorter than one")
    known = [fmt for o in reversed(view.opened) if (fmt := _format(o.content, o.placed)) is not None]
    mine = [fmt for fmt in known if fmt.initial_namespace == request.namespace] or known  # it was asked after a reset
    if model and mine:
        models_like(model, [model_of(mine[0])])
    keys = [BlockKey.of(view.hashes[node]) for node in nodes]
    first = view.depths[nodes[0]] - 1
    return Asked(keys=keys, formats=mine[:1], namespace=request.namespace, request=request, first=first)


def _of_starts(catalogs: Sequence[Catalog], view: JournalView | None, starts: Sequence[str], model: str) -> Asked:
    """Keys by their starts, from all that is stored or in the journal; whole ones may be unknown."""
    whole = [BlockKey.parse(start) for start in starts if len(start.partition(".")[0]) == _WHOLE]
    journalled = (BlockKey.of(block_hash) for block_hash in view.hashes) if view is not None else ()
    known: Iterable[tuple[str, BlockKey | Place]] = chain(
        ((str(key), key) for key in whole),
        ((str(place.key), place) for place in places(catalogs)),
        ((str(key), key) for key in journalled),
    )
    found = by_start(starts, known, "is stored here, or in the journal").values()
    keys = [one.key if isinstance(one, Place) else one for one, *_ in found]
    formats = _unique(one.fmt for there in found for one in there if isinstance(one, Place) and one.fmt is not None)
    if model:
        every = _known(catalogs, view)
        names = models_like(model, map(model_of, every))
        formats = [fmt for fmt in formats if model_of(fmt) in names] or [fmt for fmt in every if model_of(fmt) in names]
    return Asked(keys=keys, formats=formats, first=None)


def _of_prompt(
    formats: Sequence[StoredFormat], choice: Choice, view: JournalView | None, other_tenants: Sequence[str]
) -> Asked:
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
                others[i].setdefault(key, ("identity", difference(asked, alike[at])))
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
    return Asked(keys=keys, formats=[asked], namespace=namespace, others=others)


def _formats(catalogs: Sequence[Catalog], view: JournalView | None, model: str) -> list[StoredFormat]:
    """Every identity that is known, the one asked for first: the newest of the journal, else of the directories."""
    every = _known(catalogs, view)
    if not every:
        raise ConfigError("PATH: nothing in it describes its KV")
    names = models_like(model, map(model_of, every))
    return sorted(every, key=lambda fmt: model_of(fmt) not in names)


def _known(catalogs: Sequence[Catalog], view: JournalView | None) -> list[StoredFormat]:
    known = [fmt for o in reversed(view.opened if view else []) if (fmt := _format(o.content, o.placed)) is not None]
    return _unique([*known, *formats_of(catalogs)])


def _unique(formats: Iterable[StoredFormat]) -> list[StoredFormat]:
    """One of each content: the first."""
    return list({repr(sorted(fmt.content.items())): fmt for fmt in reversed(list(formats))}.values())[::-1]


def _format(content: dict[str, Any], placed: dict[str, Any]) -> StoredFormat | None:
    try:
        return StoredFormat.of(content, placed)
    except ValueError:
        return None


def difference(mine: StoredFormat, other: StoredFormat) -> str:
    """Which fields differ, for people."""
    differs = same_content([mine, other])
    if not differs:
        return "the same identity, cut or laid out otherwise"
    texts = [f"{name} {theirs!r}, not {ours!r}" for name, (ours, theirs) in differs.items()]
    return "another identity: " + "; ".join(texts)
