"""Blocks of a store <-> per-layer K and V of one sequence, with as few copies as there can be.

A staging tensor of at most ``PIECE_NBYTES`` has the store's layout; one strided copy per
layer moves it to or from (1, heads, tokens, head_size). Knows no engine and no keys.

Shapes: L layers, H KV heads, T tokens, D head size, B blocks, S tokens a block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, Protocol

import torch

from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey
from kvstore.layout import KVLayout

PIECE_NBYTES: Final = 32 << 20

Load = Callable[[torch.Tensor, int], int]
"""Fill blocks (B, *block_shape) from block ``first`` on; returns how many leading ones."""
Store = Callable[[torch.Tensor, int], int]
"""Take blocks (B, *block_shape) that begin at block ``first``; returns how many leading ones."""


class BlockStore(Protocol):
    """What an adapter needs of a store; `kvstore.TieredStore` is one."""

    @property
    def identity(self) -> KVIdentity: ...

    @property
    def layout(self) -> KVLayout: ...

    @property
    def blocks_per_chunk(self) -> int: ...

    def prefix_hit(self, keys: Sequence[BlockKey]) -> int: ...

    def get(
        self,
        keys: Sequence[BlockKey],
        out: torch.Tensor,
        *,
        first_block: int = 0,
        sources: dict[str, int] | None = None,
    ) -> int: ...

    def asked(
        self,
        keys: Sequence[BlockKey],
        hits: Mapping[str, int],
        *,
        request_id: str = "",
        tenant: str = "",
        adapter_digest: bytes = b"",
        num_tokens: int = 0,
        waited_s: float = 0.0,
    ) -> None: ...

    def ended(self, keys: Sequence[BlockKey], *, request_id: str = "", tenant: str = "") -> None: ...

    def put(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, first_block: int = 0) -> int: ...


class BlockMover:
    """Moves blocks of one layout. One thread at a time.

    Args:
        layout: of the store.
        devices: where each layer's K and V live.
        blocks_per_chunk: pieces are whole chunks.
    """

    def __init__(self, layout: KVLayout, devices: Sequence[torch.device], blocks_per_chunk: int) -> None:
        self._layout = layout
        self._devices = list(devices)
        self._per_chunk = blocks_per_chunk
        self._pinned = any(device.type == "cuda" for device in devices)
        self._staging: torch.Tensor | None = None

    def load(self, num_blocks: int, load: Load) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], int]:
        """K and V (1, H, T, D) of every layer, of the leading blocks that ``load`` returns.

        Returns:
            The layers, with room for ``num_blocks``, and how many blocks are really there.
        """
        layers_1htd = [self._empty(num_blocks, device) for device in self._devices]
        done = 0
        while done < num_blocks:
            staging = self._stage(num_blocks - done)
            loaded = load(staging, done)
            self._scatter(staging[:loaded], layers_1htd, done)
            done += loaded
            if loaded < len(staging):
                break
        return layers_1htd, done

    def store(
        self, layers_1htd: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int, end: int, store: Store
    ) -> int:
        """Give ``store`` the blocks [first, end) in pieces, prefix first; returns where it stopped."""
        while first < end:
            staging = self._stage(end - first)
            self._gather(layers_1htd, first, staging)
            taken = store(staging, first)
            first += taken
            if taken < len(staging):
                break
        return first

    def _empty(self, num_blocks: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (1, self._layout.num_kv_heads, num_blocks * self._layout.block_size, self._layout.head_size)
        return (
            torch.empty(shape, dtype=self._layout.dtype, device=device),
            torch.empty(shape, dtype=self._layout.dtype, device=device),
        )

    def _stage(self, num_blocks: int) -> torch.Tensor:
        """The staging tensor, cut to what fits; made once, as large as was ever needed."""
        chunk_nbytes = self._layout.block_nbytes * self._per_chunk
        most = max(1, PIECE_NBYTES // chunk_nbytes) * self._per_chunk
        wanted = min(num_blocks, most)
        if self._staging is None or len(self._staging) < wanted:
            self._staging = torch.empty(
                (wanted, *self._layout.block_shape), dtype=self._layout.dtype, pin_memory=self._pinned
            )
        return self._staging[:wanted]

    def _scatter(
        self, blocks: torch.Tensor, layers_1htd: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int
    ) -> None:
        on_device = {device: blocks.to(device, non_blocking=True) for device in set(self._devices)}
        for layer, (device, kv) in enumerate(zip(self._devices, layers_1htd, strict=True)):
            for index, tensor_1htd in enumerate(kv):
                view_hbsd = self._blocks_of(tensor_1htd, first, len(blocks))
                view_hbsd.copy_(on_device[device][:, layer, index].transpose(0, 1))
        self._synchronize()

    def _gather(
        self, layers_1htd: Sequence[tuple[torch.Tensor, torch.Tensor]], first: int, blocks: torch.Tensor
    ) -> None:
        device = self._devices[0]
        target = blocks if device.type == "cpu" else torch.empty_like(blocks, device=device)
        for layer, kv in enumerate(layers_1htd):
            for index, tensor_1htd in enumerate(kv):
                view_hbsd = self._blocks_of(tensor_1htd, first, len(blocks))
                target[:, layer, index].copy_(view_hbsd.transpose(0, 1))
        if target is not blocks:
            blocks.copy_(target)
            self._synchronize()

    def _blocks_of(self, tensor_1htd: torch.Tensor, first: int, num_blocks: int) -> torch.Tensor:
        """A view (H, B, S, D) of the tokens of some blocks."""
        size = self._layout.block_size
        tokens_htd = tensor_1htd[0, :, first * size : (first + num_blocks) * size]
        return tokens_htd.view(-1, num_blocks, size, self._layout.head_size)

    def _synchronize(self) -> None:
        """Staging is used again at once, so no copy from or to it may still run."""
        for device in set(self._devices):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
