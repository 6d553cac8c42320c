"""A live service under everything that a peer may send: it goes on serving, and all comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest
import zmq

from connectors.lookup_messages import (
    VERSION,
    Fetch,
    Forget,
    Insert,
    Join,
    Joined,
    Release,
    Request,
    Reserve,
    Reserved,
    Select,
    Selected,
    identity_fields,
)
from connectors.testing import IDENTITY, make_keys
from tests.hand_over.peers import NUM_BLOCKS, Remote, Served, blocks_of, take
from tests.waiting import wait_until

HUGE = [b"\xc6\x7f\xff\xff\xff", b"\xdd\x7f\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\x7f\xff\xff\xff"]


@pytest.fixture
def served() -> Iterator[Served]:
    served = Served(transfer_s=1.0)
    yield served
    served.close()


@pytest.fixture
def remote(served: Served) -> Iterator[Remote]:
    remote = Remote(served.server.address)
    yield remote
    remote.close()


class Dealer:
    """Sends frames as they are."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger, self._socket.rcvtimeo = 0, 20_000
        self._socket.connect(address)
        self._number = 0

    def send(self, body: bytes, timeout_ms: int = 1000) -> None:
        self._number += 1
        number = self._number.to_bytes(8, "little")
        self._socket.send_multipart([number, timeout_ms.to_bytes(4, "little"), body])

    def receive(self, wait_ms: int = 20_000) -> bytes | None:
        if not self._socket.poll(wait_ms):
            return None
        return bytes(self._socket.recv_multipart()[1])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


def requests_of(namespace: bytes, numbers: random.Random, seen: list[int]) -> Request:
    """Well-formed, of what was answered before or of nothing."""
    keys = b"".join(make_keys(numbers.randrange(1, NUM_BLOCKS), seed=numbers.randrange(3)))
    number = numbers.choice([*seen[-40:], numbers.getrandbits(40)])
    count, other = numbers.randrange(NUM_BLOCKS), numbers.choice([*seen[-40:], 1])
    return numbers.choice(
        [
            Select(namespace, keys, numbers.random(), numbers.choice([0, number])),
            Fetch(number, numbers.randrange(3), count, other),
            Release(number),
            Forget(number),
            Reserve(namespace, keys, numbers.random() / 10, number),
            Insert(number, other),
            Join(VERSION, identity_fields(IDENTITY), "tcp", numbers.randbytes(40)),
        ]
    )


def mutated(body: bytes, numbers: random.Random) -> bytes:
    at, kind = numbers.randrange(len(body)), numbers.randrange(4)
    if kind == 0:
        return body[:at]
    if kind == 1:
        return body[:at] + numbers.choice(HUGE) + body[at:]
    if kind == 2:
        return body[:at] + b"\x91" * numbers.randrange(1, 2000)
    changed = bytearray(body)
    for _ in range(numbers.randrange(1, 6)):
        changed[numbers.randrange(len(changed))] = numbers.randrange(256)
    return bytes(changed)


def goes_on_serving(served: Served, remote: Remote) -> None:
    keys = make_keys(NUM_BLOCKS // 2, seed=50)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=20)
    assert take(remote.buffer, keys) == len(keys)


def test_malformed_messages(served: Served, remote: Remote) -> None:
    """100,000, changed from real ones of each kind."""
    numbers, dealer = random.Random(20_261_128), Dealer(served.server.address)
    namespace, process = remote.planes.current()[1], psutil.Process()
    before = process.memory_info().rss
    for _ in range(200):
        for _ in range(500):
            dealer.send(mutated(msgspec.msgpack.encode(requests_of(namespace, numbers, [])), numbers), 50)
        while dealer.receive(20) is not None:
            pass
    dealer.close()
    assert process.memory_info().rss - before < 100 << 20
    assert served.server.counts["malformed"] > 70_000
    goes_on_serving(served, remote)
    wait_until(served.is_idle, timeout_s=30)


def test_requests_in_any_order(served: Served, remote: Remote) -> None:
    """Well-formed ones, that nobody who means well would send: whatever was taken or reserved comes back."""
    numbers, dealer = random.Random(11), Dealer(served.server.address)
    namespace, seen, kinds = remote.planes.current()[1], [1], set()
    decoder = msgspec.msgpack.Decoder(Any)
    for i in range(3000):
        if i % 50 == 0:
            keys = make_keys(numbers.randrange(1, 10), seed=numbers.randrange(3))
            served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
        request = requests_of(namespace, numbers, seen)
        timeout_ms = numbers.choice([1, 5, 60])
        dealer.send(msgspec.msgpack.encode(request), timeout_ms)
        body = dealer.receive(timeout_ms + 10)  # by then it was answered, or given up
        answer = decoder.decode(body) if body else {}
        kinds.add(answer.get("type"))
        seen += [answer[name] for name in ("selection", "ticket", "pipe") if answer.get(name)]
    dealer.close()
    assert {cls.__name__ for cls in (Joined, Selected, Reserved)} <= kinds
    wait_until(lambda: served.service.usage() == (0, 0, 0), timeout_s=60)
    for item in list(served.buffer._items.values()):
        served.buffer.cancel(item)
    wait_until(served.is_idle, timeout_s=30)
    goes_on_serving(served, remote)
