"""What an engine's scheduler and its workers tell each other: plain data, small, once a step.

A connector has two halves and knows no engine. The scheduler half decides: which slots,
which blocks. The worker half copies between the engine's cache and the slots of one host
arena that both map.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from kvstore.arena import HostArena
from kvstore.errors import KVStoreError


@dataclass(frozen=True, slots=True)
class ArenaHandle:
    """Where another process of this host finds a memfd arena."""

    pid: int
    fd: int
    num_slots: int
    slot_nbytes: int

    @classmethod
    def of(cls, arena: HostArena) -> ArenaHandle:
        if arena.fd is None:
            raise ValueError("private memory cannot be mapped by another process")
        return cls(os.getpid(), arena.fd, *arena.rows.shape)

    def attach(self) -> HostArena:
        """Map it.

        Raises:
            KVStoreError: the process is gone, or is not ours to look into.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as e:
            raise KVStoreError(
                f"the host arena of process {self.pid} cannot be mapped ({e}); scheduler and workers "
                "must run as one user in one process-id namespace"
            ) from e
        return HostArena.attach(fd, self.num_slots, self.slot_nbytes, pin=True)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Block ``blocks[i]`` of the engine's cache, and position ``positions[i]`` of host slot ``slots[i]``."""

    number: int
    slots: list[int]
    positions: list[int]
    blocks: list[int]


@dataclass(frozen=True, slots=True)
class Step:
    """What every worker does in one step of the engine: loads before it computes, stores after."""

    arena: ArenaHandle
    loads: list[CopyJob] = field(default_factory=list)
    stores: list[CopyJob] = field(default_factory=list)
