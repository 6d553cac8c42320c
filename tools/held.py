"""Blocks whose numbers are to be looked at, of a store's directories or of a dumped file: the ones a person has named.

What is named is found in the same way in both: see `tools.blocks.by_start` for keys, `tools.choice` for prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from kvstore.errors import ConfigError, NotStoredError
from kvstore.keys import BlockKey
from kvstore.prefix_file import PrefixFile
from kvstore.stored_format import StoredFormat
from kvstore.tiers.catalog import Catalog
from tools.blocks import Place, by_start, find, formats_of, prompts_by_format, read_any, same_content
from tools.choice import Choice
from tools.places import find_catalogs


@dataclass(frozen=True, slots=True)
class Held:
    """One block.

    Attributes:
        index: which block of the prompt it is, of the keys as they were given, or of the file; None: stores have none.
        token: of the prompt, or of the file, that is its first; None where that cannot be said.
        model: whose KV it is.
        read: its numbers, shape `KVLayout.block_shape`; None where they are damaged, or cannot be told.
    """

    key: BlockKey
    index: int | None
    token: int | None
    model: str
    read: Callable[[], torch.Tensor | None]


@contextmanager
def held(path: Path, choice: Choice | None, integrity_key_file: str | None = None) -> Iterator[list[Held]]:
    """The blocks that are chosen, or all of a file, in the order of their indices; to be read while it is open.

    Raises:
        ConfigError: nothing of a tier at the path, or none of its blocks was chosen; the file is none, or a prompt
            cannot be looked for.
        NotStoredError: a key is that of no block, or of several; no block of the prompt is there.
    """
    if not path.is_file():
        catalogs = find_catalogs(path, integrity_key_file)
        if choice is None:
            raise ConfigError(
                f"the blocks of the store {str(path)!r} have no order; name them by --tokens, --text, --request or "
                "--key"
            )
        yield _of_directories(catalogs, choice)
        return
    with closing(PrefixFile(path)) as file:
        if file.header.is_raw:
            raise ConfigError(f"{path}: what K and V are in it cannot be told")
        yield _of_file(file, choice)


def stored(there: Sequence[Place], index: int | None = None, token: int | None = None) -> Held:
    """A block of a store, by its places."""
    fmt = there[0].fmt
    model = "?" if fmt is None else str(fmt.content.get("model"))
    return Held(there[0].key, index, token, model, partial(_read, there))


def _of_directories(catalogs: Sequence[Catalog], choice: Choice) -> list[Held]:
    there = find(catalogs, choice)
    if choice.starts():
        return [stored(one, i) for i, one in enumerate(there)]
    where = _in_prompt(formats_of(catalogs), choice)
    return sorted((stored(one, *where[one[0].key]) for one in there), key=lambda block: block.index or 0)


def _read(there: Sequence[Place]) -> torch.Tensor | None:
    if differs := same_content([place.fmt for place in there if place.fmt is not None]):
        raise ConfigError(
            f"block {there[0].key} is stored for several identities: {differs}; give a PATH that holds one"
        )
    return read_any(there).kv


def _of_file(file: PrefixFile, choice: Choice | None) -> list[Held]:
    header = file.header
    rows = dict(reversed([(key, row) for row, key in enumerate(file.keys)]))
    model, size = str(header.content.get("model")), header.layout.block_size

    def block(key: BlockKey, index: int, token: int) -> Held:
        return Held(key, index, token, model, partial(file.block, rows[key]))

    if choice is None:
        return [block(key, row, row * size) for row, key in enumerate(file.keys) if rows[key] == row]
    if starts := choice.starts():
        known = ((str(key), key) for key in rows)
        named = by_start(starts, known, "is in this file").values()
        return [block(key, i, rows[key] * size) for i, (key,) in enumerate(named)]
    where = _in_prompt([StoredFormat.of(header.content, header.placed)], choice)
    found = [block(key, *at) for key, at in where.items() if key in rows]
    if not found:
        raise NotStoredError("nothing of this prompt is in this file")
    return found


def _in_prompt(formats: Sequence[StoredFormat], choice: Choice) -> dict[BlockKey, tuple[int, int]]:
    """Key -> which block of the prompt it is, and its first token."""
    where: dict[BlockKey, tuple[int, int]] = {}
    for at, keys in prompts_by_format(formats, choice).items():
        size = formats[at].layout.block_size
        for index, key in enumerate(keys, start=choice.first_block()):
            where.setdefault(key, (index, index * size))
    return where
