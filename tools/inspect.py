"""`kvstore inspect`: identity and layout of what is stored, or the numbers in one block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

from rich.console import RenderableType

from kvstore.errors import ConfigError
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.blocks import Block, Place, find, read, read_any, same_content
from tools.choice import Choice
from tools.foreign.look import ForeignBlock, describe_foreign, entries_that_begin, foreign_table, inspect_entry
from tools.ls import problem_lines, problems_of
from tools.output import lines, progress, table
from tools.places import find_catalogs, find_stored
from tools.statistics import Accumulator, PartStatistics, add_block, statistics_of, statistics_table

_SOME_KEYS: Final = 3


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """One block where it was found.

    Attributes:
        reason: why its chunk does not verify; empty where it does.
        statistics: none where K and V cannot be told apart.
    """

    tier: str
    path: str
    place: str
    namespace: str
    key: str
    reason: str
    statistics: list[PartStatistics]

    @classmethod
    def of(cls, place: Place, block: Block, *, per_head: bool) -> StoredBlock:
        statistics = [] if block.kv is None else statistics_of(block.kv, per_head=per_head)
        chunk, catalog = place.chunk, place.catalog
        namespace = chunk.space.namespace.hex()
        return cls(catalog.tier, str(catalog.path), chunk.name, namespace, str(place.key), block.reason, statistics)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": not self.reason}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        state = f"BAD: {self.reason}" if self.reason else "verified"
        yield from lines(f"block {self.key}", f"{self.tier} {self.path}, {self.place}: {state}")
        if self.statistics:
            yield statistics_table(self.statistics)
        elif not self.reason:
            yield from lines("what K and V are in this byte layout is not known here")


def describe(path: Path) -> tuple[dict[str, Any], list[RenderableType]]:
    """Identity, placement and layout of every directory, as data and for people.

    Raises:
        ConfigError: there is nothing of a tier there.
    """
    (catalogs, stores), data, parts = find_stored(path), list[dict[str, Any]](), list[RenderableType]()
    for catalog in catalogs:
        for fmt in catalog.formats():
            layout = _layout(fmt)
            place = {"tier": catalog.tier, "path": str(catalog.path)}
            keys = _some_keys(catalog, fmt)
            data.append({**place, "identity": fmt.content, "placement": fmt.placed, "layout": layout, "keys": keys})
            rows = [*fmt.content.items(), *fmt.placed.items(), *layout.items(), *(("a key", key) for key in keys)]
            parts.append(table(f"{catalog.tier} {catalog.path}", ("what", "value"), rows, left=2))
    foreign = [describe_foreign(store) for store in stores]
    parts += [foreign_table(one) for one in foreign]
    problems = problems_of(catalogs, stores)
    return {"stored": data, "foreign": foreign, "problems": problems}, [*parts, *problem_lines(problems)]


def find_block(
    path: Path, key: str, integrity_key_file: str | None = None, *, per_head: bool = False
) -> Sequence[StoredBlock | ForeignBlock]:
    """One block in every place where it is stored.

    Args:
        key: as `kvstore inspect --json` and logs show it, or as much of its start as is unique; of another
            system's store as its files are named.
    Raises:
        ConfigError: there is nothing of a tier there.
        KeyFormatError: this is no start of a key.
        NotStoredError: no block has such a key, or several have.
    """
    catalogs, stores = find_stored(path, integrity_key_file)
    entries = [(store, entry) for store in stores for entry in entries_that_begin(store, key)]
    if entries:
        return [inspect_entry(store, entry, per_head=per_head) for store, entry in entries]
    (found,) = find(catalogs, Choice(keys=(key,)))
    return [StoredBlock.of(place, read(place), per_head=per_head) for place in found]


@dataclass(frozen=True, slots=True)
class Together:
    """Several blocks: a prompt, or a request.

    Attributes:
        damaged: keys of those that verify nowhere; they are left out.
        unknown: how many are of a byte layout in which K and V cannot be told apart.
    """

    blocks: int
    tokens: int
    damaged: list[str]
    unknown: int
    statistics: list[PartStatistics]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        yield from lines(f"{self.blocks} blocks, {self.tokens} tokens, together")
        if self.statistics:
            yield statistics_table(self.statistics)
        if self.unknown:
            yield from lines(f"of {self.unknown} blocks it is not known here what K and V are")
        yield from lines(*(f"BAD: {text}" for text in self.damaged))


def inspect_together(
    path: Path, choice: Choice, integrity_key_file: str | None = None, *, per_head: bool = False
) -> Together:
    """The numbers of all blocks that are chosen, as one; each is read from where it is sound.

    Raises:
        ConfigError, NotStoredError: see `tools.blocks.find`; blocks are of several identities.
    """
    found = find(find_catalogs(path, integrity_key_file), choice)
    formats = [place.fmt for there in found for place in there if place.fmt is not None]
    if differs := same_content(formats):
        raise ConfigError(f"blocks of several identities: {differs}; name those of one, or a PATH that holds one")
    damaged, unknown, numbers, n = [], 0, dict[tuple[int, str], Accumulator](), 0
    with progress("reading", len(found)) as advance:
        for there in found:
            block = read_any(there)
            if block.reason:
                damaged.append(f"{there[0].key}: {block.reason}")
            elif block.kv is None:
                unknown += 1
            else:
                n += block.kv.shape[3]
                add_block(numbers, block.kv, per_head=per_head)
            advance(1)
    rows = [row for (layer, part), one in numbers.items() for row in one.rows(layer, part, per_head=per_head)]
    return Together(len(found), n, damaged, unknown, rows)


def _layout(fmt: StoredFormat) -> dict[str, Any]:
    return {
        "block_shape": list(fmt.layout.block_shape),
        "block_nbytes": fmt.layout.block_nbytes,
        "slot_nbytes": fmt.slot.slot_nbytes,
        "initial_namespace": fmt.initial_namespace.hex(),
    }


def _some_keys(catalog: Catalog, fmt: StoredFormat) -> list[str]:
    chunks = (chunk for chunk in catalog.chunks() if chunk.space.fmt is fmt)
    return [str(chunk.keys[0]) for chunk in islice(chunks, _SOME_KEYS)]


def block_parts(blocks: Sequence[StoredBlock | ForeignBlock]) -> Iterator[RenderableType]:
    """For people."""
    for block in blocks:
        yield from block.parts()
