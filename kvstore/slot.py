"""The bytes of a slot: payload, padding, and a trailer that says what they are.

    [0, payload)            layer-major: (num_layers, blocks_per_chunk, kv_dim, heads, tokens, head_size)
    [payload, body)         padding up to a multiple of 4096 bytes for the whole slot
    [body, slot)            trailer: the chunk's block keys, then the footer

The footer's first digest covers [0, body), its second covers the trailer up to itself, so
any changed byte of a slot is noticed. Digests are xxh3_128, or keyed BLAKE2b where there
is an integrity key. This module never decides what to do about a bad slot.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.identity import FORMAT_VERSION, NAMESPACE_NBYTES, KVIdentity
from kvstore.keys import KEY_NBYTES

ALIGNMENT: Final = 4096
MAGIC: Final = b"KVSLOT\r\n"
DIGEST_NBYTES: Final = 16
MIN_KEY_NBYTES: Final = 16
FOOTER: Final = np.dtype(
    [
        ("magic", "V8"),
        ("version", "<u4"),
        ("num_keys", "<u4"),
        ("namespace", "V16"),
        ("placement", "V16"),
        ("generation", "<u8"),
        ("payload_nbytes", "<u8"),
        ("body_digest", "V16"),
        ("trailer_digest", "V16"),
    ]
)
_FOOTER: Final = struct.Struct("<16s16s16sQQ16s16s")  # the same; its first three fields as one
assert _FOOTER.size == FOOTER.itemsize

Rows = NDArray[np.uint8]  # (num_slots, slot_nbytes): an arena, or rows like it
Slots = NDArray[np.int64]  # (n,)
KeyArray = NDArray[np.uint8]  # (n, blocks_per_chunk, KEY_NBYTES)


@dataclass(frozen=True, slots=True)
class SlotFormat:
    """Where things lie in a slot. All sizes in bytes."""

    payload_nbytes: int
    blocks_per_chunk: int
    placement: bytes  # first 16 bytes of the placement digest

    @classmethod
    def of(cls, identity: KVIdentity, blocks_per_chunk: int) -> Self:
        """The format of slots that hold chunks of this identity."""
        placement = identity.placement_digest(blocks_per_chunk)[:16]
        return cls(identity.layout.block_nbytes * blocks_per_chunk, blocks_per_chunk, placement)

    @property
    def trailer_nbytes(self) -> int:
        return self.blocks_per_chunk * KEY_NBYTES + FOOTER.itemsize

    @property
    def slot_nbytes(self) -> int:
        need = self.payload_nbytes + self.trailer_nbytes
        return -(-need // ALIGNMENT) * ALIGNMENT

    @property
    def body_nbytes(self) -> int:
        return self.slot_nbytes - self.trailer_nbytes


@dataclass(frozen=True, slots=True)
class Trailers:
    """Parsed trailers of n slots; ``valid[i]`` says whether the others mean anything at i.

    Args:
        raw: all their bytes.
    """

    valid: NDArray[np.bool_]  # (n,)
    raw: bytes
    blocks_per_chunk: int

    @property
    def keys(self) -> KeyArray:
        n = len(self.valid)
        return self._rows()[:, : -FOOTER.itemsize].reshape(n, self.blocks_per_chunk, KEY_NBYTES)

    @property
    def namespaces(self) -> NDArray[np.void]:
        """Shape (n,), V16."""
        return self._footers()["namespace"]

    @property
    def generations(self) -> NDArray[np.uint64]:
        """Shape (n,)."""
        return self._footers()["generation"]

    def _rows(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.raw, dtype=np.uint8).reshape(len(self.valid), -1 if self.raw else FOOTER.itemsize)

    def _footers(self) -> NDArray[np.void]:
        return self._rows()[:, -FOOTER.itemsize :].copy().view(FOOTER)[:, 0]


class SlotCodec:
    """Seals slots before they leave host memory and verifies what comes back.

    Args:
        fmt: the slot's format.
        integrity_key: secret for keyed digests, 16 to 64 bytes; None for xxh3_128.
    """

    def __init__(self, fmt: SlotFormat, integrity_key: bytes | None = None) -> None:
        self.fmt, self._body_nbytes = fmt, fmt.body_nbytes
        self._digest = _digest_function(integrity_key)
        head, _, placement, _, payload_nbytes, _, _ = _FOOTER.unpack(self._footers(1).tobytes())
        self._fixed = (head, placement, payload_nbytes)

    def for_format(self, fmt: SlotFormat) -> SlotCodec:
        """The same digests, for slots of another format."""
        codec = SlotCodec(fmt)
        codec._digest = self._digest
        return codec

    def seal(self, rows: Rows, slots: Slots, keys: KeyArray, namespace: bytes, generations: NDArray[np.uint64]) -> None:
        """Write the trailers of ``rows[slots]``; payload and padding are only read."""
        fmt = self.fmt
        if len(namespace) != NAMESPACE_NBYTES:
            raise ValueError(f"namespace has {len(namespace)} bytes, not {NAMESPACE_NBYTES}")
        trailers = np.empty((len(slots), fmt.trailer_nbytes), dtype=np.uint8)
        trailers[:, : -FOOTER.itemsize] = keys.reshape(len(slots), -1)
        footers = self._footers(len(slots))
        footers["namespace"] = np.void(namespace)
        footers["generation"] = generations
        body = fmt.body_nbytes
        footers["body_digest"] = self._digests([rows[slot, :body].data for slot in slots.tolist()])
        trailers[:, -FOOTER.itemsize :] = footers.view(np.uint8).reshape(len(slots), -1)
        signed = trailers[:, :-DIGEST_NBYTES]
        digests = self._digests([trailer.data for trailer in signed])
        trailers[:, -DIGEST_NBYTES:] = digests.view(np.uint8).reshape(-1, DIGEST_NBYTES)
        rows[slots, body:] = trailers

    # Slots one by one, and arrays only of what is asked for: of the few slots that come at a time, numpy's calls
    # would cost more than the digests

    def parse(self, trailers: NDArray[np.uint8]) -> Trailers:
        """Read trailers, shape (n, trailer_nbytes), of any origin; never raises for their content."""
        raw, size = trailers.tobytes(), self.fmt.trailer_nbytes
        valid = [self._read(raw[at : at + size])[0] for at in range(0, len(raw), size)]
        return Trailers(np.array(valid, dtype=np.bool_), raw, self.fmt.blocks_per_chunk)

    def verify(self, rows: Rows, slots: Slots, namespace: bytes) -> Trailers:
        """Parse the trailers of ``rows[slots]``; valid where trailer, namespace and body all agree."""
        checked = [self._check(rows[slot].data, namespace) for slot in slots.tolist()]
        valid = np.array([is_valid for _, is_valid in checked], dtype=np.bool_)
        return Trailers(valid, b"".join(trailer for trailer, _ in checked), self.fmt.blocks_per_chunk)

    def holds(self, row: memoryview, key: bytes, namespace: bytes) -> bool:
        """Whether a slot is whole, of this namespace, and of a chunk that begins with this key."""
        trailer, is_valid = self._check(row, namespace)
        return is_valid and trailer[:KEY_NBYTES] == key

    def _check(self, row: memoryview, namespace: bytes) -> tuple[bytes, bool]:
        """A slot's trailer; whether it, the namespace and the body all agree."""
        body = self._body_nbytes
        trailer = bytes(row[body:])
        is_signed, space, digest = self._read(trailer)
        return trailer, is_signed and space == namespace and self._digest(row[:body]) == digest

    def _read(self, trailer: bytes) -> tuple[bool, bytes, bytes]:
        """Whether it is one of this format that agrees with its digest; its namespace; its body's digest."""
        head, space, placement, _, payload_nbytes, body_digest, signature = _FOOTER.unpack_from(
            trailer, len(trailer) - FOOTER.itemsize
        )
        is_mine = (head, placement, payload_nbytes) == self._fixed
        return is_mine and self._digest(memoryview(trailer)[:-DIGEST_NBYTES]) == signature, space, body_digest

    def _footers(self, n: int) -> NDArray[np.void]:
        """With what is the same in all slots of this format."""
        footers = np.zeros(n, dtype=FOOTER)
        footers["magic"] = np.void(MAGIC)
        footers["version"] = FORMAT_VERSION
        footers["num_keys"] = self.fmt.blocks_per_chunk
        footers["placement"] = np.void(self.fmt.placement)
        footers["payload_nbytes"] = self.fmt.payload_nbytes
        return footers

    def _digests(self, parts: list[memoryview]) -> NDArray[np.void]:
        return np.frombuffer(b"".join(map(self._digest, parts)), dtype=f"V{DIGEST_NBYTES}")


def read_integrity_key(path: str | None) -> bytes | None:
    """The secret in a file, surrounding white space taken off; raises ConfigError if it can't be read."""
    if path is None:
        return None
    try:
        with open(path, "rb") as f:
            return f.read(4096).strip()
    except OSError as e:
        raise ConfigError(f"integrity_key_file: {path!r} cannot be read ({e.strerror})") from e


def _digest_function(key: bytes | None) -> Callable[[memoryview], bytes]:
    if key is None:
        return xxhash.xxh3_128_digest
    if not MIN_KEY_NBYTES <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
        raise ConfigError(
            f"integrity key has {len(key)} bytes; give {MIN_KEY_NBYTES} to {hashlib.blake2b.MAX_KEY_SIZE}"
        )

    def keyed(data: memoryview) -> bytes:
        return hashlib.blake2b(data, key=key, digest_size=DIGEST_NBYTES).digest()

    return keyed
