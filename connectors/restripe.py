"""Slots of a producer whose tensor parallelism is a multiple of ours, or ours of its: verified, then cut anew.

    peer's slot   rank 0 [layer, heads 0..3] rank 1 [layer, heads 4..7]
    our slot      rank 0 [layer, heads 0..1] rank 1 [heads 2..3] rank 2 [heads 4..5] rank 3 [heads 6..7]

A rank's page of a layer is its heads (H), tokens (N) and content (C: what attention keeps of a token and head), in
the order that the engine's name for its layout says. Knows bytes and identities, never who is asked for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Self

from kvstore.arena import HostArena
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey
from kvstore.planes import Planes
from kvstore.slot import Rows, SlotFormat, Slots

_ORDERS: Final = ("LBHNC", "LBNHC")
_LANDING_NBYTES: Final = 16 << 20


class Restripe:
    """How payloads of one block go from ``from_ranks`` stripes to ``to_ranks``; one copy.

    Raises:
        ValueError: one number of ranks is no multiple of the other, or heads cannot be split so, or how heads lie
            in a page is not known.
    """

    def __init__(self, identity: KVIdentity, from_ranks: int, to_ranks: int) -> None:
        layout, ratio = identity.layout, max(from_ranks, to_ranks) // min(from_ranks, to_ranks)
        most, fewest = max(from_ranks, to_ranks), min(from_ranks, to_ranks)
        if most != fewest * ratio:
            raise ValueError(f"tp_size: {to_ranks} here, {from_ranks} there; neither is a multiple of the other")
        if layout.num_kv_heads % most:
            raise ValueError(f"tp_size: {most} does not divide {layout.num_kv_heads} KV heads")
        order = next((word for word in identity.placement.byte_layout.split() if word in _ORDERS), None)
        if order is None:
            raise ValueError(f"how heads lie in pages of {identity.placement.byte_layout!r} is not known")
        heads = layout.num_kv_heads // most
        around = layout.num_layers * (1 if order == "LBHNC" else layout.block_size)
        rest = layout.block_nbytes // (around * layout.num_kv_heads)
        joined, split = (fewest, around, ratio, heads * rest), (fewest, ratio, around, heads * rest)
        self._payload_nbytes = layout.block_nbytes
        self._from, self._to = (joined, split) if from_ranks < to_ranks else (split, joined)

    def __call__(self, source: Rows, source_slots: Slots, target: Rows, target_slots: Slots) -> None:
        """Fill the payloads of ``target[target_slots]`` from those of ``source[source_slots]``."""
        n = self._payload_nbytes
        for source_slot, target_slot in zip(source_slots.tolist(), target_slots.tolist(), strict=True):
            cut = source[source_slot, :n].reshape(self._from).swapaxes(1, 2)
            target[target_slot, :n].reshape(self._to)[:] = cut


class Landing:
    """Memory that slots of such a producer come to.

    Args:
        planes: ours, whose slots they are brought into.
        peer: the producer's identity: ours, with another tp_size.

    Attributes:
        peer: as above.
        codec: of its slots.
    """

    def __init__(self, planes: Planes, peer: KVIdentity, restripe: Restripe) -> None:
        self.peer, self._planes, self._restripe = peer, planes, restripe
        self.codec = planes.codec.for_format(SlotFormat.of(peer, 1))
        self._arena: HostArena | None = None

    @classmethod
    def of(cls, planes: Planes, peer_tp_size: int) -> Self:
        """Raises ValueError, which says why there can be none."""
        mine = planes.identity
        restripe = Restripe(mine, peer_tp_size, mine.placement.tp_size)
        return cls(planes, replace(mine, placement=replace(mine.placement, tp_size=peer_tp_size)), restripe)

    @property
    def rows(self) -> Rows:
        """Allocated when it is first asked for."""
        if self._arena is None:
            nbytes = self.codec.fmt.slot_nbytes
            self._arena = HostArena(max(1, _LANDING_NBYTES // nbytes), nbytes)
        return self._arena.rows

    def bring(self, landed: Slots, keys: Sequence[BlockKey], host_slots: Slots, namespace: bytes) -> None:
        """Bring rows, which were verified, into host slots.

        Args:
            landed: which of the first rows; there is a key and a host slot for each row.
        """
        self._restripe(self.rows, landed, self._planes.arena.rows, host_slots[landed])
        self._planes.seal(host_slots[landed], [keys[i] for i in landed.tolist()], namespace)

    def close(self) -> None:
        if self._arena is not None:
            self._arena.close()
            self._arena = None
