"""Copies blocks between tensors and slots of an arena. Knows shapes and bytes, never keys.

In a slot the payload is layer-major, ``(num_layers, blocks_per_chunk, layer_nbytes)``; in a
tensor blocks come one after the other, ``(n, num_layers, layer_nbytes)``. Neighbouring
slots are copied in one call. On one thread: torch's threaded copy collapses beside I/O.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.layout import KVLayout
from kvstore.slot import Rows, Slots


class Copier:
    """Args:
    rows: the arena's rows.
    """

    def __init__(self, layout: KVLayout, blocks_per_chunk: int, rows: Rows) -> None:
        self.layout, self._blocks_per_chunk = layout, blocks_per_chunk
        self._chunk_shape = (layout.num_layers, blocks_per_chunk, layout.layer_nbytes)
        self._payload = rows[:, : layout.block_nbytes * blocks_per_chunk]

    def check(self, blocks: torch.Tensor, name: str) -> None:
        """Raises ConfigError unless blocks is (n, *block_shape) of the layout's dtype."""
        shape, dtype = self.layout.block_shape, self.layout.dtype
        if tuple(blocks.shape[1:]) != shape or blocks.dtype != dtype:
            raise ConfigError(
                f"{name}: shape {tuple(blocks.shape)} of {blocks.dtype}; give (n, {', '.join(map(str, shape))}) of {dtype}"
            )

    def store(self, blocks: torch.Tensor, slots: Slots) -> None:
        """Copy ``len(slots) * blocks_per_chunk`` blocks into slots; done when it returns."""
        if blocks.device.type != "cpu":
            blocks = blocks.cpu()
        source = self._bytes(blocks.contiguous()).reshape(len(slots), *self._by_block)
        for part, target in self._runs(slots):
            np.copyto(target, source[part].swapaxes(1, 2))

    def load(self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy block ``positions[i]`` of slot ``slots[i]`` to ``out[i]``; done when it returns.

        Args:
            out: contiguous, (len(slots), *block_shape).
        """
        if out.device.type != "cpu":
            staged = torch.empty(out.shape, dtype=out.dtype)
            self.load(slots, positions, staged)
            out.copy_(staged)
            return
        target = self._bytes(out).reshape(len(slots), self.layout.num_layers, -1)
        if self._blocks_per_chunk == 1:
            for part, source in self._runs(slots):
                np.copyto(target[part], source[:, :, 0])
            return
        for i, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            np.copyto(target[i], self._payload[slot].reshape(self._chunk_shape)[:, position])

    @property
    def _by_block(self) -> tuple[int, int, int]:
        layers, blocks, nbytes = self._chunk_shape
        return (blocks, layers, nbytes)

    def _bytes(self, blocks: torch.Tensor) -> NDArray[np.uint8]:
        return blocks.view(torch.uint8).numpy() if blocks.numel() else np.empty(0, dtype=np.uint8)

    def _runs(self, slots: Slots) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
        """Parts of ``slots`` that are neighbours, each with its rows as (n, *chunk_shape)."""
        breaks = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
        for start, end in zip(breaks[:-1], breaks[1:], strict=True):
            if end > start:
                first = int(slots[start])
                yield slice(start, end), self._payload[first : first + end - start].reshape(-1, *self._chunk_shape)
