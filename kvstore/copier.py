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
            places = np.arange(len(slots))
            if source.is_cuda:
                self._copy_cuda(slots, source, places, to_slots=True)
            else:
                self._copy(slots, source.numpy(), places, to_slots=True)
            return
        by_block = source.cpu().numpy().reshape(len(slots), self._blocks_per_chunk, self.layout.num_layers, -1)
        for slot, chunk in zip(slots.tolist(), by_block, strict=True):
            np.copyto(self._by_layer(slot), chunk.swapaxes(0, 1))

    def load(
        self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor, places: NDArray[np.int64] | None = None
    ) -> None:
        """Copy block ``positions[i]`` of slot ``slots[i]`` to ``out[places[i]]``; done when it returns.

        Args:
            out: contiguous, (n, *block_shape).
            places: ascending; from 0 on where there are none.
        """
        if not len(slots):
            return
        places = np.arange(len(slots)) if places is None else places
        target = out.view(torch.uint8).view(len(out), -1)
        if self._blocks_per_chunk > 1:
            self._load_blocks(slots, positions, target, places)
        elif target.is_cuda:
            self._copy_cuda(slots, target[places[0] : places[-1] + 1], places - places[0], to_slots=False)
        else:
            self._copy(slots, target.numpy(), places, to_slots=False)

    def _by_layer(self, slot: int) -> NDArray[np.uint8]:
        return np.asarray(self._payload[slot].reshape(self.layout.num_layers, self._blocks_per_chunk, -1))

    def _load_blocks(
        self, slots: Slots, positions: NDArray[np.int64], target: torch.Tensor, places: NDArray[np.int64]
    ) -> None:
        staged = target if not target.is_cuda else torch.empty((len(slots), target.shape[1]), dtype=target.dtype)
        by_layer = staged.numpy().reshape(len(staged), self.layout.num_layers, -1)
        rows = np.arange(len(slots)) if target.is_cuda else places
        for row, slot, position in zip(rows.tolist(), slots.tolist(), positions.tolist(), strict=True):
            np.copyto(by_layer[row], self._by_layer(slot)[:, position])
        if target.is_cuda:
            target[torch.from_numpy(places).to(target.device)] = staged.to(target.device)

    def _copy(self, slots: Slots, blocks: NDArray[np.uint8], places: NDArray[np.int64], *, to_slots: bool) -> None:
        """Copy whole slots' payloads; long runs of neighbours in one call."""
        breaks = (np.flatnonzero((slots[1:] - slots[:-1] != 1) | (places[1:] - places[:-1] != 1)) + 1).tolist()
        if (len(breaks) + 1) * _LONG_RUN > len(slots) > _LONG_RUN:
            self._copy_each(slots, blocks, places, to_slots=to_slots)
            return
        starts, ends = [0, *breaks], [*breaks, len(slots)]
        for n, slot, place in zip(
            np.subtract(ends, starts).tolist(), slots[starts].tolist(), places[starts].tolist(), strict=True
        ):
            rows, part = self._payload[slot : slot + n], blocks[place : place + n]
            target, source = (rows, part) if to_slots else (part, rows)
            np.copyto(target, source)

    def _copy_each(self, slots: Slots, blocks: NDArray[np.uint8], places: NDArray[np.int64], *, to_slots: bool) -> None:
        """Slot by slot: numpy would gather them in memory of its own first, and memmove needs no views."""
        nbytes = blocks.shape[1]
        rows = (self._payload.ctypes.data + slots * self._payload.strides[0]).tolist()
        parts = (blocks.ctypes.data + places * blocks.strides[0]).tolist()
        for target, source in zip(*((rows, parts) if to_slots else (parts, rows)), strict=True):
            ctypes.memmove(target, source, nbytes)

    def _copy_cuda(self, slots: Slots, blocks: torch.Tensor, places: NDArray[np.int64], *, to_slots: bool) -> None:
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            row, block = torch.from_numpy(self._payload[slot]), blocks[place]
            target, source = (row, block) if to_slots else (block, row)
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(blocks.device).synchronize()
