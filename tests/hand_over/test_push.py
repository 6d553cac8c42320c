"""Pushes: what is inserted at a consumer before it asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from connectors.remote_peer import RemotePeer
from connectors.testing import make_keys
from tests.hand_over.peers import NUM_BLOCKS, Engine, by_tcp, is_idle, number_of
from tests.waiting import wait_until


def test_a_prompt_is_pushed(make_engine: Callable[..., Engine]) -> None:
    """It is in the consumer's memory before that asks, and goes once."""
    producer, consumer = make_engine(push=True), make_engine(hands_over=False)
    keys = make_keys(20)
    told = producer.prefill(keys, consumer)
    assert told["kvstore_peer"]["is_pushed"]
    wait_until(lambda: consumer.held() == (20, 0))
    wait_until(lambda: is_idle(producer))
    producer.wait_unpinned()
    assert consumer.decode("r", keys, told) == 20
    assert consumer.half.stats()["peer"]["read_nbytes"] == 0
    assert is_idle(consumer)
    consumer.wait_unpinned()
    assert consumer.lookup("again", keys) == 20  # it stays, as any other


def test_who_asks_during_a_push_waits_for_it(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = make_engine(push=True), make_engine(hands_over=False)
    keys, begun, go_on = make_keys(20), threading.Event(), threading.Event()
    insert = RemotePeer.insert

    def slow(self: RemotePeer, *arguments: Any, **settings: Any) -> bool:
        begun.set()
        assert go_on.wait(20)
        return insert(self, *arguments, **settings)

    monkeypatch.setattr(RemotePeer, "insert", slow)
    told = producer.prefill(keys, consumer)
    assert begun.wait(20)
    threading.Timer(0.3, go_on.set).start()
    assert consumer.decode("r", keys, told) == 20
    assert consumer.half.stats()["peer"]["read_nbytes"] == 0
    wait_until(lambda: is_idle(producer) and is_idle(consumer))


def test_what_cannot_be_pushed_is_pulled(make_engine: Callable[..., Engine]) -> None:
    """The consumer has no room for it when it comes, and has later."""
    producer, consumer = make_engine(push=True), make_engine()
    other = make_keys(NUM_BLOCKS, seed=9)
    held = consumer.prefill(other)  # all its memory is
    keys = make_keys(20)
    told = producer.prefill(keys, consumer)
    wait_until(lambda: producer.half._pushes.under_way(number_of(told)) is None and producer.held() == (20, 0))
    consumer.half._buffer.forget(number_of(held))
    assert consumer.decode("r", keys, told) == 20
    assert consumer.half.stats()["peer"]["read_nbytes"] > 0
    wait_until(lambda: is_idle(producer) and is_idle(consumer))


def test_a_push_goes_to_another_than_the_one_who_decodes(make_engine: Callable[..., Engine]) -> None:
    """Who decodes computes; nothing is left anywhere but for the lease."""
    producer, first, second = make_engine(push=True), make_engine(lease_s=0.5), make_engine()
    keys = make_keys(20)
    told = producer.prefill(keys, first)
    wait_until(lambda: first.held() == (20, 0) and is_idle(producer))
    assert second.decode("r", keys, told) == 0
    wait_until(lambda: is_idle(first))
    first.wait_unpinned()


@by_tcp
def test_the_consumer_is_gone_when_it_is_pushed_to(make_engine: Callable[..., Engine]) -> None:
    producer, consumer, another = make_engine(push=True, lease_s=3.0), Engine(), make_engine()
    consumer.close()
    keys = make_keys(20)
    told = producer.prefill(keys, consumer)
    assert another.decode("r", keys, told) in (0, 20)  # its wait may have ended before the push did
    wait_until(lambda: is_idle(producer))
    producer.wait_unpinned()


def test_a_producer_closes_while_it_pushes(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = Engine(push=True), make_engine(lease_s=0.5)
    keys = make_keys(20)
    producer.store(keys[:10], range(10))
    producer.step()
    producer.store(keys[10:], range(10, 20))
    producer.end_step()  # what it waits for never comes
    assert producer.half.hand_over([keys], {"kvstore_push_to": {"address": consumer.half.address, "key": ""}})
    start = time.monotonic()
    producer.close()
    assert time.monotonic() - start < 5
    wait_until(lambda: is_idle(consumer))


@pytest.mark.parametrize(
    "told",
    [None, 7, {}, {"address": "tcp://192.0.2.1:5", "key": ""}, {"address": 7, "key": ""}, {"address": "x", "key": "y"}],
    ids=str,
)
def test_what_names_no_consumer_is_not_pushed(make_engine: Callable[..., Engine], told: object) -> None:
    producer, consumer = make_engine(push=True), make_engine()
    keys = make_keys(5)
    producer.store(keys, range(5))
    producer.step()
    answer = producer.half.hand_over([keys], {"kvstore_push_to": told})
    assert answer is not None and not answer["kvstore_peer"]["is_pushed"]
    assert consumer.decode("r", keys, answer) == 5
