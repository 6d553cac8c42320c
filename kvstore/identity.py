"""What must be equal for two KV bytes to mean the same thing, and how those bytes are cut.

`KVIdentity` is the content; `Placement` says which part of it one process holds. Digests
are SHA-256 over canonical JSON, so any language can compute them again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Final

from kvstore.errors import ConfigError
from kvstore.layout import KVLayout

FORMAT_VERSION: Final = 1
INITIAL_EPOCH: Final = bytes(16)
NAMESPACE_NBYTES: Final = 16
_NOT_IMMUTABLE: Final = ("auto", "main", "master", "latest", "head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How one content is cut over processes and laid out. Equal placements only are served to each other.

    Args:
        byte_layout: order of the dimensions in a slot, outermost first; an engine's own name
            where its pages are stored as they are.
    """

    tp_size: int = 1
    pp_size: int = 1
    first_layer: int = 0
    first_kv_head: int = 0
    byte_layout: str = "LBKHTD"

    def __post_init__(self) -> None:
        if not _is_text(self.byte_layout):
            raise ConfigError(f"identity.placement.byte_layout: {self.byte_layout!r}; give a text that is not empty")
        for name, low in (("tp_size", 1), ("pp_size", 1), ("first_layer", 0), ("first_kv_head", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"identity.placement.{name}: {value!r}; give a whole number of at least {low}")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVIdentity:
    """Content identity of stored KV.

    Args:
        model: the model's name.
        revision: an immutable revision, or a digest of the weights. Names that move
            ("main", "latest", "auto") are refused.
        layout: shape of a block; ``dtype`` is the one that took effect.
        draft_model: name and revision of a draft model whose layers are stored too.
        kv_scales: digest of static KV quantisation scales.
        rope: the RoPE parameters that took effect, as text.
        group_kind: kind of attention of the KV cache group.
        hash_seed: seed of the chain of block hashes.
    """

    model: str
    revision: str
    layout: KVLayout
    draft_model: str = ""
    kv_scales: str = ""
    rope: str = ""
    group_kind: str = "full_attention"
    hash_algorithm: str = "sha256"
    hash_seed: str = ""
    placement: Placement = field(default_factory=Placement)

    def __post_init__(self) -> None:
        if not _is_text(self.model):
            raise ConfigError(f"identity.model: {self.model!r} is not allowed; give the model's name")
        if not _is_text(self.revision) or self.revision.lower() in _NOT_IMMUTABLE:
            raise ConfigError(
                f"identity.revision: {self.revision!r} can come to mean other weights; "
                "give an immutable revision (a commit hash) or a digest of the weights"
            )
        if not isinstance(self.layout, KVLayout):
            raise ConfigError(f"identity.layout: {self.layout!r} is not a KVLayout")
        for name in ("draft_model", "kv_scales", "rope", "group_kind", "hash_algorithm", "hash_seed"):
            value = getattr(self, name)
            if not isinstance(value, str) or value == "auto":
                raise ConfigError(
                    f"identity.{name}: {value!r} is not allowed; give the value that took effect, as text"
                )

    def content(self) -> dict[str, str | int]:
        """The fields of the content identity, flat and in canonical names."""
        return {
            "model": self.model,
            "revision": self.revision,
            "draft_model": self.draft_model,
            "dtype": self.layout.stored_dtype.name,
            "kv_scales": self.kv_scales,
            "rope": self.rope,
            "group_kind": self.group_kind,
            "kv_dim": self.layout.kv_dim,
            "head_size": self.layout.head_size,
            "block_size": self.layout.block_size,
            "hash_algorithm": self.hash_algorithm,
            "hash_seed": self.hash_seed,
            "format_version": FORMAT_VERSION,
        }

    def placed(self, blocks_per_chunk: int) -> dict[str, str | int]:
        """The fields that say how the bytes are cut and laid out (its size, not its rank)."""
        return {
            "num_layers": self.layout.num_layers,
            "num_kv_heads": self.layout.num_kv_heads,
            "tp_size": self.placement.tp_size,
            "pp_size": self.placement.pp_size,
            "first_layer": self.placement.first_layer,
            "first_kv_head": self.placement.first_kv_head,
            "blocks_per_chunk": blocks_per_chunk,
            "byte_layout": self.placement.byte_layout,
        }

    def digest(self) -> bytes:
        """SHA-256 of the content identity; 32 bytes."""
        return _digest(self.content())

    def placement_digest(self, blocks_per_chunk: int) -> bytes:
        """SHA-256 of the placement; 32 bytes."""
        return _digest(self.placed(blocks_per_chunk))

    def namespace(self, epoch: bytes = INITIAL_EPOCH) -> bytes:
        """Digest of content identity and epoch; 16 bytes."""
        return hashlib.sha256(self.digest() + epoch).digest()[:NAMESPACE_NBYTES]


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _digest(fields: dict[str, str | int]) -> bytes:
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).digest()
