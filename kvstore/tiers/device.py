"""The device tier: blocks in device memory, for stores without an engine.

The top tier: what lies here lies in host memory or below too, so it may be evicted at any
time. Inside an engine, the engine's own paged cache takes this place. Works block by block
on tensors; on CUDA it uses the current stream and waits for it, so that a slot is never
reused under a copy.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import torch

from kvstore.config import DeviceTierConfig
from kvstore.errors import ConfigError
from kvstore.keys import BlockKey, keys_to_array
from kvstore.layout import KVLayout
from kvstore.slot import Slots
from kvstore.slot_table import SlotTable
from kvstore.tiers.base import TierStats


class DeviceTier:
    """``num_blocks`` blocks on a torch device. Thread-safe."""

    name = "device"

    def __init__(self, config: DeviceTierConfig, layout: KVLayout) -> None:
        """Raises ConfigError where the device is not there or has too little memory."""
        try:
            self._blocks = torch.empty(
                (config.num_blocks, *layout.block_shape), dtype=layout.dtype, device=config.device
            )
        except (RuntimeError, AssertionError) as e:
            reason = str(e).splitlines()[0]
            raise ConfigError(
                f"device.num_blocks: {config.num_blocks} blocks of {layout.block_nbytes} bytes cannot be had on "
                f"device {config.device!r} ({reason}); give another device, or fewer blocks"
            ) from e
        self._table = SlotTable(config.num_blocks, 1, config.eviction_policy)
        self._lock = threading.Lock()
        self._stats = TierStats(name=self.name)
        self._block_nbytes = layout.block_nbytes
        self.epoch = 0  # rises with every reset

    def prefix_hit(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks present."""
        with self._lock:
            return len(self._table.find_prefix(keys))

    def get(self, keys: Sequence[BlockKey], out: torch.Tensor) -> int:
        """Copy the leading blocks to ``out``, on any device; returns how many."""
        start = time.monotonic()
        with self._lock:
            slots = self._table.find_prefix(keys)
            n = len(slots)
            if n:
                self._table.touch(slots)
                out[:n].copy_(self._blocks[self._on_device(slots)])
                self._wait()
            self._stats.hit_blocks += n
            self._stats.miss_blocks += len(keys) - n
            self._stats.read_nbytes += n * self._block_nbytes
            self._stats.read_s += time.monotonic() - start
        return n

    def put(self, keys: Sequence[BlockKey], blocks: torch.Tensor, epoch: int) -> None:
        """Keep leading blocks, as many as there is room for; those present are only arranged.

        Args:
            keys: prefix first; ``blocks[i]`` is the KV of ``keys[i]``.
            epoch: the one that the blocks belong to; those of a past one are not kept.
        """
        start = time.monotonic()
        with self._lock:
            if epoch != self.epoch:
                return
            absent = np.flatnonzero(~self._table.index.contains(keys))
            self._table.arrange(self._table.find_prefix(keys))  # so that none of it goes to make room
            slots = self._take(len(absent))
            absent = absent[: len(slots)]
            if len(slots):
                source = blocks[torch.from_numpy(absent).to(blocks.device)]
                self._blocks[self._on_device(slots)] = source.to(self._blocks.device)
                self._wait()
                self._table.publish(slots, keys_to_array(keys)[absent][:, None, :])
                self._table.arrange(self._table.find_prefix(keys))
            self._stats.written_nbytes += len(slots) * self._block_nbytes
            self._stats.write_s += time.monotonic() - start

    def drop(self, keys: Sequence[BlockKey]) -> None:
        """Forget these blocks."""
        with self._lock:
            found = [self._table.find_prefix([key]) for key in keys]
            self._table.release(
                self._table.drop(np.unique(np.concatenate([*found, np.empty(0, dtype=np.int64)])), "purged")
            )

    def reset(self) -> None:
        """Forget everything, and whatever is on its way."""
        with self._lock:
            self.epoch += 1
            self._table.release(self._table.drop(self._table.ready_slots(), "reset"))

    def stats(self) -> TierStats:
        with self._lock:
            stats = self._stats
            stats.capacity_blocks, stats.used_blocks = len(self._blocks), self._table.num_ready
            stats.capacity_nbytes = len(self._blocks) * self._block_nbytes
            stats.used_nbytes = self._table.num_ready * self._block_nbytes
            stats.evicted_blocks = self._table.evicted_slots
            return stats

    def close(self) -> None:
        """Give the memory back."""
        self._blocks = torch.empty(0)

    def _take(self, n: int) -> Slots:
        short = n - self._table.allocator.num_free
        if short > 0:
            self._table.release(self._table.evict(min(short, len(self._blocks))))
        return self._table.allocate(n)

    def _on_device(self, slots: Slots) -> torch.Tensor:
        return torch.from_numpy(slots).to(self._blocks.device)

    def _wait(self) -> None:
        if self._blocks.is_cuda:
            torch.cuda.current_stream(self._blocks.device).synchronize()
