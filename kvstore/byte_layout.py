"""The blocks of a slot's payload as K and V per layer, for each order of bytes that is known.

Stores load and store payloads as they are; only who looks into them needs to know.

    LBKHTD          layer, block, K or V, head, token, element: `kvstore.TieredStore`
    vllm ... LBHNC  rank, layer, block, head, token, K then V: `connectors.vllm`
    vllm ... LBNHC  rank, layer, block, token, head, K then V
"""

from __future__ import annotations

import torch

from kvstore.errors import KVStoreError
from kvstore.layout import KVLayout


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
    engine, _, order = byte_layout.partition(" ")
    order = order.rpartition(" ")[2]
    if engine == "vllm" and order in ("LBHNC", "LBNHC"):
        of_rank = (heads // tp_size, tokens) if order == "LBHNC" else (tokens, heads // tp_size)
        by_rank = flat.reshape(tp_size, layers, blocks_per_chunk, *of_rank, kv, size)
        if order == "LBNHC":
            by_rank = by_rank.transpose(3, 4)
        return by_rank.permute(2, 1, 5, 0, 3, 4, 6).reshape(blocks_per_chunk, *layout.block_shape)
    raise KVStoreError(f"byte layout {byte_layout!r} is not known here: what K and V are cannot be told apart")
