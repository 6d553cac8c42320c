"""The lower tiers for an engine that keeps host memory of its own: rows of it come and go by way of a staging arena.

    store:  the engine's row -> staging slot -> (write-behind, sealed) -> disk, shared
    load:   disk | shared -> staging slot, verified -> the engine's row

What has just passed through staging is served from there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.events import TierEvent
from kvstore.keys import BlockKey, keys_to_array
from kvstore.planes import Planes
from kvstore.promotion import Promotion
from kvstore.slot import Slots
from kvstore.tiers.base import TierStats

_MOST_MISSES: Final = 16  # one after the other, from the end of a prompt: then what is left is not looked for


class StagedTiers:
    """Thread-safe; every call waits for I/O, up to its deadline.

    Args:
        config: one block a chunk; host memory is the staging arena.
        rows: the engine's host memory, shape (num_rows, row_nbytes), of which each block takes
            the first ``layout.block_nbytes``. Valid until `close`.
    Raises:
        ConfigError: as `kvstore.TieredStore`; or there is no lower tier.
    """

    def __init__(self, config: StoreConfig, rows: NDArray[np.uint8]) -> None:
        nbytes = config.identity.layout.block_nbytes
        if config.blocks_per_chunk != 1:
            raise ConfigError(f"blocks_per_chunk: {config.blocks_per_chunk}; give 1: a row is one block")
        if rows.ndim != 2 or rows.shape[1] < nbytes:
            raise ConfigError(f"rows: shape {rows.shape}; give (n, at least {nbytes})")
        self.config = config
        self._planes = Planes(config, shared_arena=True)
        if self._planes.io is None:
            self._planes.close()
            raise ConfigError("disk: not set, nor is shared; give one of them")
        self._manager = self._planes.manager
        self._rows, self._staged = rows[:, :nbytes], self._planes.arena.rows[:, :nbytes]
        self._staging, self._lock = TierStats(name="staging"), threading.Lock()

    def contains(self, keys: Sequence[BlockKey], deadline: float) -> NDArray[np.bool_]:
        """Which can be loaded; shape (n,). False where that is not known by the deadline.

        Of each KV cache group it looks along the prefix up to its first gap, and from its end
        back, for the last blocks are all that a sliding window keeps.
        """
        found = self._manager.contains(keys)
        if (promotion := self._planes.promotion()) is not None:
            groups = np.array([key.group for key in keys])
            for group in np.unique(groups):
                self._find(promotion, keys, np.flatnonzero(groups == group), found, deadline)
        return found

    def store(self, keys: Sequence[BlockKey], rows: Sequence[int], deadline: float) -> NDArray[np.bool_]:
        """Copy rows to be written behind; they may be overwritten when it returns.

        Returns:
            Shape (n,): which were taken, or were there already; for the others no room came free.
        """
        taken = self._manager.contains(keys)
        absent, from_ = np.flatnonzero(~taken), np.array(rows, dtype=np.int64)
        array, done = keys_to_array(keys)[:, None, :], 0
        while done < len(absent):
            current = self._planes.current()
            slots = self._manager.reserve(len(absent) - done, deadline)
            if not len(slots):
                break
            part = absent[done : done + len(slots)]
            try:
                _copy(self._staged, slots, self._rows, from_[part])
            except BaseException:
                self._manager.give_back(slots)
                raise
            self._planes.publish(slots, array[part], current)
            taken[part] = True
            done += len(slots)
        self._count(written_nbytes=done * self._staged.shape[1], dropped_blocks=len(absent) - done)
        return taken

    def load(self, keys: Sequence[BlockKey], rows: Sequence[int], deadline: float) -> NDArray[np.bool_]:
        """Fill rows; shape (n,): which of them hold their block now. What the others hold is undefined."""
        came = np.zeros(len(keys), dtype=np.bool_)
        to, at = torch.tensor(rows, dtype=torch.int64), 0
        while at < len(keys) and time.monotonic() < deadline:
            n = self._load_staged(keys[at:], to[at:])
            if not n and (promotion := self._planes.promotion(_Rows(self._rows, self._staged))) is not None:
                n = promotion.run(keys[at:], to[at:], deadline)
            came[at : at + n] = True
            at += n or 1
        self._count(miss_blocks=len(keys) - int(came.sum()))
        return came

    def reset(self) -> None:
        """Never again find anything that was stored before; see `kvstore.TieredStore.reset`."""
        self._planes.reset()

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was stored is durable."""
        assert self._planes.io is not None
        return self._planes.io.flush(time.monotonic() + timeout_s)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Counters and sizes by tier, staging first."""
        assert self._planes.io is not None
        ready, pinned, evicted = self._manager.usage()
        nbytes = self._planes.fmt.slot_nbytes
        with self._lock:
            staging = self._staging
            staging.capacity_blocks, staging.capacity_nbytes = self._manager.num_slots, self._planes.host_nbytes
            staging.used_blocks, staging.used_nbytes = ready, ready * nbytes
            staging.pinned_blocks, staging.evicted_blocks = pinned, evicted
            mine = asdict(staging)
        return {"staging": mine, **{stats.name: asdict(stats) for stats in self._planes.io.stats()}}

    def take_events(self) -> list[TierEvent]:
        """Of the lower tiers: staging is a way there."""
        return [event for event in self._planes.take_events() if event.tier != "host"]

    def close(self) -> None:
        """Finish write-behind, and release everything; the engine's rows too."""
        self._planes.close()
        self._rows = self._staged = np.empty((0, 0), dtype=np.uint8)

    # -- inside

    def _find(
        self,
        promotion: Promotion,
        keys: Sequence[BlockKey],
        at: NDArray[np.int64],
        found: NDArray[np.bool_],
        deadline: float,
    ) -> None:
        first = 0
        while first < len(at) and time.monotonic() < deadline:
            n = 1 if found[at[first]] else promotion.find([keys[i] for i in at[first:]]).chunks.total_keys
            if not n:
                break
            found[at[first : first + n]] = True
            first += n
        misses, last = 0, len(at) - 1
        while last > first and misses < _MOST_MISSES and time.monotonic() < deadline:
            i = at[last]
            found[i] |= len(promotion.find([keys[i]])) > 0
            misses, last = 0 if found[i] else misses + 1, last - 1

    def _load_staged(self, keys: Sequence[BlockKey], to: torch.Tensor) -> int:
        lease = self._manager.prepare_load(keys)
        try:
            _copy(self._rows, to[: len(lease)].numpy(), self._staged, lease.slots)
        finally:
            self._manager.release(lease)
        self._count(hit_blocks=len(lease), read_nbytes=len(lease) * self._staged.shape[1])
        return len(lease)

    def _count(self, **amounts: int) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._staging, name, getattr(self._staging, name) + amount)


class _Rows:
    """A `kvstore.promotion.Sink`: ``out`` says which of the engine's rows."""

    def __init__(self, rows: NDArray[np.uint8], staged: NDArray[np.uint8]) -> None:
        self._rows, self._staged = rows, staged

    def load(self, slots: Slots, positions: NDArray[np.int64], out: torch.Tensor, places: NDArray[np.int64]) -> None:
        _copy(self._rows, out.numpy()[places], self._staged, slots)


def _copy(to: NDArray[np.uint8], at: NDArray[np.int64], from_: NDArray[np.uint8], of: NDArray[np.int64]) -> None:
    """Row by row: numpy gives up the interpreter lock for each, so that the engine's threads run on."""
    for target, source in zip(at.tolist(), of.tolist(), strict=True):
        np.copyto(to[target], from_[source])
