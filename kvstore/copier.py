"""Copies blocks between tensors and slots of an arena. Knows shapes and bytes, never keys.

In a slot the payload is layer-major, ``(num_layers, blocks_per_chunk, layer_nbytes)``; in a
tensor blocks come one after the other, ``(n, num_layers, layer_nbytes)``. Copies run on the
calling thread: torch's own threads collapse beside I/O. CUDA copies go straight to and from
the pinned slots, all on the caller's stream, and are waited for.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.layout import KVLayout
from kvstore.slot import Rows, Slots

_LONG_RUN: Final = 4  # slots; shorter runs cost more in numpy's set-up than in copying


class Copier:
    """Args:
    rows: the arena's rows.
    """

    def __init__(self, layout: KVLayout, blocks_per_chunk: int, rows: Rows) -> None:
        self.layout, self._blocks_per_chunk = layout, blocks_per_chunk
        self._payload = rows[:, : layout.block_nbytes * blocks_per_chunk]

    def check(self, blocks: torch.Tensor, name: str) -> None:
        """Raises ConfigError unless blocks is (n, *block_shape) of the layout's dtype."""
        shape, dtype = self.layout.block_shape, self.layout.dtype
        if tuple(blocks.shape[1:]) != shape or blocks.dtype != dtype:
            wanted = f"(n, {', '.join(map(str, shape))}) of {dtype}"
            raise ConfigError(f"{name}: shape {tuple(blocks.shape)} of {blocks.dtype}; give {wanted}")

    def store(self, blocks: torch.Tensor, slots: Slots) -> None:
        """Copy ``len(slots) * blocks_per_chunk`` blocks into slots; done when it returns."""
        if not len(slots):
            return
        source = blocks.contiguous().view(torch.uint8).view(len(slots), -1)
        if self._blocks_per_chunk == 1:
            if source.is_cuda:
                self._copy_cuda(slots, source, to_slots=True)
            else:
                self._copy(slots, source.numpy(), to_slots=True)
            return
        by_block = source.cpu().numpy().reshape(len(slots), self._blocks_per_chunk, self.layout.num_layers, -1)
        for slot, chunk in zip(slots.tolist(), by_block, strict=True):
            np.copyto(self._by_layer(slot), chunk.swapaxes(0, 1))

    def load(self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor) -> None:
        """Copy block ``positions[i]`` of slot ``slots[i]`` to ``out[i]``; done when it returns.

        Args:
            out: contiguous, (len(slots), *block_shape).
        """
        if not len(slots):
            return
        target = out.view(torch.uint8).view(len(slots), -1)
        if self._blocks_per_chunk == 1:
            if target.is_cuda:
                self._copy_cuda(slots, target, to_slots=False)
            else:
                self._copy(slots, target.numpy(), to_slots=False)
            return
        staged = target if not target.is_cuda else torch.empty(target.shape, dtype=target.dtype)
        by_layer = staged.numpy().reshape(len(slots), self.layout.num_layers, -1)
        for block, slot, position in zip(by_layer, slots.tolist(), positions.tolist(), strict=True):
            np.copyto(block, self._by_layer(slot)[:, position])
        if target.is_cuda:
            target.copy_(staged)

    def _by_layer(self, slot: int) -> NDArray[np.uint8]:
        return np.asarray(self._payload[slot].reshape(self.layout.num_layers, self._blocks_per_chunk, -1))

    def _copy(self, slots: Slots, blocks: NDArray[np.uint8], *, to_slots: bool) -> None:
        """Copy whole slots' payloads; long runs of neighbours in one call."""
        breaks = np.flatnonzero(np.diff(slots) != 1) + 1
        if (len(breaks) + 1) * _LONG_RUN > len(slots):
            if to_slots:
                self._payload[slots] = blocks
            else:
                self._copy_each(slots, blocks)
            return
        starts, ends = [0, *breaks.tolist()], [*breaks.tolist(), len(slots)]
        for start, end, first in zip(starts, ends, slots[starts].tolist(), strict=True):
            rows = self._payload[first : first + end - start]
            target, source = (rows, blocks[start:end]) if to_slots else (blocks[start:end], rows)
            np.copyto(target, source)

    def _copy_each(self, slots: Slots, blocks: NDArray[np.uint8]) -> None:
        """Load slot by slot: numpy would gather them in memory of its own first, and memmove needs no views."""
        nbytes = blocks.shape[1]
        sources = (self._payload.ctypes.data + slots * self._payload.strides[0]).tolist()
        first = blocks.ctypes.data
        for target, source in zip(range(first, first + blocks.nbytes, nbytes), sources, strict=True):
            ctypes.memmove(target, source, nbytes)

    def _copy_cuda(self, slots: Slots, blocks: torch.Tensor, *, to_slots: bool) -> None:
        for slot, block in zip(slots.tolist(), blocks, strict=True):
            row = torch.from_numpy(self._payload[slot])
            target, source = (row, block) if to_slots else (block, row)
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(blocks.device).synchronize()
