"""What an engine's scheduler and its workers tell each other: plain data, small, once a step.

A connector has two halves and knows no engine. The scheduler half decides: which slots,
which blocks. The worker half copies between the engine's cache and the slots of one host
arena that both map. An engine may keep layers in several KV cache groups; each has its own
blocks, and its own slots.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvstore.arena import HostArena
from kvstore.errors import KVStoreError
from kvstore.events import TierEvent
from kvstore.keys import BlockKey

Keys = Sequence[Sequence[BlockKey]]
"""By KV cache group, all of one length and for the same tokens."""
Blocks = Sequence[Sequence[int | None]]
"""By KV cache group: numbers of blocks of the engine's cache; None where it has, or needs, none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asker:
    """Who asks, for people who look into what is stored.

    Attributes:
        tenant: the request's salt.
        adapter: digest of the content of its LoRA adapter.
        num_tokens: of its prompt.
    """

    request_id: str
    tenant: str = ""
    adapter: bytes = b""
    num_tokens: int = 0


class SchedulerHalf(ABC):
    """What runs beside an engine's scheduler, and decides. Called by one thread; waits for no I/O.

    One step of the engine: `lookup` for requests that begin, `load` for those that take what
    was found, `store` for what the step computes, `end_step`; then the workers run the step,
    and `reported` says what they have done.
    """

    def asked(self, asker: Asker, keys: Keys) -> None:  # noqa: B027 - a half that keeps no journal
        """A new request has come, with these full blocks in its prompt; told once, before anything else of it."""

    def begin(self, request_id: str, keys: Keys) -> None:  # noqa: B027 - a half may have nothing to prepare
        """A new request has come, which will ask for these."""

    def not_needed(self, request_id: str) -> None:  # noqa: B027 - a half that keeps no journal
        """Instead of `lookup`: the engine itself has all of the prompt that could be loaded."""

    @abstractmethod
    def lookup(self, request_id: str, keys: Keys, *, expected: int = 0) -> int | None:
        """Leading blocks that can be loaded in this step, for certain; None: ask again.

        May be asked any number of times, and its answer be ignored. What it promises holds
        until `end_step`, or until the request's `forget`.

        Args:
            expected: leading blocks that another engine is about to have written.
        """

    def expect(self, request_id: str, keys: Keys, params: Mapping[str, Any] | None) -> int:
        """A new request brings what another engine has handed over with it.

        Args:
            keys: that the request may load, from its first block on.
            params: not trusted; whatever routes requests has passed it on.
        Returns:
            Leading blocks that are there, or on their way: ``expected`` of `lookup`.
        """
        return 0

    def hand_over(self, keys: Keys, params: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """What another engine is to be told of a prompt that this one has stored; JSON.

        Args:
            params: that came with the request; not trusted.
        """
        return None

    @abstractmethod
    def load(self, request_id: str, blocks: Blocks) -> None:
        """Have the leading blocks of what was promised loaded into these.

        Raises:
            ValueError: that was not promised.
        """

    @abstractmethod
    def store(self, keys: Keys, blocks: Blocks) -> None:
        """Have these stored, prefix first, once this step is computed; what cannot be is dropped."""

    @abstractmethod
    def end_step(self, *, wait_s: float = 0.0) -> Any:
        """What the workers are to do in this step; plain data that can be sent to them.

        Args:
            wait_s: an engine with nothing else to do waits so long for what it was told to ask for again.
        """

    def ended(self, request_id: str, keys: Keys) -> None:  # noqa: B027 - a half without a policy
        """A request that used, or stored, these is over: note it, so that a prefix's tail leaves before its head.
        Told before `forget`."""

    def failed(self, numbers: Sequence[int]) -> None:  # noqa: B027 - a half whose workers cannot fail
        """These jobs have failed at a worker, which is told before the last report of each: of a store, that
        nothing of it may ever be found."""

    @abstractmethod
    def reported(self, reports: Mapping[int, int]) -> None:
        """How many workers have done each job, since the last call; one that failed counts as done."""

    @abstractmethod
    def has_open_jobs(self) -> bool:
        """Whether the engine must go on for reports to come in."""

    @abstractmethod
    def forget(self, request_id: str) -> None:
        """The request is over: finished, aborted, or refused. Nothing is held for it any more."""

    @abstractmethod
    def reset(self) -> None:
        """Never again find anything that was stored before."""

    @abstractmethod
    def stats(self) -> dict[str, dict[str, Any]]:
        """Fields of `kvstore.tiers.base.TierStats`, by tier."""

    def take_events(self) -> list[TierEvent]:
        """What came into tiers and left them since the last call; may be called by another thread."""
        return []

    def sources(self, request_id: str, num_blocks: int) -> dict[str, int]:
        """Which tiers the blocks that a request loads have come from: name -> blocks."""
        return {"host": num_blocks}

    @abstractmethod
    def close(self) -> None:
        """Release everything."""


class WorkerHalf(ABC):
    """What runs beside an engine's worker, and copies. Called by one thread."""

    @abstractmethod
    def load(self, step: Any) -> None:
        """Before the engine computes; on a device: ordered before it."""

    @abstractmethod
    def store(self, step: Any) -> None:
        """After the engine has computed, before its blocks can be reused."""

    def take_failed_blocks(self) -> list[tuple[int, int]]:
        """(group, block) of loads that raised since the last call: the engine must not compute on those."""
        return []

    def take_failed_jobs(self) -> list[int]:
        """Jobs that failed since the last call: loads that raised, and stores of what an engine may have
        computed from what was not loaded."""
        return []

    @abstractmethod
    def take_reports(self) -> dict[int, int]:
        """Jobs that are done since the last call, each with 1; waits for none."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is under way, and release everything."""


@dataclass(frozen=True, slots=True)
class ArenaHandle:
    """Where another process of this host finds a memfd arena.

    Attributes:
        inode: of the memfd: another process of the same number may have opened something else.
    """

    pid: int
    fd: int
    inode: int
    num_slots: int
    slot_nbytes: int

    @classmethod
    def of(cls, arena: HostArena) -> ArenaHandle:
        if arena.fd is None:
            raise ValueError("private memory cannot be mapped by another process")
        return cls(os.getpid(), arena.fd, os.fstat(arena.fd).st_ino, *arena.rows.shape)

    def attach(self) -> HostArena:
        """Map it.

        Raises:
            KVStoreError: the process is gone, or is not ours to look into.
        """
        path = f"/proc/{self.pid}/fd/{self.fd}"
        try:
            if not os.readlink(path).startswith("/memfd:"):
                raise OSError(f"{path} is no arena")
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.fstat(fd).st_ino != self.inode:
                os.close(fd)
                raise OSError(f"{path} is another one")
        except OSError as e:
            raise KVStoreError(
                f"the host arena of process {self.pid} cannot be mapped ({e}); scheduler and workers "
                "must run as one user in one process-id namespace"
            ) from e
        return HostArena.attach(fd, self.num_slots, self.slot_nbytes, pin=True)


@dataclass(frozen=True, slots=True)
class Stripe:
    """A worker's part of every slot: ``index`` of ``count``.

    KV that several ranks hold alike is one stripe, which one of them stores and all load.
    """

    index: int
    count: int
    is_stored_here: bool = True

    @classmethod
    def of_rank(cls, rank: int, num_ranks: int, num_replicas: int) -> Stripe:
        """Each ``num_replicas`` consecutive ranks hold the same KV."""
        return cls(rank // num_replicas, num_ranks // num_replicas, rank % num_replicas == 0)


@dataclass(frozen=True, slots=True)
class CopyJob:
    """Block ``blocks[i]`` of a group of the engine's cache, and position ``positions[i]`` of host slot ``slots[i]``.

    What is asked for as one has one number.
    """

    number: int
    slots: list[int]
    positions: list[int]
    blocks: list[int]
    group: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """What every worker does in one step of the engine: loads before it computes, stores after.

    Attributes:
        known_failures: loads whose failure the scheduler half has learned of since the last step; what
            they were for is computed again from here on.
    """

    arena: ArenaHandle
    loads: list[CopyJob] = field(default_factory=list)
    stores: list[CopyJob] = field(default_factory=list)
    known_failures: list[int] = field(default_factory=list)
