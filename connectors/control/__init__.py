"""Small questions and answers between two hosts: which keys, which slots, hellos of pipes. Never KV.

    ask ── ControlClient ── DEALER ════ CURVE, TCP ════ ROUTER ── ControlServer ── handle

Each end has one thread that owns its sockets; the server's also runs ``handle``. A request is
three frames: a number (uint64), how long its asker waits (uint32, ms), a message in msgpack. An
answer is two: the number, a message. Integers are little-endian. Frames are bounded before they
are stored, messages by their types before memory is allocated for them. With keys
(`connectors.curve_keys`) both ends prove who they are and all is encrypted; without, only
loopback is spoken to.

What ZeroMQ does not bound is the number of frames of one message: whoever was let in (without keys:
any process of this host) can fill memory with one that never ends. When one ends, what is too many is dropped.
"""

from connectors.control.client import ControlClient
from connectors.control.end import (
    MAX_ASKS,
    MAX_FRAME_NBYTES,
    MAX_TIMEOUT_S,
    ControlClosedError,
    ControlError,
    ControlRefusedError,
    ControlTimeoutError,
    Peer,
    Refused,
    checked_address,
    make_key_pair,
)
from connectors.control.server import ControlServer

__all__ = [
    "MAX_ASKS",
    "MAX_FRAME_NBYTES",
    "MAX_TIMEOUT_S",
    "ControlClient",
    "ControlClosedError",
    "ControlError",
    "ControlRefusedError",
    "ControlServer",
    "ControlTimeoutError",
    "Peer",
    "Refused",
    "checked_address",
    "make_key_pair",
]
