"""KV from one engine to another, for any engine: one prefills and holds it, the other takes it.

    producer  [workers fill slots] -> pinned in a `LocalLookupBuffer` -> hand-over: where, and how many blocks
    consumer  hand-over -> control channel: select -> pipe: slots -> verified -> a promise, as any other

What is handed over stays for a lease, and is gone once it was taken. A peer that is gone, or
late, is a miss: the prompt is computed. The last, partial block of a prompt is computed anyhow.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import msgspec

from connectors.base import Blocks, Keys
from connectors.control import ControlClient, ControlServer
from connectors.curve_keys import CurveKeys
from connectors.lookup_messages import ANSWERS, REQUESTS
from connectors.lookup_service import LookupService
from connectors.offloading import OffloadingScheduler
from connectors.pipe import PipeEnd
from connectors.push import Pushes
from connectors.remote_lookup_buffer import Holder, PeerIo
from connectors.remote_peer import RemotePeer
from connectors.restripe import Landing
from connectors.tier_sampler import COUNTERS
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError, KVStoreError
from kvstore.keys import BlockKey, array_to_keys
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.planes import Planes
from kvstore.slot import KeyArray, Rows, Slots
from kvstore.tiers.base import TierStats

logger = logging.getLogger(__name__)

MakeEnd = Callable[[Rows, bool, int | None], PipeEnd]
"""Over rows; told whether it is the server's, and the memfd they are, where it offers them to the peer."""

_FIELD: Final = "kvstore_peer"
_PUSH_TO: Final = "kvstore_push_to"
_MOST_PEERS: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class HandOverConfig:
    """Args:
    transport: name of the pipe's kind; both ends have the same.
    listen: where this engine's control channel listens, ``tcp://host:port``; port 0 takes a free one.
    advertise: the address that other hosts reach it at; by default the one it listens at.
    keys: who this engine is, and whose public keys are let in; needed beyond loopback.
    hands_over: others take from this engine; else it only takes.
    takes: it takes from others, and they push to it; else it only hands over.
    lease_s: how long what nobody takes is held.
    transfer_s: deadline of one transfer.
    push: send a prompt's blocks to its consumer as soon as they are there, where the request names
        one; what could not be pushed is pulled.
    """

    transport: str
    make_end: MakeEnd
    listen: str = "tcp://127.0.0.1:0"
    advertise: str | None = None
    keys: CurveKeys | None = None
    hands_over: bool = True
    takes: bool = True
    lease_s: float = 60.0
    transfer_s: float = 30.0
    push: bool = False


class PushTo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which consumer a request will go to, by way of whoever routes it; JSON. As in `HandOver`."""

    address: Annotated[str, msgspec.Meta(max_length=256)]
    key: Annotated[str, msgspec.Meta(max_length=64)]


class HandOver(msgspec.Struct, frozen=True, kw_only=True):
    """What a consumer is told, by way of whoever routes its request; JSON.

    Attributes:
        address, key: of the producer's control channel, and its public key; empty without keys.
        num_blocks: leading blocks of the prompt that it holds, or is about to.
        tp_size: ranks that hold different KV, each in a stripe of its own.
        is_pushed: they are on their way to the consumer.
    """

    address: Annotated[str, msgspec.Meta(max_length=256)]
    key: Annotated[str, msgspec.Meta(max_length=64)]
    id: Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    namespace: Annotated[str, msgspec.Meta(max_length=64)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    is_pushed: bool = False


class HandOverScheduler(OffloadingScheduler):
    """The scheduler half; its worker half is `connectors.offloading.OffloadingWorker`.

    Attributes:
        address, public_key: of this engine's control channel, for others; the key is empty without keys.

    Raises:
        ConfigError: as `OffloadingScheduler`; chunks of more than one block, lower tiers, or an
            address that cannot be listened at.
    """

    def __init__(
        self,
        config: StoreConfig,
        num_workers: int,
        windows: Sequence[int | None] = (None,),
        *,
        hand_over: HandOverConfig,
    ) -> None:
        if config.blocks_per_chunk != 1:
            raise ConfigError(f"blocks_per_chunk: {config.blocks_per_chunk}; hand-overs take 1")
        if config.disk is not None or config.shared is not None:
            raise ConfigError("disk, shared: set; tiers belong to another connector beside this one")
        self._peers, self._consumers = Peers(hand_over, offers=False), Peers(hand_over, offers=True)
        self._pushed: dict[str, int] = {}  # hand-overs to this engine, by request
        self._push = hand_over.push
        super().__init__(config, num_workers, windows, PeerIo(self._peers.holders_of, config.load_timeout_s))
        self._peers.use(self._planes)
        self._consumers.use(self._planes)
        planes, make_end = self._planes, hand_over.make_end
        offered = planes.arena.fd if hand_over.hands_over else None
        ends = {hand_over.transport: lambda is_server: make_end(planes.arena.rows, is_server, offered)}
        self._buffer = LocalLookupBuffer(planes, lease_s=hand_over.lease_s)
        self._pushes = Pushes(self._buffer, planes, hand_over.transfer_s)
        self._service = LookupService(
            self._buffer, planes, ends, transfer_s=hand_over.transfer_s, pushes=self._pushes,
            gives=hand_over.hands_over, takes=hand_over.takes,
        )  # fmt: skip
        self._server: ControlServer | None = None
        try:
            self._server = ControlServer(hand_over.listen, self._service.handle, messages=REQUESTS, keys=hand_over.keys)
        except BaseException:
            self.close()
            raise
        self.address = hand_over.advertise or self._server.address
        self.public_key = hand_over.keys.public if hand_over.keys is not None else ""

    def hand_over(self, keys: Keys, params: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Hold what was stored of a prompt, and is on its way there, for one who takes it; or push it there."""
        num_blocks = self._num_held(keys)
        if not num_blocks:
            return None
        every = [key for of_group in keys for key in of_group[:num_blocks]]
        item = self._buffer.hold(every)
        told = HandOver(
            address=self.address,
            key=self.public_key,
            id=item.number,
            num_blocks=num_blocks,
            namespace=self._planes.current()[1].hex(),
            tp_size=self._planes.identity.placement.tp_size,
            is_pushed=self._push and self._begin_push(item, (params or {}).get(_PUSH_TO)),
        )
        return {_FIELD: msgspec.to_builtins(told)}

    def expect(self, request_id: str, keys: Keys, params: Mapping[str, Any] | None) -> int:
        told = (params or {}).get(_FIELD)
        if not isinstance(told, Mapping) or told.get("namespace") != self._planes.current()[1].hex():
            return 0
        try:
            hand_over = msgspec.convert(told, HandOver)
        except msgspec.ValidationError:
            return 0
        if not self._peers.expect(request_id, keys, hand_over):
            return 0
        if hand_over.is_pushed:
            self._pushed[request_id] = hand_over.id
        return hand_over.num_blocks

    def lookup(self, request_id: str, keys: Keys, *, expected: int = 0) -> int | None:
        return super().lookup(request_id, keys, expected=expected if self._peers.is_open(request_id) else 0)

    def load(self, request_id: str, blocks: Blocks) -> None:
        super().load(request_id, blocks)
        self._settle(request_id)

    def forget(self, request_id: str) -> None:
        super().forget(request_id)
        self._settle(request_id)
        self._peers.forget(request_id)

    def reset(self) -> None:
        self._lookups.reset()
        self._buffer.reset()

    def stats(self) -> dict[str, dict[str, Any]]:
        return {**super().stats(), "peer": asdict(self._peers.stats())}

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._consumers.close()  # wakes up what pushes
        self._pushes.close()
        self._service.close()
        self._peers.close()
        self._buffer.close()
        super().close()

    def _begin_push(self, item: Item, told: object) -> bool:
        """Whether it goes to the consumer that is named."""
        try:
            to = msgspec.convert(told, PushTo)
        except msgspec.ValidationError:
            return False
        consumer = self._consumers.borrow(to.address, to.key)
        if consumer is None:
            return False
        is_begun = self._pushes.start(item, consumer.peer, lambda: self._consumers.give_back(consumer))
        if not is_begun:
            self._consumers.give_back(consumer)
        return is_begun

    def _settle(self, request_id: str) -> None:
        """What was pushed for a request it has by now, or does not want."""
        pushed = self._pushed.pop(request_id, None)
        if pushed is not None:
            self._buffer.settle(pushed)

    def _publish(self, slots: Slots, keys: KeyArray, current: tuple[int, bytes]) -> None:
        self._buffer.publish(array_to_keys(keys.reshape(len(slots), -1)), slots, current)


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
    """Producers that requests were handed over by. Connections are made when first named; idle ones go when there
    are too many.

    Whom a request names is not trusted: with keys, only peers whose public key is let in are spoken
    to; without, only loopback.

    Args:
        offers: what is here goes to them; else what is there comes here.
    """

    def __init__(self, config: HandOverConfig, *, offers: bool) -> None:
        self._config, self._offers = config, offers
        self._planes: Planes | None = None
        self._lock = threading.Lock()
        self._connections: dict[tuple[str, int], Connection] = {}  # by address and tp_size; least recently named first
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
        name = address, tp_size or mine
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
            landing = Landing.of(planes, name[1]) if name[1] != mine else None
        except ValueError as e:
            self._tell(name[1], e)
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
