"""What a journal says, put together: requests, the tree of their prefixes, what came and went.

Prompts are kept as a tree: a node is a block, its parent the block before it. All of it lies in
memory, up to bounds that are told in `problems` when they are met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from kvstore.journal import Asked, Closed, Ended, JournalReader, Lost, Moved, Opened, Reset, Sample
from kvstore.keys import BLOCK_HASH_NBYTES, KEY_NBYTES

MAX_NODES: Final = 1 << 22
MAX_REQUESTS: Final = 1 << 20
MAX_MOVES: Final = 1 << 22
MAX_SAMPLES: Final = 1 << 18
NO_NODE: Final = -1
_SILENT_NS: Final = 60 * 10**9  # samples come more often


@dataclass(frozen=True, slots=True)
class Request:
    """One request's lookup; see `kvstore.journal.Asked`.

    Attributes:
        last: node of the prompt's last full block; `NO_NODE`: it has none, or the journal's beginning is gone.
        num_blocks: full blocks of the prompt that the journal knows.
    """

    t_ns: int
    request_id: str
    tenant: str
    adapter: str
    namespace: bytes
    num_tokens: int
    num_blocks: int
    last: int
    hits: dict[str, int]
    waited_s: float
    is_late: bool

    @property
    def num_hits(self) -> int:
        """Leading blocks that were found."""
        return min(self.num_blocks, sum(self.hits.values()))


@dataclass(frozen=True, slots=True)
class Move:
    """The last that happened to a block in a tier, as one process tells it; ``why`` is empty where it came in."""

    t_ns: int
    why: str
    pid: int


@dataclass(slots=True)
class _Writer:
    """One segment's process, as it is when a record was written."""

    opened: Opened
    namespace: bytes


@dataclass(slots=True)
class JournalView:
    """Attributes:
    hashes, parents, depths: by node: block hash, node before it, blocks up to and with it.
    ends: (request id, tenant, last node) of requests that are over; of their prompts, and of what they generated.
    moves: (tier, packed key) -> the last move.
    samples: (time, writer's process, numbers by tier).
    seen_ns: process -> its last record; closed: processes that have closed their store since they opened it.
    num_lost: requests that writers could not keep up with.
    """

    path: Path
    opened: list[Opened] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    samples: list[tuple[int, int, dict[str, dict[str, float]]]] = field(default_factory=list)
    ends: list[tuple[str, str, int]] = field(default_factory=list)
    resets: list[tuple[int, bytes]] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    moves: dict[tuple[str, bytes], Move] = field(default_factory=dict)
    first_ns: int = 0
    last_ns: int = 0
    num_lost: int = 0
    seen_ns: dict[int, int] = field(default_factory=dict)
    closed: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    _nodes: dict[bytes, int] = field(default_factory=dict)

    @classmethod
    def of(cls, path: Path) -> JournalView:
        """Read all of a journal.

        Raises:
            ConfigError: there is none.
        """
        view, reader = cls(path), JournalReader(path)
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
            ("blocks that came or went", len(view.moves), MAX_MOVES), ("samples", len(view.samples), MAX_SAMPLES),
        ):  # fmt: skip
            if n >= most:
                view.problems.append(f"more than {most} {name}; what is beyond is not looked at")
        return view

    def node_of(self, block_hash: bytes) -> int:
        """`NO_NODE` where no request in the journal had it."""
        return self._nodes.get(block_hash, NO_NODE)

    def path_to(self, node: int) -> list[bytes]:
        """Block hashes of a prompt, from its first block to a node."""
        found = []
        while node != NO_NODE:
            found.append(self.hashes[node])
            node = self.parents[node]
        return found[::-1]

    def requests_of(self, request_id: str) -> list[Request]:
        """Those whose id is this or, where there is none, begins so; vLLM adds to the id that a client gave."""
        exact = [request for request in self.requests if request.request_id == request_id]
        return exact or [request for request in self.requests if request.request_id.startswith(request_id)]

    def hashes_of(self, request_id: str) -> list[bytes]:
        """Of the last request of this id: its prompt's blocks and, once it is over, those of what it generated."""
        found = self.requests_of(request_id)
        if not found:
            return []
        whole = found[-1].request_id
        end = next((node for name, _, node in reversed(self.ends) if name == whole), NO_NODE)
        return max(self.path_to(found[-1].last), self.path_to(end), key=len)

    def hashes_of_tenant(self, tenant: str) -> set[bytes]:
        """Of all blocks that a tenant's requests asked for, or stored; ``tenant`` as in `Request`."""
        seen: set[int] = set()
        lasts = [request.last for request in self.requests if request.tenant == tenant]
        for node in (*lasts, *(node for _, name, node in self.ends if name == tenant)):
            while node != NO_NODE and node not in seen:
                seen.add(node)
                node = self.parents[node]
        return {self.hashes[node] for node in seen}

    def hits_by_node(self) -> list[int]:
        """How often each block was a hit."""
        return self._up([(request.last, request.num_hits) for request in self.requests])

    def asked_by_node(self) -> list[int]:
        """How often each block was asked for."""
        return self._up([(request.last, request.num_blocks) for request in self.requests])

    def tenants(self) -> Counter[tuple[bytes, str]]:
        """Requests by (namespace, tenant)."""
        return Counter((request.namespace, request.tenant) for request in self.requests)

    def move_of(self, tier: str, key: bytes) -> Move | None:
        return self.moves.get((tier, key))

    def has_ended(self, pid: int) -> bool:
        """Whether a process is gone, as far as the journal tells: it said so, or was silent while others wrote."""
        return pid in self.closed or self.last_ns - self.seen_ns.get(pid, 0) > _SILENT_NS

    def tiers(self) -> list[str]:
        """That anything is known of, from the top."""
        known = {tier for tier, _ in self.moves} | {tier for _, _, tiers in self.samples for tier in tiers}
        order = ("device", "host", "disk", "shared")
        return [*(tier for tier in order if tier in known), *sorted(known.difference(order))]

    def _up(self, ends: list[tuple[int, int]]) -> list[int]:
        """By node: of how many (last node, leading blocks) it is among the leading blocks."""
        counts = [0] * (len(self.hashes) + 1)
        for node, n in ends:
            while n and node != NO_NODE and self.depths[node] > n:
                node = self.parents[node]
            if n:
                counts[node] += 1
        for node in range(len(self.hashes) - 1, -1, -1):  # a node's parent was made before it
            if self.parents[node] != NO_NODE:
                counts[self.parents[node]] += counts[node]
        return counts[:-1]

    def _add(self, writers: dict[str, _Writer], segment: str, record: Any) -> None:
        if segment in writers:
            self.seen_ns[writers[segment].opened.pid] = record.t_ns
        match record:
            case Opened():
                writers[segment] = _Writer(record, record.namespace)
                self.opened.append(record)
                self.seen_ns[record.pid] = record.t_ns
                self.closed.discard(record.pid)
            case Closed():
                if segment in writers:
                    self.closed.add(writers[segment].opened.pid)
            case Reset():
                if segment in writers:
                    writers[segment].namespace = record.namespace
                self.resets.append((record.t_ns, record.namespace))
            case Lost():
                self.num_lost += record.records
            case Sample():
                if len(self.samples) < MAX_SAMPLES and segment in writers:
                    self.samples.append((record.t_ns, writers[segment].opened.pid, record.tiers))
            case Moved():
                pid = writers[segment].opened.pid if segment in writers else 0
                move = Move(record.t_ns, record.why, pid)
                for at in range(0, len(record.keys) - KEY_NBYTES + 1, KEY_NBYTES):
                    key = record.tier, record.keys[at : at + KEY_NBYTES]
                    if len(self.moves) < MAX_MOVES or key in self.moves:
                        self.moves[key] = move
            case Asked():
                self._add_request(record, writers.get(segment))
            case Ended() if len(self.ends) < MAX_REQUESTS:
                self.ends.append((record.request, record.tenant, self._last(record)))

    def _add_request(self, asked: Asked, writer: _Writer | None) -> None:
        if writer is None or len(self.requests) >= MAX_REQUESTS:
            return
        node = self._last(asked)
        self.requests.append(
            Request(
                asked.t_ns, asked.request, asked.tenant, asked.adapter, writer.namespace, asked.num_tokens,
                self.depths[node] if node != NO_NODE else 0, node, asked.hits, asked.waited_s, asked.is_late,
            )
        )  # fmt: skip

    def _last(self, record: Asked | Ended) -> int:
        """Node of the last block; those before it are made."""
        node = self._nodes.get(record.parent, NO_NODE)
        if record.parent and node == NO_NODE:  # the segment's beginning could not be read
            return NO_NODE
        for at in range(0, len(record.hashes) - BLOCK_HASH_NBYTES + 1, BLOCK_HASH_NBYTES):
            node = self._child(node, record.hashes[at : at + BLOCK_HASH_NBYTES])
        return node

    def _child(self, parent: int, block_hash: bytes) -> int:
        node = self._nodes.get(block_hash)
        if node is None:
            if len(self.hashes) >= MAX_NODES:
                return parent
            node = self._nodes[block_hash] = len(self.hashes)
            self.hashes.append(block_hash)
            self.parents.append(parent)
            self.depths.append(self.depths[parent] + 1 if parent != NO_NODE else 1)
        return node

    def prompts(self) -> Iterator[list[int]]:
        """Each request's blocks as nodes, prefix first, by time; for `kvstore plan`."""
        for request in self.requests:
            nodes, node = [], request.last
            while node != NO_NODE:
                nodes.append(node)
                node = self.parents[node]
            yield nodes[::-1]
