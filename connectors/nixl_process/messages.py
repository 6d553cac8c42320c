"""What a process and its NIXL transport process say to each other, and how slots are cut to be read.

One msgpack map a packet (SOCK_SEQPACKET keeps them apart), validated against the classes below. Both
ends are of one version: one starts the other. Imports neither torch nor nixl.

    control socket    Open, with file descriptors: the pipe's own socket, its bounce memory and, where
                      rows are offered, theirs
    pipe's socket     to the transport process: Meet, ReadBounce, ReadCells, MoveOn, Rest
                      back: Opened, Met, Landed, Waits, Failed, of which the last is the last

A pipe ends when either end closes its socket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

MAX_MESSAGE_NBYTES: Final = 96 << 10
BOUNCE_NBYTES: Final = 8 << 20  # for each way; tensors move in parts of this size
_CELL_NBYTES: Final = 1 << 20  # a slot lands in cells of this size, or in smaller ones
_TRANSFER_NBYTES: Final = 3 << 19
_ALIGNMENT: Final = 4096

Address = Annotated[int, msgspec.Meta(ge=0, lt=1 << 47)]
NumSlots = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
_SlotNbytes = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Open(Message, frozen=True):
    """Make an agent for one pipe."""

    slot_nbytes: _SlotNbytes
    num_offered: NumSlots


class Opened(Message, frozen=True):
    """What the peer needs: addresses are the transport process's."""

    metadata: bytes
    rows: Address
    bounce: Address


class Meet(Message, frozen=True):
    """The peer's agent, and where its slots and its bounce memory are."""

    metadata: bytes
    rows: tuple[Address, NumSlots]
    bounce: Address


class Met(Message, frozen=True):
    pass


class ReadBounce(Message, frozen=True):
    """Read what the peer has laid there."""

    nbytes: Annotated[int, msgspec.Meta(ge=1, le=BOUNCE_NBYTES)]


class ReadCells(Message, frozen=True):
    """Read cells of the peer: of each transfer, int32, into which cells of the landing, and which of its rows."""

    transfers: list[tuple[bytes, bytes]]


class MoveOn(Message, frozen=True):
    """Let the peer read, until told to rest."""


class Rest(Message, frozen=True):
    pass


class Landed(Message, frozen=True):
    """So many more transfers are done, in the order in which they were told."""

    count: Annotated[int, msgspec.Meta(ge=1)]


class Waits(Message, frozen=True):
    """The peer must move things on, which it need not where one process can copy from the other."""


class Failed(Message, frozen=True):
    error: str


OPEN: Final = msgspec.msgpack.Decoder(Open)
TO_PROCESS: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(Meet | ReadBounce | ReadCells | MoveOn | Rest)
FROM_PROCESS: Final[msgspec.msgpack.Decoder[Any]] = msgspec.msgpack.Decoder(Opened | Met | Landed | Waits | Failed)


@dataclass(frozen=True, slots=True)
class Cells:
    """How slots are cut to land: each into ``per_slot`` cells of ``nbytes``, the last one of ``last_nbytes``."""

    slot_nbytes: int
    nbytes: int
    per_slot: int

    @classmethod
    def of(cls, slot_nbytes: int) -> Cells:
        parts = -(-slot_nbytes // _CELL_NBYTES)
        nbytes = -(-slot_nbytes // parts // _ALIGNMENT) * _ALIGNMENT if parts > 1 else slot_nbytes
        return cls(slot_nbytes, nbytes, -(-slot_nbytes // nbytes))

    @property
    def last_nbytes(self) -> int:
        return self.slot_nbytes - (self.per_slot - 1) * self.nbytes

    @property
    def num_landing(self) -> int:
        return BOUNCE_NBYTES // self.nbytes

    @property
    def per_transfer(self) -> int:
        return max(1, min(self.num_landing, _TRANSFER_NBYTES // self.nbytes))

    def of_rows(self, first: int, count: int) -> NDArray[np.uint64]:
        """Of ``count`` slots from address ``first`` on, slot by slot; shape (count * per_slot, 3), as NIXL takes them:
        address, size and device."""
        starts = first + np.arange(count)[:, None] * self.slot_nbytes + np.arange(self.per_slot) * self.nbytes
        places = np.zeros((count, self.per_slot, 3), dtype=np.uint64)
        places[:, :, 0] = starts
        places[:, :, 1] = self.nbytes
        places[:, -1, 1] = self.last_nbytes
        return places.reshape(-1, 3)

    def of_landing(self, first: int) -> NDArray[np.uint64]:
        """Of the landing at address ``first``, as whole cells, then as last ones; shape (2 * num_landing, 3)."""
        places = np.zeros((2, self.num_landing, 3), dtype=np.uint64)
        places[:, :, 0] = first + np.arange(self.num_landing) * self.nbytes
        places[0, :, 1] = self.nbytes
        places[1, :, 1] = self.last_nbytes
        return places.reshape(-1, 3)

    def numbers(self, slots: NDArray[np.int64]) -> NDArray[np.int32]:
        """Which cells these slots are, slot by slot."""
        return (slots[:, None] * self.per_slot + np.arange(self.per_slot)).reshape(-1).astype(np.int32)

    def landing(self, first: int, end: int, at: int) -> NDArray[np.int32]:
        """Where cells [first, end) of what is received go, from place ``at`` on."""
        is_last = np.arange(first, end, dtype=np.int32) % self.per_slot == self.per_slot - 1
        places = np.arange(at, at + end - first, dtype=np.int32)
        places[is_last] += self.num_landing
        return places
