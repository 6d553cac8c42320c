"""What an end says of itself before it is joined."""

from __future__ import annotations

from typing import Final, TypeVar

import msgspec

from connectors.pipe import PipeProtocolError

HELLO_NBYTES: Final = 64 << 10


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an end says of itself before it is joined; each transport adds to it."""

    transport: str
    is_server: bool
    slot_nbytes: int
    max_nbytes: int


HelloT = TypeVar("HelloT", bound=Hello)


def read_hello(data: bytes, mine: HelloT) -> HelloT:
    """The peer's hello, which must be of the same transport and slots as mine.

    Raises:
        PipeProtocolError: it is not.
    """
    if len(data) > HELLO_NBYTES:
        raise PipeProtocolError(f"a hello has at most {HELLO_NBYTES} bytes, not {len(data)}")
    try:
        transport = msgspec.msgpack.decode(data, type=_AnyHello).transport
        if transport != mine.transport:
            raise PipeProtocolError(f"the peer's pipe is {transport!r}, this one is {mine.transport!r}")
        theirs = msgspec.msgpack.decode(data, type=type(mine))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise PipeProtocolError(f"that is no hello of {mine.transport}: {e}") from e
    if theirs.slot_nbytes != mine.slot_nbytes:
        raise PipeProtocolError(f"the peer's slots have {theirs.slot_nbytes} bytes, these have {mine.slot_nbytes}")
    if theirs.is_server == mine.is_server:
        raise PipeProtocolError("of two ends one is the server")
    return theirs


class _AnyHello(msgspec.Struct):
    transport: str
