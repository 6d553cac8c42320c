"""`TieredStore`, the front door: blocks of KV in host memory, on disk and on a shared path.

    put:  tensor -> host slot -> (write-behind, sealed) -> disk, shared
    get:  disk | shared -> host slot, verified -> tensor

Both sides of the design in one object: control plane (`manager`) and data plane (`copier`,
`io_service`). A miss is a value; storage that fails is a miss.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.config import StoreConfig
from kvstore.copier import Copier
from kvstore.errors import ConfigError, StoreClosedError
from kvstore.events import TierEvent
from kvstore.journal_writer import PromptLookup, tenant_digest
from kvstore.keys import BlockKey, keys_to_array
from kvstore.planes import Planes
from kvstore.slot import Slots
from kvstore.tiers.base import TierStats
from kvstore.tiers.device import DeviceTier

logger = logging.getLogger(__name__)

_PIECE_NBYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters since the start, and sizes now, by tier from the top."""

    tiers: dict[str, TierStats]

    def to_dict(self) -> dict[str, Any]:
        return {name: asdict(stats) for name, stats in self.tiers.items()}


class TieredStore:
    """A tiered store of KV blocks. Thread-safe. Use it as a context manager, or `close` it.

    Raises:
        ConfigError: a setting is wrong, a directory holds another identity, or the host
            memory cannot be had. Nothing is left open.
    """

    def __init__(self, config: StoreConfig) -> None:
        self.config = config
        self.identity, self.layout = config.identity, config.identity.layout
        self.blocks_per_chunk = config.blocks_per_chunk
        self._planes = Planes(config)
        self._manager, self._fmt = self._planes.manager, self._planes.fmt
        self._copier = Copier(self.layout, self.blocks_per_chunk, self._planes.arena.rows)
        self._stats = TierStats(name="host")
        self._lock = threading.Lock()
        self._closed = False
        try:
            self._device = DeviceTier(config.device, self.layout) if config.device is not None else None
            self._planes.open_journal(type(self).__name__, self._tier_stats)
        except BaseException:
            self._planes.close()
            raise

    # -- the four verbs

    def put(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, first_block: int = 0) -> int:
        """Store blocks of a prefix; they are copied when it returns.

        Args:
            keys: the whole prefix, from its first block on.
            blocks: shape (n, *layout.block_shape); the KV of ``keys[first_block:first_block + n]``.
            first_block: where in ``keys`` the blocks begin.
        Returns:
            How many leading blocks were taken. Fewer than n where a last chunk is partial,
            or where no room came free within ``put_timeout_s``: the tail is dropped.
        Raises:
            ConfigError: blocks are of another shape or dtype, or keys and blocks disagree.
            StoreClosedError: the store was closed.
        """
        self._check_open()
        self._copier.check(blocks, "blocks")
        self._check_range(keys, blocks, first_block)
        device_epoch = self._device.epoch if self._device is not None else 0
        deadline = time.monotonic() + self.config.put_timeout_s
        per_chunk = self.blocks_per_chunk
        wanted = keys[first_block : first_block + len(blocks)]
        absent_as_of = self._manager.num_published
        is_present = self._manager.contains(wanted)
        present = len(wanted) if is_present.all() else int(is_present.argmin())
        start = max(0, present - (first_block + present) % per_chunk)  # cut chunks where others cut them
        end = start + (len(blocks) - start) // per_chunk * per_chunk
        step = max(1, _PIECE_NBYTES // self._fmt.slot_nbytes) * per_chunk
        taken = start
        while present < len(wanted) and taken < end:
            part = slice(taken, min(taken + step, end))
            done = self._put_chunks(wanted[part], blocks[part], is_present[part], absent_as_of, deadline)
            taken += done
            if taken < part.stop:
                break
        if present < len(wanted) and taken < end:
            self._count(dropped_blocks=end - taken)
        taken = max(taken, present)
        if first_block or is_present.any() or taken > step:  # else it was taken in as one, head first
            self._manager.arrange(keys[: first_block + taken])
        if self._device is not None:
            self._device.put(wanted[:taken], blocks[:taken], device_epoch)
        return taken

    def prefix_hit(self, keys: Sequence[BlockKey]) -> int:
        """Number of leading blocks present, in any tier."""
        self._check_open()
        hit = 0
        while hit < len(keys):
            found = self._device.prefix_hit(keys[hit:]) if self._device is not None else 0
            found = found or self._manager.prefix_hit(keys[hit:])
            if not found and (promotion := self._planes.promotion()) is not None:
                found = promotion.find(keys[hit:]).chunks.total_keys
            if not found:
                break
            hit += found
        return hit

    def get(
        self,
        keys: Sequence[BlockKey],
        out: torch.Tensor,
        *,
        first_block: int = 0,
        sources: dict[str, int] | None = None,
    ) -> int:
        """Load the leading blocks of ``keys[first_block:]`` into out.

        Args:
            keys: as for `put`.
            out: shape (n, *layout.block_shape), contiguous; up to n blocks are loaded.
            sources: how many blocks each tier had is added to these.
        Returns:
            How many leading blocks were loaded; what lies behind them in out is undefined.
        Raises:
            ConfigError, StoreClosedError: as for `put`.
        """
        self._check_open()
        self._copier.check(out, "out")
        if not out.is_contiguous():
            raise ConfigError("out: not contiguous; give a contiguous tensor")
        deadline = time.monotonic() + self.config.load_timeout_s
        wanted = keys[first_block : first_block + len(out)]
        done = 0
        while done < len(wanted) and time.monotonic() < deadline:
            loaded, tier = self._device.get(wanted[done:], out[done:]) if self._device is not None else 0, "device"
            if not loaded:
                loaded, tier = self._get_from_below(wanted[done:], out[done:], deadline)
            if not loaded:
                break
            done += loaded
            if sources is not None:
                sources[tier] = sources.get(tier, 0) + loaded
        self._count(miss_blocks=len(wanted) - done)
        return done

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until everything put so far is durable in the lower tiers.

        Returns:
            False if it took too long, or if a tier has not stored all of it. True where
            there is no lower tier.
        """
        self._check_open()
        io = self._planes.io
        return io.flush(time.monotonic() + timeout_s) if io is not None else True

    # -- control

    def reset(self) -> None:
        """Never again hit anything stored before; call it when the weights have changed.

        The store goes on under a fresh random epoch. What is on its way stays in the old
        one. In a disk directory that no other process has open, the old epoch is dead for
        later openers too; other processes' data, and a shared path's, stays theirs.
        """
        self._check_open()
        self._planes.reset()
        if self._device is not None:
            self._device.reset()

    def purge(self, keys: Sequence[BlockKey]) -> int:
        """Delete every chunk that holds one of these keys, in all tiers, so that no rebuilt
        index brings it back; returns how many were deleted."""
        self._check_open()
        if self._device is not None:
            self._device.drop(keys)
        return self._planes.purge(keys)

    def stats(self) -> StoreStats:
        """Counters and sizes of every tier."""
        ready, pinned, evicted = self._manager.usage()
        per_chunk, nbytes = self.blocks_per_chunk, self._fmt.slot_nbytes
        with self._lock:
            host = self._stats
            host.capacity_blocks, host.capacity_nbytes = self._manager.num_slots * per_chunk, self._planes.host_nbytes
            host.used_blocks, host.used_nbytes = ready * per_chunk, ready * nbytes
            host.pinned_blocks, host.evicted_blocks = pinned * per_chunk, evicted * per_chunk
        upper = [] if self._device is None else [self._device.stats()]
        lower = [] if self._planes.io is None else self._planes.io.stats()
        return StoreStats({stats.name: replace(stats) for stats in (*upper, host, *lower)})

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
        is_late: bool = False,
    ) -> None:
        """Note in the journal that a request asked for a prompt; nothing where no journal is written.

        What a request is only its server knows, so `get` does not note it.

        Args:
            keys: of all full blocks of the prompt.
            hits: leading blocks by the tier that had them: what `get` has added to ``sources``.
            tenant: its salt; the journal has a digest of it.
            is_late: its deadline had passed before everything had come.
        """
        if self._planes.journal is not None:
            self._planes.journal.asked(
                PromptLookup(
                    keys=keys, hits=hits, request_id=request_id, tenant=tenant_digest(tenant),
                    adapter=adapter_digest.hex()[:64], num_tokens=num_tokens, waited_s=waited_s,
                    is_late=is_late,
                )
            )  # fmt: skip

    def ended(self, keys: Sequence[BlockKey], *, request_id: str = "", tenant: str = "") -> None:
        """Note in the journal that a request is over, and that these of its blocks, from the first on, were stored."""
        if self._planes.journal is not None:
            self._planes.journal.ended(keys, request_id, tenant_digest(tenant))

    def take_events(self) -> list[TierEvent]:
        """What has come into host memory and the lower tiers, and gone, since the last call.

        Empty unless ``event_log_blocks`` is set. Of a shared path it tells what this store wrote.
        """
        self._check_open()
        return self._planes.take_events()

    def close(self) -> None:
        """Finish write-behind, then release everything. Later calls raise StoreClosedError."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._device is not None:
            self._device.close()
        self._planes.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- inside

    def _tier_stats(self) -> Iterable[TierStats]:
        return self.stats().tiers.values()

    def _put_chunks(
        self,
        keys: Sequence[BlockKey],
        blocks: torch.Tensor,
        is_present: NDArray[np.bool_],
        absent_as_of: int,
        deadline: float,
    ) -> int:
        """Store whole chunks; returns how many blocks were taken."""
        per_chunk, done, total = self.blocks_per_chunk, 0, len(keys) // self.blocks_per_chunk
        all_keys = keys_to_array(keys).reshape(total, per_chunk, -1)
        known_absent = None if is_present.any() else absent_as_of
        todo = np.flatnonzero(~is_present.reshape(total, per_chunk).all(axis=1))
        while done < len(todo):
            current = self._planes.current()
            slots = self._manager.reserve(len(todo) - done, deadline)
            if not len(slots):
                return int(todo[done]) * per_chunk
            part = todo[done : done + len(slots)]
            self._fill(part, slots, blocks)
            self._planes.publish(slots, all_keys[part], current, absent_as_of=known_absent)
            done += len(slots)
        return total * per_chunk

    def _fill(self, chunks: np.ndarray, slots: Slots, blocks: torch.Tensor) -> None:
        start = time.monotonic()
        per_chunk = self.blocks_per_chunk
        is_run = int(chunks[-1] - chunks[0]) == len(chunks) - 1
        breaks = [0, *([] if is_run else (np.flatnonzero(np.diff(chunks) != 1) + 1).tolist()), len(chunks)]
        try:
            for low, high in zip(breaks[:-1], breaks[1:], strict=True):
                first = int(chunks[low]) * per_chunk
                self._copier.store(blocks[first : first + (high - low) * per_chunk], slots[low:high])
        except BaseException:
            self._manager.give_back(slots)
            raise
        nbytes = len(slots) * self._fmt.payload_nbytes
        self._count(written_nbytes=nbytes, write_s=time.monotonic() - start)

    def _get_from_below(self, keys: Sequence[BlockKey], out: torch.Tensor, deadline: float) -> tuple[int, str]:
        """Load leading blocks from host memory, else from the lower tiers; the device keeps them. Which tier had
        them comes second."""
        device_epoch = self._device.epoch if self._device is not None else 0
        loaded, tier = self._get_from_host(keys, out), "host"
        if not loaded and (promotion := self._planes.promotion(self._copier)) is not None:
            found = promotion.find(keys)
            loaded, tier = promotion.load(found, keys, out, deadline), found.tier
        if loaded and self._device is not None:
            self._device.put(keys[:loaded], out[:loaded], device_epoch)
        return loaded, tier

    def _get_from_host(self, keys: Sequence[BlockKey], out: torch.Tensor) -> int:
        lease = self._manager.prepare_load(keys)
        try:
            if len(lease):
                start = time.monotonic()
                self._copier.load(lease.slots, lease.positions, out[: len(lease)])
                nbytes = len(lease) * self.layout.block_nbytes
                self._count(hit_blocks=len(lease), read_nbytes=nbytes, read_s=time.monotonic() - start)
        finally:
            self._manager.release(lease)
        return len(lease)

    def _count(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                setattr(self._stats, name, getattr(self._stats, name) + amount)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreClosedError("the store was closed")

    def _check_range(self, keys: Sequence[BlockKey], blocks: torch.Tensor, first_block: int) -> None:
        if not 0 <= first_block <= len(keys) or first_block + len(blocks) > len(keys):
            raise ConfigError(
                f"first_block={first_block} with {len(blocks)} blocks does not lie within the {len(keys)} keys"
            )
