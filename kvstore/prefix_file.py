"""A prompt's KV in one safetensors file that any engine's people can read.

    layers.{i}.key, layers.{i}.value    (num_tokens, num_kv_heads, head_size); a latent: layers.{i}.latent
    payload                             uint8 (num_blocks, block_nbytes), where K and V cannot be told apart
    keys                                uint8 (num_blocks, 36)

Its metadata is the identity: content and placement as canonical JSON. A file is taken only if its header is, field
by field, what its metadata and its number of blocks make it, and its length is what the header says: nothing
is allocated by a number that was not checked. Source of the container: the safetensors format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import torch

from kvstore.errors import KVStoreError
from kvstore.identity import KVIdentity
from kvstore.keys import KEY_NBYTES, BlockKey, array_to_keys
from kvstore.layout import KVLayout
from kvstore.stored_format import StoredFormat, canonical_json
from kvstore.strict_json import parse_json

MAX_HEADER_NBYTES: Final = 8 << 20
MAX_BLOCKS: Final = 1 << 24
_ALIGNMENT: Final = 8
_LENGTH_NBYTES: Final = 8


class PrefixFileError(KVStoreError):
    """A file is none of this format, or is damaged."""


@dataclass(frozen=True, slots=True)
class PrefixHeader:
    """What a file of so many blocks holds, and where.

    Attributes:
        content, placed: the identity's fields.
        is_raw: the file has payloads instead of K and V.
    """

    content: dict[str, str | int]
    placed: dict[str, str | int]
    layout: KVLayout
    num_blocks: int
    is_raw: bool

    @classmethod
    def of(cls, identity: KVIdentity, num_blocks: int, *, is_raw: bool = False) -> Self:
        return cls(identity.content(), identity.placed(1), identity.layout, num_blocks, is_raw)

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name -> dtype as safetensors calls it, and shape; in the order of their bytes."""
        layout, dtype = self.layout, self.layout.stored_dtype.safetensors
        keys = {"keys": ("U8", [self.num_blocks, KEY_NBYTES])}
        if self.is_raw:
            return {"payload": ("U8", [self.num_blocks, layout.block_nbytes]), **keys}
        shape = [self.num_blocks * layout.block_size, layout.num_kv_heads, layout.head_size]
        names = ("key", "value") if layout.kv_dim == 2 else ("latent",)
        return {f"layers.{i}.{name}": (dtype, shape) for i in range(layout.num_layers) for name in names} | keys

    def fields(self) -> dict[str, Any]:
        """The header as JSON."""
        metadata = {
            "format": "kvstore prefix 1",
            "identity": canonical_json(self.content).decode(),
            "placement": canonical_json(self.placed).decode(),
        }
        found: dict[str, Any] = {"__metadata__": metadata}
        at = 0
        for name, (dtype, shape) in self.tensors().items():
            nbytes = self._nbytes(name)
            found[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
            at += nbytes
        return found

    def pack(self) -> bytes:
        """The file's first bytes."""
        text = json.dumps(self.fields()).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(_LENGTH_NBYTES, "little") + text

    @property
    def data_nbytes(self) -> int:
        return self.num_blocks * (self.layout.block_nbytes + KEY_NBYTES)

    @property
    def keys_at(self) -> int:
        """Where the keys begin, behind the header."""
        return self.num_blocks * self.layout.block_nbytes

    def pieces(self, index: int, count: int = 1) -> list[tuple[int, int]]:
        """Where ``count`` blocks from ``index`` on lie behind the header: (offset, size) by layer, and by K and V."""
        layout = self.layout
        num_parts = 1 if self.is_raw else layout.num_layers * layout.kv_dim
        size = layout.block_nbytes // num_parts
        return [((part * self.num_blocks + index) * size, count * size) for part in range(num_parts)]

    def _nbytes(self, name: str) -> int:
        if name == "keys":
            return self.num_blocks * KEY_NBYTES
        parts = 1 if self.is_raw else self.layout.num_layers * self.layout.kv_dim
        return self.num_blocks * self.layout.block_nbytes // parts


def pieces_of(blocks: torch.Tensor) -> list[torch.Tensor]:
    """Blocks, shape (n, *layout.block_shape), as they lie in a file: by layer, and by K and V, one contiguous
    (n * block_size, num_kv_heads, head_size)."""
    blocks_L2BTHD = blocks.permute(1, 2, 0, 4, 3, 5).contiguous()
    return [part.flatten(0, 1) for layer in blocks_L2BTHD for part in layer]


def blocks_of_pieces(pieces: Sequence[torch.Tensor], layout: KVLayout) -> torch.Tensor:
    """Inverse of `pieces_of`."""
    shape = (layout.num_layers, layout.kv_dim, -1, layout.block_size, layout.num_kv_heads, layout.head_size)
    return torch.stack(list(pieces)).view(shape).permute(2, 0, 1, 4, 3, 5).contiguous()


class PrefixFile:
    """A file that was checked, open for reading."""

    def __init__(self, path: Path) -> None:
        """Raises PrefixFileError, which names the file and says what is wrong."""
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as e:
            raise PrefixFileError(f"{path}: {e.strerror}") from e
        try:
            self.header, self._start = _read_header(self._fd)
            keys = self._read(self.header.keys_at, self.header.num_blocks * KEY_NBYTES)
            self.keys: list[BlockKey] = array_to_keys(np.frombuffer(keys, dtype=np.uint8))
        except (OSError, ValueError, RecursionError) as e:
            os.close(self._fd)
            raise PrefixFileError(f"{path} is no file of a prefix: {e}") from e

    def block(self, index: int) -> torch.Tensor:
        """One block, of the layout's block_shape; where K and V cannot be told apart, its payload, uint8.

        Raises:
            PrefixFileError: the file has become shorter.
        """
        parts = [self._read(at, n) for at, n in self.header.pieces(index)]
        if self.header.is_raw:
            return torch.frombuffer(parts[0], dtype=torch.uint8)
        layout = self.header.layout
        return blocks_of_pieces([torch.frombuffer(part, dtype=layout.dtype) for part in parts], layout)[0]

    def close(self) -> None:
        os.close(self._fd)

    def _read(self, at: int, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        view, done = memoryview(data), 0
        while done < nbytes:
            n = os.preadv(self._fd, [view[done:]], self._start + at + done)
            if not n:
                raise PrefixFileError("the file has become shorter while it was read")
            done += n
        return data


def _read_header(fd: int) -> tuple[PrefixHeader, int]:
    """The header, and where it ends; raises ValueError for any other than what `PrefixHeader.pack` makes."""
    size = os.fstat(fd).st_size
    nbytes = int.from_bytes(os.pread(fd, _LENGTH_NBYTES, 0), "little")
    if not 2 <= nbytes <= min(MAX_HEADER_NBYTES, size - _LENGTH_NBYTES):
        raise ValueError(f"a header of {nbytes} bytes in a file of {size}")
    fields = parse_json(os.pread(fd, nbytes, _LENGTH_NBYTES))
    if not isinstance(fields, dict):
        raise ValueError("its header is no mapping")
    metadata, keys = fields.get("__metadata__"), fields.get("keys")
    if not isinstance(metadata, dict) or not isinstance(keys, dict):
        raise ValueError("it has no metadata, or no keys")
    content, placed = (parse_json(str(metadata.get(name)).encode()) for name in ("identity", "placement"))
    fmt = StoredFormat.of(content, placed)
    shape = keys.get("shape")
    num_blocks = shape[0] if isinstance(shape, list) and shape else None
    if not isinstance(num_blocks, int) or isinstance(num_blocks, bool) or not 0 <= num_blocks <= MAX_BLOCKS:
        raise ValueError(f"keys of shape {str(shape)[:80]}")
    header = PrefixHeader(fmt.content, fmt.placed, fmt.layout, num_blocks, "payload" in fields)
    if fields != header.fields():
        raise ValueError("its tensors are not those of its metadata")
    if size != _LENGTH_NBYTES + nbytes + header.data_nbytes:
        raise ValueError(f"{size} bytes, where {_LENGTH_NBYTES + nbytes + header.data_nbytes} are described")
    return header, _LENGTH_NBYTES + nbytes
