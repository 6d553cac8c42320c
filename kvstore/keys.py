"""Block keys and the chain of block hashes. No I/O.

``hash[i] = SHA-256(hash[i-1] || token ids of block i as little-endian int64)``; the chain
starts from a digest of content identity, tenant and adapter, so a key names one prefix of
one model for one tenant.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from kvstore.errors import ConfigError, KeyFormatError
from kvstore.identity import KVIdentity

if TYPE_CHECKING:
    import torch

BLOCK_HASH_NBYTES: Final = 32
KEY_NBYTES: Final = BLOCK_HASH_NBYTES + 4
_ROOT: Final = b"kvstore block hash 1\0"
MAX_TOKEN_ID: Final = 2**63 - 1


class BlockKey(bytes):
    """A block hash (32 bytes) followed by the KV cache group's index (uint32, little-endian).

    A subclass of bytes: hashing, comparing and joining run at the speed of bytes.
    """

    __slots__ = ()

    def __new__(cls, value: bytes) -> Self:
        """Raises KeyFormatError unless ``value`` has 36 bytes."""
        if len(value) != KEY_NBYTES:
            raise KeyFormatError(f"a block key has {KEY_NBYTES} bytes, got {len(value)}")
        return super().__new__(cls, value)

    @classmethod
    def of(cls, block_hash: bytes, group: int = 0) -> Self:
        """The key of an engine's own 32-byte block hash in KV cache group ``group``."""
        return cls(block_hash + group.to_bytes(4, "little"))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The key that `str` of a key shows; raises KeyFormatError for other text."""
        head, _, group = text.partition(".")
        try:
            return cls.of(bytes.fromhex(head), int(group or "0"))
        except (ValueError, OverflowError) as e:
            raise KeyFormatError(f"{text!r} is not a block key; give 64 hex digits, then optionally .GROUP") from e

    @property
    def block_hash(self) -> bytes:
        return self[:BLOCK_HASH_NBYTES]

    @property
    def group(self) -> int:
        return int.from_bytes(self[BLOCK_HASH_NBYTES:], "little")

    def __str__(self) -> str:
        return f"{self.block_hash.hex()}.{self.group}"

    def __repr__(self) -> str:
        return f"BlockKey({self.block_hash[:6].hex()}….{self.group})"


def hash_blocks(
    token_ids: Sequence[int] | np.ndarray | torch.Tensor,
    block_size: int,
    identity: KVIdentity,
    *,
    tenant: str = "",
    adapter_digest: bytes = b"",
    group: int = 0,
) -> list[BlockKey]:
    """Chained keys of the full blocks of a prompt; a partial last block has none.

    Args:
        token_ids: shape (num_tokens,), integers from 0 to 2**63 - 1.
        block_size: tokens a block; must be the identity's.
        tenant: salt; KV of one tenant is never a hit for another.
        adapter_digest: digest of the content of a LoRA adapter in effect.
    Raises:
        ConfigError: ``block_size`` is not the layout's, or the tokens are not a flat
            sequence of non-negative integers.
    """
    if block_size != identity.layout.block_size:
        raise ConfigError(f"block_size: {block_size} is not the identity's {identity.layout.block_size}")
    tokens = _tokens(token_ids)
    num_blocks = len(tokens) // block_size
    data = memoryview(tokens[: num_blocks * block_size].tobytes())
    salt = tenant.encode()
    parent = hashlib.sha256(
        _ROOT + identity.digest() + len(salt).to_bytes(8, "little") + salt + adapter_digest
    ).digest()
    suffix = group.to_bytes(4, "little")
    stride = block_size * 8
    keys = []
    for start in range(0, num_blocks * stride, stride):
        h = hashlib.sha256(parent)
        h.update(data[start : start + stride])
        parent = h.digest()
        keys.append(BlockKey(parent + suffix))
    return keys


def keys_to_array(keys: Sequence[BlockKey]) -> np.ndarray:
    """Keys as uint8, shape (len(keys), 36).

    Raises:
        KeyFormatError: one of them does not have 36 bytes.
    """
    if not set(map(len, keys)) <= {KEY_NBYTES}:
        raise KeyFormatError(f"every block key has {KEY_NBYTES} bytes")
    return np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_NBYTES)


def array_to_keys(array: np.ndarray) -> list[BlockKey]:
    """Inverse of `keys_to_array`."""
    data = np.ascontiguousarray(array, dtype=np.uint8).tobytes()
    return [BlockKey(data[i : i + KEY_NBYTES]) for i in range(0, len(data), KEY_NBYTES)]


def _tokens(token_ids: Sequence[int] | np.ndarray | torch.Tensor) -> np.ndarray:
    if "torch" in sys.modules:  # else nobody has a tensor
        import torch

        if isinstance(token_ids, torch.Tensor):
            token_ids = token_ids.detach().cpu().numpy()
    tokens = np.asarray(token_ids)
    if tokens.size == 0:
        return np.empty(0, dtype="<i8")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ConfigError(f"token_ids: give a flat sequence of integers, got {tokens.dtype} of shape {tokens.shape}")
    if tokens.min() < 0 or tokens.max() > MAX_TOKEN_ID:
        raise ConfigError(f"token_ids: {tokens.min()} to {tokens.max()}; allowed: 0 to 2**63 - 1")
    return tokens.astype("<i8", copy=False)
