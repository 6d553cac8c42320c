"""vLLM's block hashes, without vLLM: the keys of a prompt in a store that a vLLM engine wrote.

A block's hash is taken over (hash of the block before, token ids, extra keys), made bytes by
pickle or by canonical CBOR. Both are written here for just these types; nothing is ever read by
either. As of vLLM 0.32, ``vllm/v1/core/kv_cache_utils.py`` and ``vllm/utils/hashing.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Final

from kvstore.errors import ConfigError
from kvstore.keys import BlockKey

Value = None | int | str | bytes | tuple["Value", ...]
_MAX_FRAME_NBYTES: Final = 1 << 16  # from there on pickle cuts what it writes


def prompt_keys(
    tokens: Sequence[int], block_size: int, *, algorithm: str, seed: str, salt: str = "", group: int = 0
) -> list[BlockKey]:
    """Of the full blocks of a prompt of text, without an adapter.

    Args:
        algorithm: vLLM's ``prefix_caching_hash_algo``.
        seed: of the chain, as in the identity.
        salt: the request's ``cache_salt``.
    Raises:
        ConfigError: an algorithm whose hashes are no block hashes here, or blocks too large for it.
    """
    encode = _ENCODERS.get(algorithm)
    if encode is None:
        raise ConfigError(f"hash_algorithm {algorithm!r}: prompts' keys are known for {', '.join(_ENCODERS)}")
    parent = hashlib.sha256(encode(seed)).digest()
    keys: list[BlockKey] = []
    extra: Value = (("cache_salt", salt),) if salt else None
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = (parent, tuple(tokens[start : start + block_size]), extra)
        parent = hashlib.sha256(encode(block)).digest()
        keys.append(BlockKey.of(parent, group))
        extra = None
    return keys


def pickled(value: Value) -> bytes:
    """As ``pickle.dumps(value, protocol=5)``, where no part of it comes twice.

    Raises:
        ConfigError: so large that pickle would cut it up.
    """
    body = _pickled(value) + b"."
    if len(body) >= _MAX_FRAME_NBYTES:
        raise ConfigError(f"blocks of {len(body)} bytes of token ids; their keys are not known here")
    frame = b"\x95" + len(body).to_bytes(8, "little") if len(body) >= 4 else b""
    return b"\x80\x05" + frame + body


def _pickled(value: Value) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, int):
        return _pickled_int(value)
    if isinstance(value, bytes):
        return b"C" + len(value).to_bytes(1, "little") + value + b"\x94"
    if isinstance(value, str):
        data = value.encode(errors="surrogatepass")
        head = b"\x8c" + len(data).to_bytes(1, "little") if len(data) < 256 else b"X" + len(data).to_bytes(4, "little")
        return head + data + b"\x94"
    items = b"".join(map(_pickled, value))
    if not value:
        return b")"
    return items + b"\x85\x86\x87"[len(value) - 1 : len(value)] + b"\x94" if len(value) < 4 else b"(" + items + b"t\x94"


def _pickled_int(value: int) -> bytes:
    for limit, code, size in ((1 << 8, b"K", 1), (1 << 16, b"M", 2), (1 << 31, b"J", 4)):
        if value < limit:
            return code + value.to_bytes(size, "little")
    size = value.bit_length() // 8 + 1
    return b"\x8a" + size.to_bytes(1, "little") + value.to_bytes(size, "little")


def cbor(value: Value) -> bytes:
    """Canonical CBOR (RFC 8949, 4.2)."""
    if value is None:
        return b"\xf6"
    if isinstance(value, int):
        return _cbor_head(0, value)
    if isinstance(value, bytes):
        return _cbor_head(2, len(value)) + value
    if isinstance(value, str):
        data = value.encode(errors="surrogatepass")
        return _cbor_head(3, len(data)) + data
    return _cbor_head(4, len(value)) + b"".join(map(cbor, value))


def _cbor_head(kind: int, number: int) -> bytes:
    if number < 24:
        return bytes([kind << 5 | number])
    for i, size in enumerate((1, 2, 4, 8)):
        if number < 1 << 8 * size:
            return bytes([kind << 5 | 24 + i]) + number.to_bytes(size, "big")
    raise ConfigError(f"token id {number}: too large")


_ENCODERS: Final[dict[str, Callable[[Value], bytes]]] = {"sha256": pickled, "sha256_cbor": cbor}
