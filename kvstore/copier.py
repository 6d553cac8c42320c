"""Copies blocks between tensors and slots of an arena. Knows shapes and bytes, never keys.

In a slot the payload is layer-major, ``(num_layers, blocks_per_chunk, layer_nbytes)``; in a
tensor blocks come one after the other, ``(n, num_layers, layer_nbytes)``. Copies run on the
calling thread: torch's own threads collapse beside I/O. CUDA copies go straight to and from
the pinned slots, all on the caller's stream, and are waited for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.errors import ConfigError
from kvstore.layout import KVLayout
from kvstore.slot import Rows, Slots

# `ctypes.memmove`, but for the interpreter lock, which it keeps: beside a busy thread each
# time the lock is given up costs 5 ms, and a slot is copied in microseconds
_memmove: Final = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memmove", ctypes.PyDLL(None))
)


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
        if self._blocks_per_chunk > 1:
            by_block = _bytes_of(blocks.contiguous().cpu()).reshape(
                len(slots), self._blocks_per_chunk, self.layout.num_layers, -1
            )
            for slot, chunk in zip(slots.tolist(), by_block, strict=True):
                np.copyto(self._by_layer(slot), chunk.swapaxes(0, 1))
        elif blocks.is_cuda:
            self._copy_cuda(slots, blocks, np.arange(len(slots)), to_slots=True)
        else:
            where = slice(slots[0], slots[-1] + 1) if _is_run(slots) else slots
            self._payload[where] = _bytes_of(blocks.contiguous())

    def load(
        self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor, places: NDArray[np.int64] | None = None
    ) -> None:
        """Copy block ``positions[i]`` of slot ``slots[i]`` to ``out[places[i]]``; done when it returns.

        Args:
            out: contiguous, (n, *block_shape).
            places: ascending; from 0 on where there are none.
        Raises:
            IndexError: out is too short; nothing was copied.
        """
        if not len(slots):
            return
        places = np.arange(len(slots)) if places is None else places
        if places[-1] >= len(out):
            raise IndexError(f"place {places[-1]} of {len(out)} blocks")
        if self._blocks_per_chunk > 1:
            self._load_blocks(slots, positions, out, places)
        elif out.is_cuda:
            self._copy_cuda(slots, out, places, to_slots=False)
        else:
            self._load_slots(slots, _bytes_of(out), places)

    def _by_layer(self, slot: int) -> NDArray[np.uint8]:
        return np.asarray(self._payload[slot].reshape(self.layout.num_layers, self._blocks_per_chunk, -1))

    def _load_slots(self, slots: Slots, target: NDArray[np.uint8], places: NDArray[np.int64]) -> None:
        nbytes = target.shape[1]
        if _is_run(slots) and _is_run(places):
            to, from_ = target[places[0] : places[-1] + 1], self._payload[slots[0] : slots[-1] + 1]
            np.copyto(_as_items(to), _as_items(from_))
            return
        sources = (self._payload.ctypes.data + slots * self._payload.strides[0]).tolist()
        targets = (target.ctypes.data + places * nbytes).tolist()
        move_each(targets, sources, nbytes)

    def _load_blocks(
        self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor, places: NDArray[np.int64]
    ) -> None:
        staged = torch.empty((len(slots), *out.shape[1:]), dtype=out.dtype) if out.is_cuda else out
        by_layer = _bytes_of(staged).reshape(len(staged), self.layout.num_layers, -1)
        rows = np.arange(len(slots)) if out.is_cuda else places
        for row, slot, position in zip(rows.tolist(), slots.tolist(), positions.tolist(), strict=True):
            np.copyto(by_layer[row], self._by_layer(slot)[:, position])
        if out.is_cuda:
            out[torch.from_numpy(places).to(out.device)] = staged.to(out.device)

    def _copy_cuda(self, slots: Slots, blocks: torch.Tensor, places: NDArray[np.int64], *, to_slots: bool) -> None:
        flat = blocks.contiguous().view(torch.uint8).view(len(blocks), -1)
        for slot, place in zip(slots.tolist(), places.tolist(), strict=True):
            row, block = torch.from_numpy(self._payload[slot]), flat[place]
            target, source = (row, block) if to_slots else (block, row)
            target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(blocks.device).synchronize()


def move_each(targets: Sequence[int], sources: Sequence[int], nbytes: int) -> None:
    """Copy ``nbytes`` from each source address to its target; both must be valid for as many."""
    for target, source in zip(targets, sources, strict=True):
        _memmove(target, source, nbytes)


def _bytes_of(blocks: torch.Tensor) -> NDArray[np.uint8]:
    """The memory of contiguous blocks, shape (n, block_nbytes)."""
    array: NDArray[np.uint8] = blocks.view(torch.uint8).numpy()
    return array.reshape(len(array), -1)


def _as_items(rows: NDArray[np.uint8]) -> NDArray[np.void]:
    """One item a row: numpy keeps the interpreter lock while it copies up to 500 items."""
    return rows.view(f"V{rows.shape[1]}")


def _is_run(numbers: NDArray[np.int64]) -> bool:
    """Whether these are consecutive."""
    return bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (numbers[1:] > numbers[:-1]).all())
