"""Peers for tests of the hand-over: real control channels, real pipes; all ends in this process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from connectors.base import Stripe
from connectors.control import ControlClient, ControlServer
from connectors.hand_over import HandOverScheduler
from connectors.hand_over_told import HandOverConfig
from connectors.lookup_messages import ANSWERS, REQUESTS
from connectors.lookup_service import LookupService
from connectors.nccl import NcclEnd
from connectors.nixl import NixlEnd
from connectors.offloading_worker import OffloadingWorker
from connectors.pipe import PipeEnd
from connectors.remote_lookup_buffer import RemoteLookupBuffer
from connectors.remote_peer import RemotePeer
from connectors.restripe import Landing
from connectors.tcp import TcpEnd
from connectors.testing import IDENTITY, PagedEngine, make_caches
from kvstore import BlockKey, HostTierConfig, KVIdentity, StoreConfig
from kvstore.identity import Placement
from kvstore.lookup_buffer import LocalLookupBuffer
from kvstore.planes import Planes
from kvstore.slot import Rows
from tests.waiting import wait_until

NUM_BLOCKS = 32


by_tcp = pytest.mark.parametrize("transport", ["tcp"], indirect=True)  # where it matters not, and takes seconds
ENDS: dict[str, Callable[..., PipeEnd]] = {"tcp": TcpEnd, "gloo": NcclEnd, "nixl": NixlEnd}
chosen = "tcp"


def make_end(rows: Rows, is_server: bool, offer_fd: int | None) -> PipeEnd:
    offer = {"offer_fd": offer_fd} if chosen == "nixl" else {}
    return ENDS[chosen](rows, is_server=is_server, **offer)


def store_config(num_blocks: int = NUM_BLOCKS, identity: KVIdentity = IDENTITY, **settings: Any) -> StoreConfig:
    host = HostTierConfig(num_blocks=num_blocks)
    return StoreConfig(identity=identity, host=host, put_timeout_s=0.0, load_timeout_s=4.0, **settings)


def is_given_back(planes: Planes, buffer: LocalLookupBuffer, service: LookupService) -> bool:
    """Whether nothing is held for anybody, nor half filled."""
    ready, pinned, _ = planes.manager.usage()
    held = (pinned, *buffer.usage(), *service.usage()[:2])
    return not any(held) and planes.manager.num_free + ready == planes.manager.num_slots


class Served:
    """A local buffer that peers may use."""

    def __init__(self, identity: KVIdentity = IDENTITY, num_blocks: int = NUM_BLOCKS, transfer_s: float = 5.0) -> None:
        self.transport = chosen
        self.planes = Planes(store_config(num_blocks, identity), shared_arena=True)
        self.buffer = LocalLookupBuffer(self.planes, lease_s=60.0)
        arena = self.planes.arena
        ends = {chosen: lambda is_server: make_end(arena.rows, is_server, arena.fd)}
        self.service = LookupService(self.buffer, self.planes, ends, transfer_s=transfer_s)
        self.server = ControlServer("tcp://127.0.0.1:0", self.service.handle, messages=REQUESTS, keys=None)

    def is_idle(self) -> bool:
        return is_given_back(self.planes, self.buffer, self.service)

    def close(self) -> None:
        self.server.close()
        self.service.close()
        self.buffer.close()
        self.planes.close()


class Remote:
    """One who uses it."""

    def __init__(
        self,
        address: str,
        identity: KVIdentity = IDENTITY,
        num_blocks: int = NUM_BLOCKS,
        their_ranks: int | None = None,
    ) -> None:
        self.client = ControlClient(address, messages=ANSWERS, keys=None, server_key=None)
        planes = Planes(store_config(num_blocks, identity), shared_arena=True)
        landing = None if their_ranks is None else Landing.of(planes, their_ranks)
        fd = planes.arena.fd if landing is None else None
        self.peer = RemotePeer(
            "served", self.client.ask, planes, chosen, lambda rows: make_end(rows, False, fd), landing
        )
        self.buffer = RemoteLookupBuffer(self.peer, planes)
        self.planes = planes

    def close(self) -> None:
        self.client.close()
        self.buffer.close()


def blocks_of(keys: list[BlockKey]) -> torch.Tensor:
    numbers = [key[0] + key[1] / 256 for key in keys]
    shape = IDENTITY.layout.block_shape
    return torch.tensor(numbers, dtype=torch.bfloat16).view(-1, 1, 1, 1, 1, 1).expand(-1, *shape).contiguous()


def take(buffer: RemoteLookupBuffer, keys: list[BlockKey], timeout_s: float = 5.0) -> int:
    out = torch.full((len(keys), *IDENTITY.layout.block_shape), -1, dtype=torch.bfloat16)
    n = buffer.drop_select(keys, out, timeout_s=timeout_s)
    assert torch.equal(out[:n], blocks_of(keys[:n]))
    return n


def of_ranks(tp_size: int) -> KVIdentity:
    return replace(IDENTITY, placement=Placement(tp_size=tp_size, byte_layout="vllm 0.32 cpu LBHNC x"))


class Engine(PagedEngine):
    def __init__(
        self, num_blocks: int = NUM_BLOCKS, num_workers: int = 1, identity: KVIdentity = IDENTITY, **settings: Any
    ) -> None:
        caches = make_caches(num_workers)
        hand_over = HandOverConfig(transport=chosen, make_end=make_end, **{"transfer_s": 5.0, **settings})
        self.half = HandOverScheduler(store_config(num_blocks, identity), num_workers, hand_over=hand_over)
        workers = [OffloadingWorker(Stripe(i, num_workers), groups, 1) for i, groups in enumerate(caches)]
        super().__init__(self.half, workers, caches)

    def prefill(self, keys: list[BlockKey], push_to: Engine | None = None) -> dict[str, Any]:
        """As a server that is asked to hand over; the last step's blocks are on their way yet."""
        self.store(keys, range(len(keys)))
        self.step()
        to = None if push_to is None else {"address": push_to.half.address, "key": push_to.half.public_key}
        told = self.half.hand_over([keys], {"kvstore_push_to": to})
        assert told is not None
        return told

    def decode(self, request_id: str, keys: list[BlockKey], told: dict[str, Any]) -> int:
        expected = self.half.expect(request_id, [keys], told)
        self._asked[request_id] = keys
        answers: list[int | None] = []

        def is_answered() -> bool:
            answers.append(self.half.lookup(request_id, [keys], expected=expected))
            if answers[-1] is None:
                self.step()
            return answers[-1] is not None

        wait_until(is_answered)
        n = answers[-1] or 0
        self.load(request_id, range(40, 40 + n))
        self.step()
        self.forget(request_id)
        return n

    def held(self) -> tuple[int, int]:
        return self.half._buffer.usage()


def is_idle(engine: Engine) -> bool:
    return engine.held() == (0, 0) and engine.half._service.usage()[:2] == (0, 0)


def number_of(told: dict[str, Any]) -> int:
    return int(told["kvstore_peer"]["id"])
