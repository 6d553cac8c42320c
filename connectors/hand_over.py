"""KV from one engine to another, for any engine: one prefills and holds it, the other takes it.

    producer  [workers fill slots] -> pinned in a `LocalLookupBuffer` -> hand-over: where, and how many blocks
    consumer  hand-over -> control channel: select -> pipe: slots -> verified -> a promise, as any other

What is handed over stays for a lease, and is gone once it was taken. A peer that is gone, or
late, is a miss: the prompt is computed. The last, partial block of a prompt is computed anyhow.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Final

import msgspec

from connectors.base import Blocks, Keys
from connectors.control import ControlServer
from connectors.hand_over_told import HandOver, HandOverConfig, PushTo
from connectors.lookup_messages import REQUESTS
from connectors.lookup_service import LookupService
from connectors.offloading import OffloadingScheduler
from connectors.peers import Peers
from connectors.push import Pushes
from connectors.remote_lookup_buffer import PeerIo
from kvstore.config import StoreConfig
from kvstore.errors import ConfigError
from kvstore.keys import BlockKey, array_to_keys
from kvstore.lookup_buffer import Item, LocalLookupBuffer
from kvstore.slot import KeyArray, Slots

logger = logging.getLogger(__name__)

_FIELD: Final = "kvstore_peer"
_PUSH_TO: Final = "kvstore_push_to"


class HandOverScheduler(OffloadingScheduler):
    """The scheduler half; its worker half is `connectors.offloading_worker.OffloadingWorker`.

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
        with ExitStack() as undo:
            undo.callback(super().close)
            self._server = self._serve(hand_over, undo)
            self._ending = undo.pop_all()
        self.address = hand_over.advertise or self._server.address
        self.public_key = hand_over.keys.public if hand_over.keys is not None else ""

    def hand_over(self, keys: Keys, params: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Hold what was stored of a prompt, and is on its way there, for one who takes it; or push it there."""
        num_blocks, held = self._held(keys)
        if not num_blocks:
            return None
        item = self._buffer.hold(held)
        self._buffer.abandon([key for key in held if key not in self._filling])  # was evicted meanwhile
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
        self._ending.close()

    def _serve(self, hand_over: HandOverConfig, undo: ExitStack) -> ControlServer:
        """Have the peers' ends made, and what others ask answered. Told to ``undo``: whatever must end, the first
        last; an error of one does not keep the others."""
        planes, make_end = self._planes, hand_over.make_end
        self._peers.use(planes)
        self._consumers.use(planes)
        self._buffer = LocalLookupBuffer(planes, lease_s=hand_over.lease_s)
        undo.callback(self._buffer.close)
        undo.callback(self._peers.close)
        self._pushes = Pushes(self._buffer, planes, hand_over.transfer_s)
        offered = planes.arena.fd if hand_over.hands_over else None
        ends = {hand_over.transport: lambda is_server: make_end(planes.arena.rows, is_server, offered)}
        self._service = LookupService(
            self._buffer, planes, ends, transfer_s=hand_over.transfer_s, pushes=self._pushes,
            gives=hand_over.hands_over, takes=hand_over.takes,
        )  # fmt: skip
        undo.callback(self._service.close)
        undo.callback(self._pushes.close)
        undo.callback(self._consumers.close)  # wakes up what pushes
        server = ControlServer(hand_over.listen, self._service.handle, messages=REQUESTS, keys=hand_over.keys)
        undo.callback(server.close)
        return server

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

    def _not_filled(self, keys: Sequence[BlockKey]) -> None:
        self._buffer.abandon(keys)

    def _settle(self, request_id: str) -> None:
        """What was pushed for a request it has by now, or does not want."""
        pushed = self._pushed.pop(request_id, None)
        if pushed is not None:
            self._buffer.settle(pushed)

    def _publish(self, slots: Slots, keys: KeyArray, current: tuple[int, bytes]) -> None:
        self._buffer.publish(array_to_keys(keys.reshape(len(slots), -1)), slots, current)
