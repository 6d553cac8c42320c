"""The blocks of a slot's payload as K and V per layer, for each order of bytes that is known.

Stores load and store payloads as they are; only who looks into them needs to know.

    LBKHTD          layer, block, K or V, head, token, element: `kvstore.TieredStore`
    vllm ... LBHNC  rank, layer, block, head, token, K then V: `connectors.vllm`
    vllm ... LBNHC  rank, layer, block, token, head, K then V
    vllm ... cpu LBHNC vec, or vec16    rank, layer, block, head, K then V; of K element, token, of V token, element
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvstore.errors import KVStoreError
from kvstore.layout import DTYPES, Dtype, KVLayout

if TYPE_CHECKING:
    import torch

_MOST_TENSORS: Final = 1 << 16
_ENGINE_ORDERS: Final = ("LBHNC", "LBNHC")


@dataclass(frozen=True, slots=True)
class PayloadTensor:
    """A part of a payload that has one meaning, as it lies there."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]


def payload_tensors(layout: KVLayout, blocks_per_chunk: int, byte_layout: str, tp_size: int) -> list[PayloadTensor]:
    """What a payload consists of, in the order of its bytes; one tensor of bytes where that is not known.

    A dimension of an engine's pages that holds K then V has ``kv_dim * head_size`` elements.
    """
    heads, tokens, size = layout.num_kv_heads, layout.block_size, layout.head_size
    order, is_cpu = _order_of_pages(byte_layout)
    shape: tuple[int, ...]
    if byte_layout == "LBKHTD":
        num_ranks, shape = 1, (layout.kv_dim, heads, tokens, size)
    elif order is not None and not is_cpu and heads % tp_size == 0:
        of_rank = (heads // tp_size, tokens) if order == "LBHNC" else (tokens, heads // tp_size)
        num_ranks, shape = tp_size, (*of_rank, layout.kv_dim * size)
    else:
        num_ranks, shape = 0, ()
    if not 0 < num_ranks * layout.num_layers <= _MOST_TENSORS:
        return [PayloadTensor("payload", DTYPES["uint8"], (blocks_per_chunk * layout.block_nbytes,))]
    prefixes = [f"rank.{rank}." for rank in range(num_ranks)] if num_ranks > 1 else [""]
    return [
        PayloadTensor(f"{prefix}layer.{i:03d}", layout.stored_dtype, (blocks_per_chunk, *shape))
        for prefix in prefixes
        for i in range(layout.num_layers)
    ]


def parts_of(
    payload: torch.Tensor, layout: KVLayout, blocks_per_chunk: int, byte_layout: str, tp_size: int
) -> list[torch.Tensor]:
    """K and V, or what a latent is, as views of a payload: what is written to them is written there.

    Args:
        payload: uint8, (payload_nbytes,).
    Returns:
        ``kv_dim`` views of shape (blocks_per_chunk, num_layers, tp_size, num_kv_heads // tp_size, block_size,
        head_size).
    Raises:
        KVStoreError: the byte layout is not known.
    """
    layers, heads, tokens, size = layout.num_layers, layout.num_kv_heads, layout.block_size, layout.head_size
    kv, flat, of_rank = layout.kv_dim, payload.view(layout.dtype), layout.num_kv_heads // tp_size
    if byte_layout == "LBKHTD":
        whole = flat.view(layers, blocks_per_chunk, kv, heads, tokens, size)
        return [whole[:, :, i].transpose(0, 1).unsqueeze(2) for i in range(kv)]
    order, is_cpu = _order_of_pages(byte_layout)
    if order is None or heads % tp_size or (is_cpu and kv != 2):
        raise KVStoreError(f"byte layout {byte_layout!r} is not known here: what K and V are cannot be told apart")
    ranks = (tp_size, layers, blocks_per_chunk)
    if is_cpu:
        k, v = flat.view(*ranks, of_rank, 2, tokens * size).unbind(4)
        k_RLBHTD = k.view(*ranks, of_rank, size, tokens).transpose(-1, -2)
        return [part.permute(2, 1, 0, 3, 4, 5) for part in (k_RLBHTD, v.view(*ranks, of_rank, tokens, size))]
    if order == "LBHNC":
        return [part.permute(2, 1, 0, 3, 4, 5) for part in flat.view(*ranks, of_rank, tokens, kv, size).unbind(5)]
    return [part.permute(2, 1, 0, 4, 3, 5) for part in flat.view(*ranks, tokens, of_rank, kv, size).unbind(5)]


def blocks_of(
    payload: torch.Tensor, layout: KVLayout, blocks_per_chunk: int, byte_layout: str, tp_size: int
) -> torch.Tensor:
    """A copy of shape (blocks_per_chunk, *layout.block_shape); see `parts_of`."""
    import torch

    parts = parts_of(payload, layout, blocks_per_chunk, byte_layout, tp_size)
    return torch.stack([part.flatten(2, 3) for part in parts], dim=2)


def _order_of_pages(byte_layout: str) -> tuple[str | None, bool]:
    """The order of an engine's pages, and whether they are packed as vLLM's CPU attention does."""
    words = byte_layout.split()
    order = next((word for word in words if word in _ENGINE_ORDERS), None)
    if words[:1] != ["vllm"] or order is None:
        return None, False
    packing = words[words.index(order) + 1 :]
    if "cpu" in words:
        return (order, True) if order == "LBHNC" and packing in (["vec"], ["vec16"]) else (None, False)
    return order, False
