"""The peers of one engine: connections to those that requests name, and who has what of which request.

Whom a request names is not trusted: with keys, only peers whose public key is let in are spoken to; without, only
loopback. Connections are made when first named; idle ones go when there are too many.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from connectors.base import Keys
from connectors.control import ControlClient
from connectors.hand_over_told import HandOver, HandOverConfig
from connectors.lookup_messages import ANSWERS
from connectors.remote_lookup_buffer import Holder
from connectors.remote_peer import RemotePeer
from connectors.restripe import Landing
from connectors.tier_sampler import COUNTERS
from kvstore.errors import KVStoreError
from kvstore.keys import BlockKey
from kvstore.planes import Planes
from kvstore.tiers.base import TierStats

logger = logging.getLogger(__name__)

_MOST_PEERS: Final = 64


@dataclass(slots=True)
class Connection:
    client: ControlClient
    peer: RemotePeer
    num_requests: int = 0


@dataclass(slots=True, eq=False)
class _Expected:
    connection: Connection
    keys: frozenset[BlockKey]
    holder: Holder


class Peers:
    """Those that requests were handed over by, or those that what is here is pushed to.

    Args:
        offers: what is here goes to them; else what is there comes here.
    """

    def __init__(self, config: HandOverConfig, *, offers: bool) -> None:
        self._config, self._offers = config, offers
        self._planes: Planes | None = None
        self._lock = threading.Lock()
        # by address, key and tp_size; least recently named first
        self._connections: dict[tuple[str, str, int], Connection] = {}
        self._told: set[int] = set()  # of which tp_size it was said that there is no way
        self._expected: dict[str, _Expected] = {}  # by request
        self._of_key: dict[BlockKey, list[_Expected]] = {}  # requests that share a prefix have an entry each
        self._total = TierStats(name="peer")

    def use(self, planes: Planes) -> None:
        """Where blocks come to."""
        self._planes = planes

    def expect(self, request_id: str, keys: Keys, hand_over: HandOver) -> bool:
        """A request's blocks are with this peer. False where it is not spoken to."""
        with self._lock:
            if request_id in self._expected:
                return True
            connection = self._connect(hand_over.address, hand_over.key, hand_over.tp_size)
            if connection is None:
                return False
            connection.num_requests += 1
            every = frozenset(key for of_group in keys for key in of_group)
            expected = _Expected(connection, every, Holder(connection.peer, hand_over.id))
            self._expected[request_id] = expected
            for key in every:
                self._of_key.setdefault(key, []).append(expected)
            return True

    def borrow(self, address: str, key: str) -> Connection | None:
        """A peer, for `give_back`; None where it is not spoken to."""
        with self._lock:
            connection = self._connect(address, key, None)
            if connection is not None:
                connection.num_requests += 1
            return connection

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            connection.num_requests -= 1

    def holders_of(self, keys: Sequence[BlockKey]) -> list[Holder]:
        """Who may have them, most of them first; called by lookup threads."""
        with self._lock:
            known = list(self._of_key.get(keys[0], ()))

        def num_leading(expected: _Expected) -> int:
            return next((i for i, key in enumerate(keys) if key not in expected.keys), len(keys))

        known.sort(key=num_leading, reverse=True)
        return [expected.holder for expected in known]

    def is_open(self, request_id: str) -> bool:
        """Whether more of what a request was handed over may come."""
        expected = self._expected.get(request_id)
        return expected is not None and expected.holder.is_open and expected.connection.peer.is_up

    def forget(self, request_id: str) -> None:
        """The request has loaded what it wanted, or is over: the peer may have its memory back."""
        with self._lock:
            expected = self._expected.pop(request_id, None)
            if expected is None:
                return
            for key in expected.keys:
                others = self._of_key[key]
                others.remove(expected)
                if not others:
                    del self._of_key[key]
            expected.connection.num_requests -= 1
        expected.connection.peer.forget(expected.holder.hand_over)

    def stats(self) -> TierStats:
        """Of all of them together."""
        with self._lock:
            peers = [connection.peer.stats() for connection in self._connections.values()]
            return _sum([self._total, *peers])

    def close(self) -> None:
        with self._lock:
            connections = list(self._connections.values())
            self._connections.clear()
        for connection in connections:
            connection.client.close()  # wakes up who waits for an answer
            connection.peer.close()

    def _connect(self, address: str, key: str, tp_size: int | None) -> Connection | None:
        """Args:
        tp_size: as the request says, which is not trusted: the peer compares it with its own. None: ours.
        """
        keys, planes = self._config.keys, self._planes
        assert planes is not None
        mine = planes.identity.placement.tp_size
        tp_size = tp_size or mine
        name = address, key if keys is not None else "", tp_size
        known = self._connections.pop(name, None)
        if known is not None:
            self._connections[name] = known
            return known
        if keys is not None and key not in keys.peers.values():
            logger.warning("a request names a producer at %r whose key is not let in; it is computed", address)
            return None
        if len(self._connections) >= _MOST_PEERS and not self._drop_idle():
            return None
        try:
            landing = Landing.of(planes, tp_size) if tp_size != mine else None
        except ValueError as e:
            self._tell(tp_size, e)
            return None
        try:
            client = ControlClient(address, messages=ANSWERS, keys=keys, server_key=key if keys is not None else None)
        except KVStoreError as e:
            logger.warning("a request names a producer that cannot be asked: %s", e)
            return None
        make_end, offered = self._config.make_end, planes.arena.fd if self._offers and landing is None else None
        peer = RemotePeer(
            address, client.ask, planes, self._config.transport, lambda rows: make_end(rows, False, offered), landing
        )
        self._connections[name] = Connection(client, peer)
        return self._connections[name]

    def _tell(self, tp_size: int, why: ValueError) -> None:
        if tp_size not in self._told:
            self._told.add(tp_size)
            logger.warning("what a producer of tp_size %d has is computed here: %s", tp_size, why)

    def _drop_idle(self) -> bool:
        name = next((name for name, connection in self._connections.items() if not connection.num_requests), None)
        if name is None:
            return False
        connection = self._connections.pop(name)
        self._total = _sum([self._total, connection.peer.stats()])
        threading.Thread(target=_close, args=(connection,), name="kvstore-peer-close", daemon=True).start()
        return True


def _close(connection: Connection) -> None:
    connection.client.close()
    connection.peer.close()


def _sum(parts: Sequence[TierStats]) -> TierStats:
    """Counters of several as one; it is on where one of them is."""
    total = TierStats(name="peer", state="off" if parts[1:] and all(p.state == "off" for p in parts[1:]) else "on")
    for name in COUNTERS:
        setattr(total, name, sum(getattr(part, name) for part in parts))
    return total
