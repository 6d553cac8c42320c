"""What a hand-over is set to, and what is told of one: by way of whoever routes requests, as JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from connectors.curve_keys import CurveKeys
from connectors.pipe import PipeEnd
from kvstore.slot import Rows

MakeEnd = Callable[[Rows, bool, int | None], PipeEnd]
"""Over rows; told whether it is the server's, and the memfd they are, where it offers them to the peer."""


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
    id: Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
    num_blocks: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    namespace: Annotated[str, msgspec.Meta(max_length=64)]
    tp_size: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    is_pushed: bool = False
