"""What two hosts say to each other about a lookup buffer: msgpack maps, validated against the classes below.

Every field is bounded, so that a frame which is small enough cannot ask for much memory. Bytes
of KV are never in here: they go by a `connectors.pipe.Pipe`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

from kvstore.identity import NAMESPACE_NBYTES, KVIdentity
from kvstore.keys import KEY_NBYTES, BlockKey

VERSION: Final = 1
MAX_BLOCKS: Final = 1 << 14
MAX_HELLO_NBYTES: Final = 1 << 16

Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_BLOCKS)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=3600)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Keys = Annotated[bytes, msgspec.Meta(max_length=MAX_BLOCKS * KEY_NBYTES)]
Namespace = Annotated[bytes, msgspec.Meta(min_length=NAMESPACE_NBYTES, max_length=NAMESPACE_NBYTES)]
Hello = Annotated[bytes, msgspec.Meta(max_length=MAX_HELLO_NBYTES)]
Fields = Annotated[dict[Annotated[str, msgspec.Meta(max_length=64)], Text | int], msgspec.Meta(max_length=64)]


class Request(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What a consumer asks a producer."""


class Answer(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """What it is told."""


class Join(Request, frozen=True):
    """Let us have a pipe. Both identities must be equal before any KV is asked for."""

    version: Number
    identity: Fields
    transport: Text
    hello: Hello


class Joined(Answer, frozen=True):
    pipe: Number
    hello: Hello


class Select(Request, frozen=True):
    """Take the longest stored prefix of these out of the buffer, and hold it so long.

    hand_over: whose claims are taken; 0: of each key the oldest.
    """

    namespace: Namespace
    keys: Keys
    timeout_s: Seconds
    hand_over: Number = 0


class Selected(Answer, frozen=True):
    """So many leading blocks; a selection of none has no number.

    is_open: more of that hand-over may come.
    """

    selection: Number
    num_blocks: Count
    is_open: bool


class Fetch(Request, frozen=True):
    """Send blocks of a selection through a pipe, as slots; answered at once, in the order in which they come."""

    selection: Number
    first: Count
    num_blocks: Count
    pipe: Number


class Release(Request, frozen=True):
    """The selection is not wanted any more."""

    selection: Number


class Forget(Request, frozen=True):
    """Nothing more of a hand-over is wanted."""

    hand_over: Number


class Reserve(Request, frozen=True):
    """Make room for a prefix that is to be inserted; answered when there is, or when there will be none.

    hand_over: what is pushed; 0: it is of none.
    """

    namespace: Namespace
    keys: Keys
    timeout_s: Seconds
    hand_over: Number = 0


class Reserved(Answer, frozen=True):
    """Which blocks, of those asked for, are wanted; a ticket of 0: no room came free."""

    ticket: Number
    wanted: Annotated[list[Count], msgspec.Meta(max_length=MAX_BLOCKS)]


class Insert(Request, frozen=True):
    """Take the wanted blocks from a pipe, as slots; answered when they can be selected."""

    ticket: Number
    pipe: Number


class Done(Answer, frozen=True):
    pass


REQUESTS: Final = Join | Select | Fetch | Release | Forget | Reserve | Insert
ANSWERS: Final = Joined | Selected | Reserved | Done


def identity_fields(identity: KVIdentity) -> dict[str, str | int]:
    """Content and placement, flat: what must be equal at both ends."""
    return {**identity.content(), **identity.placed(1)}


def differences(mine: dict[str, str | int], theirs: dict[str, str | int]) -> list[str]:
    """In words, by field."""
    names = sorted(mine.keys() | theirs.keys())
    return [f"{name}: {mine.get(name)!r} here, {theirs.get(name)!r} there" for name in names
            if mine.get(name) != theirs.get(name)]  # fmt: skip


def keys_of(data: bytes) -> list[BlockKey]:
    """Raises ValueError unless these are whole keys."""
    if len(data) % KEY_NBYTES:
        raise ValueError(f"{len(data)} bytes are no block keys")
    return [BlockKey(data[i : i + KEY_NBYTES]) for i in range(0, len(data), KEY_NBYTES)]
