"""How a person names blocks: keys, a prompt, or a request that a journal knows. Reads no store."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

from connectors.vllm_block_hash import prompt_keys as vllm_keys
from kvstore.errors import ConfigError, KeyFormatError, NotStoredError
from kvstore.journal_entries import Request
from kvstore.journal_view import JournalView
from kvstore.keys import BlockKey, hash_blocks
from kvstore.stored_format import StoredFormat
from kvstore.strict_json import parse_json

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
            return [BlockKey.of(block_hash) for block_hash in self._of_journal().hashes]
        tokens = self.tokens()
        if fmt.byte_layout.partition(" ")[0] == "vllm":
            algorithm, seed = str(fmt.content.get("hash_algorithm")), str(fmt.content.get("hash_seed"))
            return vllm_keys(tokens, fmt.layout.block_size, algorithm=algorithm, seed=seed, salt=self.tenant)
        if fmt.byte_layout != _OWN_LAYOUT:
            raise ConfigError(
                f"--tokens, --text: {fmt.byte_layout.split()[0]!r} makes its keys itself; give --key or --keys"
            )
        return hash_blocks(tokens, fmt.layout.block_size, fmt.identity(), tenant=self.tenant)

    def means(self, namespace: bytes) -> bool:
        """Whether what is stored in a namespace can be meant: a request's blocks are those of its own."""
        return self.request is None or namespace == self._of_journal().namespace

    def first_block(self) -> int:
        """Where in the prompt `of_prompt` begins: not at 0 where the journal knows a request's later blocks only."""
        return 0 if self.request is None else self._of_journal().first

    def _of_journal(self) -> _Told:
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


@dataclass(frozen=True, slots=True)
class _Told:
    """A request's blocks; ``first``: which of its prompt's the first of them is."""

    namespace: bytes
    hashes: list[bytes]
    first: int


@lru_cache(maxsize=2)
def _request_of(journal: Path, request_id: str) -> _Told:
    view = JournalView.of(journal)
    request = only_request(view, request_id)
    hashes = view.hashes_of(request)
    return _Told(request.namespace, hashes, view.depths[view.node_of(hashes[0])] - 1 if hashes else 0)


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
