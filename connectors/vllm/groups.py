"""An engine's KV cache groups: what is read of each, and how ranks share it; what can't be restored right is refused.

Groups differ in attention, and in nothing else: one shape of page, one block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from kvstore.errors import ConfigError
from kvstore.layout import KVLayout

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_SUPPORTED: Final = (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec)


class UnsupportedEngineError(ConfigError):
    """The engine is set up in a way whose KV cannot be stored and restored right."""


@dataclass(frozen=True, slots=True)
class CacheGroups:
    """What there is to store.

    Attributes:
        layout: of one block of the largest group, over all ranks.
        windows: by group, how many last blocks of a prefix are read; None: all of it.
        kind: all of it as text, for the identity.
        num_stripes: ranks that hold different KV.
        num_replicas: consecutive ranks that hold the same.
    """

    layout: KVLayout
    windows: tuple[int | None, ...]
    kind: str
    num_stripes: int
    num_replicas: int

    @classmethod
    def of(cls, config: VllmConfig, kv_cache: KVCacheConfig) -> CacheGroups:
        """Raises UnsupportedEngineError, which names what is not supported."""
        _check_engine(config)
        if not kv_cache.kv_cache_groups:
            raise UnsupportedEngineError("an engine without a KV cache is not supported")
        specs = [_spec(group) for group in kv_cache.kv_cache_groups]
        shapes = {_shape(spec) for spec in specs}
        if len(shapes) > 1:
            raise UnsupportedEngineError(
                f"KV cache groups of different pages ({', '.join(map(str, sorted(shapes, key=str)))}) are not supported"
            )
        (shape,) = shapes
        if kv_cache.hash_block_size not in (None, shape.block_size):
            raise UnsupportedEngineError(f"hashes of {kv_cache.hash_block_size} tokens a block are not supported")
        num_ranks, num_replicas = config.parallel_config.tensor_parallel_size, kv_cache.kv_tp_replicas
        num_stripes = num_ranks // num_replicas
        layout = KVLayout(
            num_layers=max(len(group.layer_names) for group in kv_cache.kv_cache_groups),
            num_kv_heads=shape.num_kv_heads * num_stripes,
            head_size=shape.head_size,
            block_size=shape.block_size,
            dtype=shape.dtype,
            kv_dim=shape.kv_dim,
        )
        if shape.page_nbytes * num_stripes != layout.layer_nbytes:
            raise UnsupportedEngineError(
                f"a page of {shape.page_nbytes} bytes is not {layout.layer_nbytes // num_stripes}: "
                "padded pages, or scales in them, are not supported"
            )
        kinds = [_kind(spec, group) for spec, group in zip(specs, kv_cache.kv_cache_groups, strict=True)]
        windows = tuple(_window(spec) for spec in specs)
        kind = kinds[0] if len(kinds) == 1 else "; ".join(f"{i}: {kind}" for i, kind in enumerate(kinds))
        return cls(layout, windows, kind, num_stripes, num_replicas)


@dataclass(frozen=True, slots=True)
class _Shape:
    """Of a layer's page of one rank."""

    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    kv_dim: int
    page_nbytes: int


def _check_engine(config: VllmConfig) -> None:
    parallel, cache = config.parallel_config, config.cache_config
    for what, value in (
        ("pipeline parallelism", parallel.pipeline_parallel_size),
        ("decode context parallelism", parallel.decode_context_parallel_size),
        ("prefill context parallelism", getattr(parallel, "prefill_context_parallel_size", 1)),
        ("tensor parallelism over hosts", getattr(parallel, "nnodes", 1)),
    ):
        if value > 1:
            raise UnsupportedEngineError(f"{what} ({value}) is not supported")
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedEngineError(
            "calculate_kv_scales: KV with scales found at run time cannot be reused; give static ones"
        )


def _spec(group: KVCacheGroupSpec) -> AttentionSpec:
    spec = group.kv_cache_spec
    if type(spec) not in _SUPPORTED:
        raise UnsupportedEngineError(
            f"KV of {type(spec).__name__} ({group.layer_names[0]}) is not supported; "
            f"{', '.join(kind.__name__ for kind in _SUPPORTED)} are"
        )
    if group.host_resident or not group.enable_kv_transfer:
        raise UnsupportedEngineError(f"KV that stays in one engine ({group.layer_names[0]}) is not supported")
    if spec.num_heads != spec.num_kv_heads or spec.tokens_per_state != 1:
        raise UnsupportedEngineError(f"packed heads or states ({group.layer_names[0]}) are not supported")
    if spec.head_size_v not in (0, spec.head_size):
        raise UnsupportedEngineError(f"K and V of different sizes ({group.layer_names[0]}) are not supported")
    return spec


def _shape(spec: AttentionSpec) -> _Shape:
    kv_dim = 2 if spec.head_size_v else 1
    return _Shape(spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype, kv_dim, spec.page_size_bytes)


def _window(spec: AttentionSpec) -> int | None:
    if not isinstance(spec, SlidingWindowSpec):
        return None
    return max(1, -(-(spec.sliding_window - 1 + spec.extra_retained_tokens) // spec.block_size))


def _kind(spec: AttentionSpec, group: KVCacheGroupSpec) -> str:
    """Sliding windows are part of what is computed, also where an engine keeps their KV in full."""
    names = {"FullAttentionSpec": "full_attention", "SlidingWindowSpec": "sliding_window", "MLAAttentionSpec": "mla"}
    parts: dict[str, Any] = {
        "window": getattr(spec, "sliding_window", None),
        "chunk": getattr(spec, "attention_chunk_size", None),
        "layers": len(group.layer_names),
    }
    return names[type(spec).__name__] + "".join(f" {name}={value}" for name, value in parts.items() if value)
