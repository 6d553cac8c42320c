"""What a journal says, put together: requests, the tree of their prefixes, what came and went.

Prompts are kept as a tree: a node is a block, its parent the block before it. All of it lies in
memory, up to bounds that are told in `problems` when they are met.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from kvstore.journal import (
    Asked,
    Closed,
    Ended,
    JournalReader,
    Lost,
    Moved,
    Opened,
    Reset,
    Sample,
)
from kvstore.journal_entries import NO_NODE, End, Move, Moves, Request, TierSample
from kvstore.keys import BLOCK_HASH_NBYTES
from kvstore.process import is_running

MAX_NODES: Final = 1 << 22
MAX_REQUESTS: Final = 1 << 20
MAX_MOVES: Final = 1 << 25
MAX_SAMPLES: Final = 1 << 18
_SILENT_S: Final = 60.0  # of a process whose samples come more often
Life = Literal["on", "silent", "ended"]


@dataclass(slots=True)
class _Writer:
    """One segment's process, as it is when a record was written."""

    opened: Opened
    namespace: bytes


@dataclass(slots=True)
class JournalView:
    """Attributes:
    hashes, parents, depths: by node: block hash, node before it (`NO_NODE`: it is the first, or what was before it is
        not known any more), blocks up to and with it.
    samples: by time.
    seen_ns: process -> its last record; closed: processes that have closed their store since they opened it.
    num_lost: requests that writers could not keep up with.
    now_ns: processes are told of as they are now; None: as they were when the journal was written last.
    """

    path: Path
    now_ns: int | None = None
    opened: list[Opened] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    samples: list[TierSample] = field(default_factory=list)
    resets: list[tuple[int, bytes]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    first_ns: int = 0
    last_ns: int = 0
    num_lost: int = 0
    num_moves: int = 0
    seen_ns: dict[int, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    _nodes: dict[bytes, int] = field(default_factory=dict)
    _moves: dict[tuple[str, int], Moves] = field(default_factory=dict)
    _life: dict[int, Life] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path, since_ns: int = 0, *, at_its_end: bool = False) -> JournalView:
        """Read all of a journal.

        Args:
            since_ns: what was written before may be left out.
            at_its_end: take its last record for now: of an old copy.
        Raises:
            ConfigError: there is none.
        """
        view, reader = cls(path, None if at_its_end else time.time_ns()), JournalReader(path, since_ns)
        writers: dict[str, _Writer] = {}
        for segment, record in reader.records():
            view.first_ns = view.first_ns or record.t_ns
            view.last_ns = max(view.last_ns, record.t_ns)
            view._add(writers, segment, record)
        view.problems += reader.problems
        if view.num_lost:
            view.problems.append(f"{view.num_lost} requests were lost: their writer could not keep up")
        for name, n, most in (
            ("blocks of prompts", len(view.hashes), MAX_NODES), ("requests", len(view.requests), MAX_REQUESTS),
            ("moves of blocks", view.num_moves, MAX_MOVES), ("samples", len(view.samples), MAX_SAMPLES),
        ):  # fmt: skip
            if n >= most:
                view.problems.append(f"more than {most} {name}; what is beyond is not looked at")
        return view

    # -- prompts

    def node_of(self, block_hash: bytes) -> int:
        """`NO_NODE` where no request in the journal had it."""
        return self._nodes.get(block_hash, NO_NODE)

    def nodes_to(self, node: int) -> list[int]:
        """Blocks of a prompt up to and with a node, from the first that is known."""
        found = []
        while node != NO_NODE:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def path_to(self, node: int) -> list[bytes]:
        """Their hashes."""
        return [self.hashes[at] for at in self.nodes_to(node)]

    def requests_of(self, request_id: str) -> list[Request]:
        """Those whose id is this or, where there is none, begins so; vLLM adds to the id that a client gave."""
        exact = [request for request in self.requests if request.request_id == request_id]
        return exact or [request for request in self.requests if request.request_id.startswith(request_id)]

    def hashes_of(self, request: Request) -> list[bytes]:
        """Of its prompt's blocks and, once it is over, of those that it generated."""
        for end in reversed(self.ends):
            if (end.request_id, end.tenant, end.namespace) == (request.request_id, request.tenant, request.namespace):
                nodes = self.nodes_to(end.last)
                if request.last in nodes:  # and not another request of that id
                    return [self.hashes[node] for node in nodes]
        return self.path_to(request.last)

    def hashes_of_tenant(self, tenant: str) -> dict[bytes, set[bytes]]:
        """Of all blocks that a tenant's requests asked for, or stored, by namespace; ``tenant`` as in `Request`."""
        found: dict[bytes, set[bytes]] = {}
        for one in self._told():
            if one.tenant == tenant:
                hashes, node = found.setdefault(one.namespace, set()), one.last
                while node != NO_NODE and self.hashes[node] not in hashes:
                    hashes.add(self.hashes[node])
                    node = self.parents[node]
        return found

    def tenants_by_hash(self) -> dict[bytes, dict[bytes, str]]:
        """Namespace -> block hash -> who asked for it, or stored it, first: salts make hashes differ."""
        found: dict[bytes, dict[bytes, str]] = {}
        for one in self._told():
            tenants, node = found.setdefault(one.namespace, {}), one.last
            while node != NO_NODE and self.hashes[node] not in tenants:
                tenants[self.hashes[node]] = one.tenant
                node = self.parents[node]
        return found

    def hits_by_node(self) -> list[int]:
        """How often each block was a hit."""
        return self._up([(request.last, request.num_hits) for request in self.requests])

    def asked_by_node(self) -> list[int]:
        """How often each block was asked for."""
        return self._up([(request.last, request.num_blocks) for request in self.requests])

    def prompts(self) -> Iterator[list[int]]:
        """Each request's blocks as nodes, prefix first, by time."""
        return (self.nodes_to(request.last) for request in self.requests)

    # -- tiers

    def move_of(self, tier: str, key: bytes) -> Move | None:
        """The last that is known of a block key in a tier. Host memory is each process's own: where one that runs
        has it, that counts. A directory is told of by all its processes: who removed it knows best why."""
        found = [move for (name, _), moves in self._moves.items() if name == tier and (move := moves.last(key))]
        if not found:
            return None
        if tier == "host":
            here = [move for move in found if not move.why and self.life_of(move.pid) == "on"]
            return max(here or found, key=lambda move: move.t_ns)
        last = max(found, key=lambda move: move.t_ns)
        if last.why == "by_other":
            removed = [move for move in found if move.why not in ("", "by_other")]
            return max(removed, key=lambda move: move.t_ns, default=last)
        return last

    def had(self, tier: str, key: bytes, at_ns: int, pid: int) -> bool:
        """Whether a tier had a block at a time, as far as moves tell; of host memory, that of one process."""
        found = [
            move
            for (name, whose), moves in self._moves.items()
            if name == tier and (tier != "host" or whose == pid) and (move := moves.last(key, at_ns))
        ]
        return bool(found) and not max(found, key=lambda move: move.t_ns).why

    def life_of(self, pid: int) -> Life:
        """Of a process: "ended" where it said so, or is no more on this host; "silent" where it has not written for
        longer than it should, so that what it has in memory is not known."""
        if pid not in self._life:
            self._life[pid] = self._look_at(pid)
        return self._life[pid]

    def silent_s(self, pid: int) -> float:
        """How long ago a process has written last."""
        now_ns = self.last_ns if self.now_ns is None else self.now_ns
        return max(0.0, (now_ns - self.seen_ns.get(pid, 0)) / 1e9)

    def tiers(self) -> list[str]:
        """That anything is known of, from the top."""
        known = {*(tier for tier, _ in self._moves), *(sample.tier for sample in self.samples)}
        order = ("device", "host", "disk", "shared")
        return [*(tier for tier in order if tier in known), *sorted(known.difference(order))]

    # -- inside

    def _look_at(self, pid: int) -> Life:
        opened = next((one for one in reversed(self.opened) if one.pid == pid), None)
        if pid in self.closed or opened is None:
            return "ended"
        if self.now_ns is not None and is_running(pid, opened.started, opened.place) is False:
            return "ended"
        return "silent" if self.silent_s(pid) > max(_SILENT_S, 3 * opened.sample_s) else "on"

    def _told(self) -> Iterator[Request | End]:
        yield from self.requests
        yield from self.ends

    def _up(self, ends: Sequence[tuple[int, int]]) -> list[int]:
        """By node: of how many (last node, leading blocks) it is among the leading blocks."""
        counts = [0] * len(self.hashes)
        for node, n in ends:
            while node != NO_NODE and self.depths[node] > n:
                node = self.parents[node]
            if n and node != NO_NODE:
                counts[node] += 1
        for node in np.argsort(np.array(self.depths, dtype=np.int64), kind="stable")[::-1].tolist():
            if self.parents[node] != NO_NODE:
                counts[self.parents[node]] += counts[node]
        return counts

    def _add(self, writers: dict[str, _Writer], segment: str, record: Any) -> None:
        writer = writers.get(segment)
        if isinstance(record, Opened):
            writer = writers[segment] = _Writer(record, record.namespace)
            self.opened.append(record)
            self.closed.discard(record.pid)
        if writer is None:
            return
        pid = writer.opened.pid
        self.seen_ns[pid] = record.t_ns
        match record:
            case Closed():
                self.closed.add(pid)
            case Reset():
                writer.namespace = record.namespace
                self.resets.append((record.t_ns, record.namespace))
            case Lost():
                self.num_lost += record.records
            case Sample() if len(self.samples) < MAX_SAMPLES:
                self.samples += [TierSample(record.t_ns, pid, tier, n) for tier, n in record.tiers.items()]
            case Moved() if self.num_moves < MAX_MOVES:
                moves = self._moves.setdefault((record.tier, pid), Moves())
                self.num_moves += moves.add(record.ids, Move(record.t_ns, record.why, pid))
            case Asked() if len(self.requests) < MAX_REQUESTS:
                self._add_request(record, writer)
            case Ended() if len(self.ends) < MAX_REQUESTS:
                self.ends.append(End(record.request, record.tenant, writer.namespace, self._last(record)))

    def _add_request(self, asked: Asked, writer: _Writer) -> None:
        num_blocks = asked.depth + len(asked.hashes) // BLOCK_HASH_NBYTES
        self.requests.append(
            Request(
                asked.t_ns, writer.opened.pid, asked.request, asked.tenant, asked.adapter, writer.namespace,
                asked.num_tokens, num_blocks, self._last(asked), asked.hits, asked.waited_s, asked.is_late,
            )
        )  # fmt: skip

    def _last(self, record: Asked | Ended) -> int:
        """Node of the last block; those before it are made. Where the blocks before it were in a segment that is
        gone, they begin in the middle."""
        node, depth = self._nodes.get(record.parent, NO_NODE), record.depth
        for at in range(0, len(record.hashes) - BLOCK_HASH_NBYTES + 1, BLOCK_HASH_NBYTES):
            depth += 1
            node = self._child(node, depth, record.hashes[at : at + BLOCK_HASH_NBYTES])
        return node

    def _child(self, parent: int, depth: int, block_hash: bytes) -> int:
        node = self._nodes.get(block_hash)
        if node is None:
            if len(self.hashes) >= MAX_NODES:
                return parent
            node = self._nodes[block_hash] = len(self.hashes)
            self.hashes.append(block_hash)
            self.parents.append(parent)  # always of less depth, so that no file can make a circle
            self.depths.append(depth if parent == NO_NODE else max(depth, self.depths[parent] + 1))
        elif self.parents[node] == NO_NODE and parent != NO_NODE and self.depths[parent] < self.depths[node]:
            self.parents[node] = parent  # what was before it was not known, and is now
        return node
