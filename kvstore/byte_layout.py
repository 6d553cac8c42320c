"""The blocks of a slot's payload as K and V per layer, for each order of bytes that is known.

Stores load and store payloads as they are; only who looks into them needs to know.

    LBKHTD          layer, block, K or V, head, token, element: `kvstore.TieredStore`
    vllm ... LBHNC  rank, layer, block, head, token, K then V: `connectors.vllm`
    vllm ... LBNHC  rank, layer, block, token, head, K then V
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kvstore.errors import KVStoreError
from kvstore.layout import KVLayout

_MOST_TENSORS: Final = 1 << 16
_ENGINE_ORDERS: Final = ("LBHNC", "LBNHC")


@dataclass(frozen=True, slots=True)
class PayloadTensor:
    """A part of a payload that has one meaning, as it lies there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def payload_tensors(layout: KVLayout, blocks_per_chunk: int, byte_layout: str, tp_size: int) -> list[PayloadTensor]:
    """What a payload consists of, in the order of its bytes; one tensor of bytes where that is not known.

    A dimension of an engine's pages that holds K then V has ``kv_dim * head_size`` elements.
    """
    heads, tokens, size = layout.num_kv_heads, layout.block_size, layout.head_size
    order = _engine_order(byte_layout)
    shape: tuple[int, ...]
    if byte_layout == "LBKHTD":
        num_ranks, shape = 1, (layout.kv_dim, heads, tokens, size)
    elif order is not None and heads % tp_size == 0:
        of_rank = (heads // tp_size, tokens) if order == "LBHNC" else (tokens, heads // tp_size)
        num_ranks, shape = tp_size, (*of_rank, layout.kv_dim * size)
    else:
        num_ranks, shape = 0, ()
    if not 0 < num_ranks * layout.num_layers <= _MOST_TENSORS:
        return [PayloadTensor("payload", torch.uint8, (blocks_per_chunk * layout.block_nbytes,))]
    prefixes = [f"rank.{rank}." for rank in range(num_ranks)] if num_ranks > 1 else [""]
    return [
        PayloadTensor(f"{prefix}layer.{i:03d}", layout.dtype, (blocks_per_chunk, *shape))
        for prefix in prefixes
        for i in range(layout.num_layers)
    ]


def _engine_order(byte_layout: str) -> str | None:
    """The order of a known engine's pages."""
    engine, _, rest = byte_layout.partition(" ")
    order = rest.rpartition(" ")[2]
    return order if engine == "vllm" and order in _ENGINE_ORDERS else None


def blocks_of(
    payload: torch.Tensor, layout: KVLayout, blocks_per_chunk: int, byte_layout: str, tp_size: int
) -> torch.Tensor:
    """A view, or a copy, of shape (blocks_per_chunk, *layout.block_shape).

    Args:
        payload: uint8, (payload_nbytes,).
    Raises:
        KVStoreError: the byte layout is not known.
    """
    layers, heads, tokens, size = layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_size
    kv = layout.kv_dim
    flat = payload.view(layout.dtype)
    if byte_layout == "LBKHTD":
        return flat.reshape(layers, blocks_per_chunk, kv, heads, tokens, size).transpose(0, 1)
    order = _engine_order(byte_layout)
    if order is not None:
        of_rank = (heads // tp_size, tokens) if order == "LBHNC" else (tokens, heads // tp_size)
        by_rank = flat.reshape(tp_size, layers, blocks_per_chunk, *of_rank, kv, size)
        if order == "LBNHC":
            by_rank = by_rank.transpose(3, 4)
        return by_rank.permute(2, 1, 5, 0, 3, 4, 6).reshape(blocks_per_chunk, *layout.block_shape)
    raise KVStoreError(f"byte layout {byte_layout!r} is not known here: what K and V are cannot be told apart")
