"""How stored KV describes itself, wherever it lies: checked before anything is allocated by it.

A directory, or a file, is described by whoever wrote it, who may be anyone.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final, Self

from kvstore.identity import FORMAT_VERSION, INITIAL_EPOCH, NAMESPACE_NBYTES, KVIdentity, Placement
from kvstore.layout import KVLayout, parse_dtype
from kvstore.slot import DIGEST_NBYTES, SlotFormat

MAX_CHUNK_NBYTES: Final = 4 << 30
_MAX_FIELDS: Final = 64
_MAX_RANKS: Final = 4096
_MAX_LAYERS: Final = 4096
_MAX_SIZE: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredFormat:
    """How a directory says its chunks look: identity, placement, and what follows from them."""

    content: dict[str, str | int]
    placed: dict[str, str | int]
    layout: KVLayout
    slot: SlotFormat
    byte_layout: str
    tp_size: int

    @classmethod
    def of(cls, content: object, placed: object) -> Self:
        """Check what was read from a directory's JSON.

        Raises:
            ValueError: it describes no KV that this version could read; says why.
        """
        content, placed = _fields(content, "identity"), _fields(placed, "placement")
        if content.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format version {content.get('format_version')!r}; this kvstore reads {FORMAT_VERSION}")
        layout = KVLayout(
            num_layers=_number(placed, "num_layers", _MAX_LAYERS),
            num_kv_heads=_number(placed, "num_kv_heads"),
            head_size=_number(content, "head_size"),
            block_size=_number(content, "block_size"),
            dtype=parse_dtype(str(content.get("dtype"))),
            kv_dim=_number(content, "kv_dim", 2),
        )
        blocks_per_chunk = _number(placed, "blocks_per_chunk")
        placement = hashlib.sha256(canonical_json(placed)).digest()[:DIGEST_NBYTES]
        slot = SlotFormat(layout.block_nbytes * blocks_per_chunk, blocks_per_chunk, placement)
        if slot.slot_nbytes > MAX_CHUNK_NBYTES:
            raise ValueError(f"chunks of {slot.slot_nbytes} bytes")
        return cls(
            content, placed, layout, slot, str(placed.get("byte_layout")), _number(placed, "tp_size", _MAX_RANKS)
        )

    @property
    def initial_namespace(self) -> bytes:
        """The namespace of stores that have not been reset."""
        digest = hashlib.sha256(canonical_json(self.content)).digest()
        return hashlib.sha256(digest + INITIAL_EPOCH).digest()[:NAMESPACE_NBYTES]

    def identity(self) -> KVIdentity:
        """What a store of this KV is opened with; raises ConfigError where a field is none that a store has."""
        content, placed = self.content, self.placed
        names = ("draft_model", "kv_scales", "rope", "group_kind", "hash_algorithm", "hash_seed")
        texts = {name: str(content[name]) for name in names if name in content}
        defaults = {"tp_size": 1, "pp_size": 1, "first_layer": 0, "first_kv_head": 0}
        numbers = {name: placed.get(name, default) for name, default in defaults.items()}
        return KVIdentity(
            model=str(content.get("model", "")),
            revision=str(content.get("revision", "")),
            layout=self.layout,
            placement=Placement(byte_layout=self.byte_layout, **numbers),  # type: ignore[arg-type]
            **texts,
        )


def canonical_json(fields: dict[str, str | int]) -> bytes:
    """The form whose SHA-256 is a `KVIdentity`'s digest."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def _fields(value: object, what: str) -> dict[str, str | int]:
    if not isinstance(value, dict) or len(value) > _MAX_FIELDS:
        raise ValueError(f"{what} is no mapping")
    if not all(isinstance(k, str) and isinstance(v, str | int) for k, v in value.items()):
        raise ValueError(f"{what} has values that are neither texts nor numbers")
    return value


def _number(fields: dict[str, Any], name: str, most: int = _MAX_SIZE) -> int:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name} is {value!r}")
    return value
