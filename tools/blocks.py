"""Blocks that a person names, where they are stored, and what is in them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from connectors.vllm_block_hash import prompt_keys as vllm_keys
from kvstore.byte_layout import blocks_of
from kvstore.errors import ConfigError, KeyFormatError, KVStoreError, NotStoredError
from kvstore.journal_view import JournalView, Request
from kvstore.keys import KEY_NBYTES, BlockKey, hash_blocks
from kvstore.stored_format import StoredFormat
from kvstore.strict_json import parse_json
from kvstore.tiers.catalog import Catalog, StoredChunk
from tools.output import progress

KEY_START: Final = re.compile(r"[0-9a-f]{1,64}(\.[0-9]{1,10})?")
_MAX_FILE_NBYTES: Final = 8 << 20
_MAX_TOKENIZER_NBYTES: Final = 64 << 20
_MAX_TOKENS: Final = 1 << 20
_MAX_KEYS: Final = 1 << 17
_OWN_LAYOUT: Final = "LBKHTD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a person names blocks; give one of keys, tokens, text and a request.

    Attributes:
        keys: each as much of a key's start as is unique.
        keys_file: a key a line.
        tokens_file: a JSON list of token ids.
        text, tokenizer: a prompt, and the folder of the model's tokenizer.
        tenant: the salt that the prompt was stored under.
        request, journal: a request's id, or its start, and the journal that knows it.
    """

    keys: tuple[str, ...] = ()
    keys_file: Path | None = None
    tokens_file: Path | None = None
    text: str | None = None
    tokenizer: Path | None = None
    tenant: str = ""
    request: str | None = None
    journal: Path | None = None

    def __post_init__(self) -> None:
        others = (self.keys_file, self.tokens_file, self.text, self.request)
        if sum([bool(self.keys), *(given is not None for given in others)]) != 1:
            raise ConfigError("give one of --key, --keys, --tokens, --text and --request")
        if self.request is not None and self.journal is None:
            raise ConfigError("--request: only a journal knows requests; give --journal too")
        if (self.text is None) != (self.tokenizer is None):
            raise ConfigError("--text and --tokenizer: give both, or none")

    def starts(self) -> list[str]:
        """Keys as they were given; none where a prompt was."""
        starts = list(self.keys)
        if self.keys_file is not None:
            starts = read_bounded("--keys", self.keys_file).decode(errors="replace").split(maxsplit=_MAX_KEYS)
            if len(starts) > _MAX_KEYS:
                raise ConfigError(f"--keys: {self.keys_file} has more than {_MAX_KEYS} keys")
        for start in starts:
            if not KEY_START.fullmatch(start.lower()):
                raise KeyFormatError(
                    f"KEY: {start[:80]!r} is not allowed; give up to 64 hex digits, then optionally .GROUP"
                )
        return [start.lower() for start in starts]

    def of_prompt(self, fmt: StoredFormat) -> list[BlockKey]:
        """Keys of the prompt's full blocks, in KV of this format; of a request also those of what it generated.

        Raises:
            ConfigError: the prompt is none, or its keys are made by an engine.
            NotStoredError: the journal knows of no such request, or of several.
        """
        if self.request is not None:
            _, hashes = self._of_journal()
            return [BlockKey.of(block_hash) for block_hash in hashes]
        tokens = self.tokens()
        if fmt.byte_layout.partition(" ")[0] == "vllm":
            algorithm, seed = str(fmt.content.get("hash_algorithm")), str(fmt.content.get("hash_seed"))
            return vllm_keys(tokens, fmt.layout.block_size, algorithm=algorithm, seed=seed, salt=self.tenant)
        if fmt.byte_layout != _OWN_LAYOUT:
            raise ConfigError(
                f"--tokens, --text: {fmt.byte_layout.split()[0]!r} makes its keys itself; give --key or --keys"
            )
        return hash_blocks(tokens, fmt.layout.block_size, fmt.identity(), tenant=self.tenant)

    def means(self, place: Place) -> bool:
        """Whether what is stored there can be meant: a request's blocks are those of its own namespace."""
        return self.request is None or place.chunk.space.namespace == self._of_journal()[0]

    def _of_journal(self) -> tuple[bytes, list[bytes]]:
        assert self.request is not None
        assert self.journal is not None
        return _request_of(self.journal, self.request)

    def tokens(self) -> list[int]:
        """Of the prompt; raises ConfigError where there are none."""
        if self.text is not None and self.tokenizer is not None:
            return tokens_of(self.text, self.tokenizer)
        assert self.tokens_file is not None
        try:
            data = read_bounded("--tokens", self.tokens_file)
            if data.count(b",") >= _MAX_TOKENS:  # told before a list is made
                raise ConfigError(f"--tokens: {self.tokens_file} has more than {_MAX_TOKENS} token ids")
            found = parse_json(data)
        except ConfigError:
            raise
        except ValueError as e:
            raise ConfigError(
                f"--tokens: {self.tokens_file} is not JSON ({str(e)[:100]}); give a list of token ids"
            ) from e
        is_list = isinstance(found, list) and len(found) <= _MAX_TOKENS
        if not is_list or not all(isinstance(t, int) and not isinstance(t, bool) and 0 <= t < 1 << 63 for t in found):
            raise ConfigError(f"--tokens: {self.tokens_file} holds no list of token ids")
        return list(found)


@lru_cache(maxsize=1)
def _request_of(journal: Path, request_id: str) -> tuple[bytes, list[bytes]]:
    """Namespace and block hashes of a journal's request."""
    view = JournalView.of(journal)
    request = only_request(view, request_id)
    return request.namespace, view.hashes_of(request)


def only_request(view: JournalView, request_id: str) -> Request:
    """The last of this id, or whose id begins so.

    Raises:
        NotStoredError: there is none, or requests of several ids begin so.
    """
    found = view.requests_of(request_id)
    if not found:
        raise NotStoredError(
            f"--request: {request_id!r} is not in the journal, which has {len(view.requests)} requests"
        )
    ids = {request.request_id for request in found}
    if len(ids) > 1:
        some = ", ".join(sorted(ids)[:3])
        raise NotStoredError(f"--request: {len(ids)} requests begin with {request_id!r} ({some}, ...); give all of it")
    return found[-1]


def tokens_of(text: str, tokenizer: Path) -> list[int]:
    """A prompt's token ids, by ``tokenizer.json`` of a model's folder."""
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise ConfigError("--text needs the package tokenizers; install kvstore[transformers], or give --tokens") from e
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    data = read_bounded("--tokenizer", file, _MAX_TOKENIZER_NBYTES)
    try:
        ids: list[int] = Tokenizer.from_str(data.decode()).encode(text).ids
    except Exception as e:  # tokenizers raises nothing narrower
        raise ConfigError(f"--tokenizer: {file} is no tokenizer ({e})") from e
    return ids


def read_bounded(option: str, path: Path, most: int = _MAX_FILE_NBYTES) -> bytes:
    """A file that a person named; raises ConfigError where it cannot be read or is too large."""
    try:
        with path.open("rb") as f:
            data = f.read(most + 1) if os.fstat(f.fileno()).st_size <= most else None
    except OSError as e:
        raise ConfigError(f"{option}: {str(path)!r} cannot be read ({e.strerror})") from e
    if data is None or len(data) > most:
        raise ConfigError(f"{option}: {str(path)!r} is larger than {most >> 20} MiB")
    return data


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is stored."""

    catalog: Catalog
    chunk: StoredChunk
    key: BlockKey

    @property
    def fmt(self) -> StoredFormat | None:
        return self.chunk.space.fmt


@dataclass(frozen=True, slots=True)
class Block:
    """What was read of one.

    Attributes:
        reason: why its chunk does not verify; empty where it does.
        kv: shape `KVLayout.block_shape`; None where it is bad, or K and V cannot be told apart.
        payload: uint8, of the block alone; None where it is bad, or others of its chunk lie between.
    """

    place: Place
    reason: str
    kv: torch.Tensor | None = None
    payload: torch.Tensor | None = None


def find(catalogs: Sequence[Catalog], choice: Choice) -> list[list[Place]]:
    """Every place of each block that is named and stored, in the order of the choice; of a prompt, those of
    its blocks that are stored, in its order.

    Raises:
        NotStoredError: a key is that of no block, or of several; or no block of a prompt is stored.
    """
    starts = choice.starts()
    if starts:
        found = _by_start(catalogs, starts)
        return [found[start] for start in dict.fromkeys(starts)]
    wanted: dict[BlockKey, list[Place]] = {
        key: [] for of_one in prompts_by_format(formats_of(catalogs), choice).values() for key in of_one
    }
    for place in places(catalogs):
        if place.key in wanted and choice.means(place):
            wanted[place.key].append(place)
    stored = [found for found in wanted.values() if found]
    if not stored:
        raise NotStoredError("nothing of this prompt is stored here")
    return stored


def formats_of(catalogs: Sequence[Catalog]) -> list[StoredFormat]:
    return [fmt for catalog in catalogs for fmt in catalog.formats()]


def prompts_by_format(formats: Sequence[StoredFormat], choice: Choice) -> dict[int, list[BlockKey]]:
    """A prompt's keys in KV of each format, by its place in the sequence; of those whose keys can be worked out.

    Raises:
        ConfigError: the prompt is none, or its keys cannot be worked out in any of them.
    """
    found: dict[int, list[BlockKey]] = {}
    problem: ConfigError | None = None
    for i, fmt in enumerate(formats):
        try:
            found[i] = choice.of_prompt(fmt)
        except ConfigError as e:
            problem = e
    if problem is not None and not found:
        raise problem
    return found


def places(catalogs: Sequence[Catalog]) -> Iterator[Place]:
    """Everything that is stored, block by block; with progress."""
    for catalog in catalogs:
        with progress(f"{catalog.tier} {catalog.path}", None) as advance:
            for chunk in catalog.chunks():
                advance(1)
                for at in range(0, len(chunk.key_bytes), KEY_NBYTES):
                    yield Place(catalog, chunk, BlockKey(chunk.key_bytes[at : at + KEY_NBYTES]))


def read(place: Place) -> Block:
    """Read and verify."""
    verdict = place.catalog.read(place.chunk)
    fmt = place.fmt
    if verdict.reason or verdict.row is None or fmt is None:
        return Block(place, verdict.reason or "cannot be read")
    slot = fmt.slot
    held = verdict.row[slot.body_nbytes :][: slot.blocks_per_chunk * KEY_NBYTES].reshape(slot.blocks_per_chunk, -1)
    position = next((i for i, row in enumerate(held) if row.tobytes() == place.key), None)
    if position is None:
        return Block(place, "its chunk holds other blocks")
    payload = torch.from_numpy(verdict.row[: slot.payload_nbytes].copy())
    alone = payload if slot.blocks_per_chunk == 1 else None
    try:
        kv = blocks_of(payload, fmt.layout, slot.blocks_per_chunk, fmt.byte_layout, fmt.tp_size)[position]
    except KVStoreError:
        return Block(place, "", payload=alone)
    return Block(place, "", kv, alone)


def read_any(found: Sequence[Place]) -> Block:
    """From the first place where it is sound; else as it is in the last one."""
    block = read(found[0])
    for place in found[1:]:
        if not block.reason:
            break
        block = read(place)
    return block


def _by_start(catalogs: Sequence[Catalog], starts: Sequence[str]) -> dict[str, list[Place]]:
    found: dict[str, list[Place]] = {start: [] for start in starts}
    shortest = min(len(start.partition(".")[0]) for start in starts)
    by_head: dict[str, list[str]] = {}
    for start in found:
        by_head.setdefault(start[:shortest], []).append(start)
    for place in places(catalogs):
        text = str(place.key)
        for start in by_head.get(text[:shortest], ()):
            if text.startswith(start):
                found[start].append(place)
    for start, there in found.items():
        keys = sorted({str(place.key) for place in there})
        if not keys:
            raise NotStoredError(f"KEY: no block whose key begins with {start!r} is stored here")
        if len(keys) > 1:
            some = ", ".join(key[: len(start) + 8] for key in keys[:3])
            raise NotStoredError(f"KEY: {len(keys)} keys begin with {start!r} ({some}, ...); give more of it")
    return found


def same_content(formats: Sequence[StoredFormat]) -> dict[str, tuple[Any, Any]]:
    """Fields in which the first two formats that differ do; empty where all are of one content."""
    for fmt in formats[1:]:
        first = formats[0]
        differs = {
            name: (first.content.get(name), fmt.content.get(name))
            for name in sorted(first.content.keys() | fmt.content.keys())
            if first.content.get(name) != fmt.content.get(name)
        }
        if differs:
            return differs
    return {}
