"""KV from one engine to another: real control channels, real pipes; both ends in this process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from connectors.control import ControlRefusedError
from connectors.curve_keys import CurveKeys, generate
from connectors.hand_over import HandOverScheduler
from connectors.hand_over_told import HandOverConfig
from connectors.pipe import Pipe, PipeClosedError
from connectors.restripe import Restripe
from connectors.testing import IDENTITY, make_keys
from kvstore import DiskTierConfig, KVIdentity
from kvstore.errors import ConfigError
from tests.hand_over import peers
from tests.hand_over.peers import (
    NUM_BLOCKS,
    Engine,
    Remote,
    Served,
    blocks_of,
    by_tcp,
    make_end,
    of_ranks,
    store_config,
    take,
)
from tests.waiting import wait_until

# -- a peer's buffer as a LookupBuffer


def test_what_was_inserted_there_is_taken_here(served: Served, remote: Remote) -> None:
    keys = make_keys(20)
    assert take(remote.buffer, keys) == 0
    assert served.buffer.insert(keys[:15], blocks_of(keys[:15]), timeout_s=0)
    assert take(remote.buffer, keys) == 15
    assert take(remote.buffer, keys) == 0
    wait_until(served.is_idle)
    assert remote.buffer.stats().hit_blocks == 15


def test_what_is_inserted_here_is_taken_there(served: Served, remote: Remote) -> None:
    keys = make_keys(20)
    assert remote.buffer.insert(keys, blocks_of(keys), timeout_s=5)
    out = torch.empty_like(blocks_of(keys))
    assert served.buffer.drop_select(keys, out, timeout_s=0) == 20
    assert torch.equal(out, blocks_of(keys))
    assert served.is_idle()


def test_only_what_the_peer_lacks_is_sent(served: Served, remote: Remote) -> None:
    head = make_keys(8)
    first, second = [*head, *make_keys(8, seed=1)], [*head, *make_keys(8, seed=2)]
    assert remote.buffer.insert(first, blocks_of(first), timeout_s=5)
    assert remote.buffer.insert(second, blocks_of(second), timeout_s=5)
    assert remote.buffer.stats().written_nbytes == 24 * remote.planes.fmt.slot_nbytes
    assert take(remote.buffer, second) == 16
    assert take(remote.buffer, first) == 16
    wait_until(served.is_idle)


def test_nothing_is_sent_of_what_the_peer_has(served: Served, remote: Remote) -> None:
    keys = make_keys(8)
    for _ in range(2):
        assert remote.buffer.insert(keys, blocks_of(keys), timeout_s=5)
    assert remote.buffer.stats().written_nbytes == 8 * remote.planes.fmt.slot_nbytes
    assert take(remote.buffer, keys) == take(remote.buffer, keys) == 8  # inserted twice
    wait_until(served.is_idle)


def test_an_insert_waits_for_room_at_the_peer(served: Served, remote: Remote) -> None:
    first, second = make_keys(20), make_keys(20, seed=1)
    assert remote.buffer.insert(first, blocks_of(first), timeout_s=5)
    start = time.monotonic()
    assert not remote.buffer.insert(second, blocks_of(second), timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert take(remote.buffer, first) == 20
    assert remote.buffer.insert(second, blocks_of(second), timeout_s=5)
    too_many = make_keys(NUM_BLOCKS + 1)
    assert not remote.buffer.insert(too_many, blocks_of(too_many), timeout_s=5)


def test_more_than_this_end_has_room_for(served: Served) -> None:
    small = Remote(served.server.address, num_blocks=4)
    keys = make_keys(30)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    assert take(small.buffer, keys) == 30
    wait_until(served.is_idle)
    small.close()


def test_another_identity_gets_nothing_and_is_told_why(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused a pipe; and what it selects, it selects in its own namespace, where nothing is."""
    other = Remote(served.server.address, KVIdentity(model="conformance", revision="r2", layout=IDENTITY.layout))
    keys = make_keys(4)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    assert take(other.buffer, keys) == 0
    assert served.buffer.usage() == (4, 0)
    assert not other.buffer.insert(keys, blocks_of(keys), timeout_s=5)
    with pytest.raises(ControlRefusedError, match="revision: 'r1' here, 'r2' there"):
        other.peer._joined(time.monotonic() + 5)
    other.close()


def test_bytes_that_changed_on_their_way_are_a_miss(served: Served, remote: Remote) -> None:
    keys = make_keys(10)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    seal = served.planes.seal

    def spoil(slots: Any, *arguments: Any) -> None:
        seal(slots, *arguments)
        served.planes.arena.rows[slots[6], 100] ^= 1

    served.planes.seal = spoil  # type: ignore[method-assign]
    assert take(remote.buffer, keys) == 6
    assert remote.buffer.stats().corrupt_chunks == 1
    wait_until(served.is_idle)


@pytest.mark.parametrize(("there", "here"), [(1, 2), (2, 1)])
def test_a_peer_of_other_ranks(there: int, here: int) -> None:
    """Blocks are cut anew on their way; one that changed is a miss, as ever."""
    served = Served(of_ranks(there))
    remote = Remote(served.server.address, of_ranks(here), their_ranks=there)
    try:
        keys, shape = make_keys(20), IDENTITY.layout.block_shape
        blocks = torch.rand((20, *shape), dtype=torch.float32).to(torch.bfloat16)
        assert served.buffer.insert(keys, blocks, timeout_s=0)
        out = torch.zeros_like(blocks)
        assert remote.buffer.drop_select(keys, out, timeout_s=5) == 20
        rows, wanted = (t.flatten(1).view(torch.uint8).numpy() for t in (blocks, torch.zeros_like(blocks)))
        every = np.arange(20)
        Restripe(of_ranks(here), there, here)(rows, every, wanted, every)
        assert np.array_equal(out.flatten(1).view(torch.uint8).numpy(), wanted)
        assert not np.array_equal(wanted, rows)
        wait_until(served.is_idle)
    finally:
        remote.close()
        served.close()


def test_a_peer_that_dies(served: Served, remote: Remote) -> None:
    keys = make_keys(10)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    assert take(remote.buffer, keys[:2]) == 2
    served.close()
    start = time.monotonic()
    assert take(remote.buffer, keys[2:]) == 0
    assert not remote.buffer.insert(keys, blocks_of(keys), timeout_s=2)
    assert time.monotonic() - start < 8
    assert not remote.peer.is_up


def test_a_pipe_that_breaks_is_made_anew(served: Served, remote: Remote) -> None:
    keys = make_keys(10)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    assert take(remote.buffer, keys[:3]) == 3
    pipe = remote.peer._pipe
    assert isinstance(pipe, Pipe)
    pipe.close()
    with pytest.raises(PipeClosedError):
        list(pipe.recv_slots(torch.arange(1).numpy(), 1.0))
    assert take(remote.buffer, keys[3:6]) == 3
    assert take(remote.buffer, keys[6:]) == 4
    wait_until(served.is_idle, timeout_s=20)


def test_a_consumer_that_dies_gives_its_selection_back(served: Served) -> None:
    remote = Remote(served.server.address)
    keys = make_keys(10)
    assert served.buffer.insert(keys, blocks_of(keys), timeout_s=0)
    assert remote.peer.select(keys, time.monotonic() + 1.0).keys == keys
    remote.close()
    assert served.buffer.usage() == (0, 10)
    wait_until(lambda: served.buffer.usage() == (0, 0))


def test_a_miss_is_answered_in_no_time(served: Served, remote: Remote) -> None:
    keys = make_keys(100)
    out = torch.empty((100, *IDENTITY.layout.block_shape), dtype=torch.bfloat16)
    remote.buffer.drop_select(keys, out, timeout_s=5)
    times = []
    for _ in range(100):
        start = time.monotonic()
        assert remote.buffer.drop_select(keys, out, timeout_s=5) == 0
        times.append(time.monotonic() - start)
    assert sorted(times)[50] < 0.02  # the benchmark holds it to 1 ms


# -- engines


def test_a_prompt_is_handed_over(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = make_engine(), make_engine()
    keys = make_keys(20)
    told = producer.prefill(keys)
    assert consumer.decode("r", keys, told) == 20
    wait_until(lambda: producer.held() == (0, 0))
    producer.wait_unpinned()
    consumer.wait_unpinned()
    assert consumer.half.stats()["peer"]["hit_blocks"] == 20
    assert consumer.half.sources("r", 20) == {"host": 20}  # forgotten


def test_what_is_still_being_stored_is_waited_for(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = make_engine(), make_engine()
    keys = make_keys(20)
    producer.store(keys[:10], range(10))
    producer.step()
    producer.store(keys[10:], range(10, 20))
    plan = producer.end_step()
    told = producer.half.hand_over([keys])
    expected = consumer.half.expect("r", [keys], told)
    assert expected == 20
    for _ in range(20):
        assert consumer.half.lookup("r", [keys], expected=expected) is None
        consumer.step()
        time.sleep(0.005)
    producer.run(plan)
    producer.report()
    assert consumer.decode("r", keys, told or {}) == 20


def test_what_the_consumer_has_itself_is_given_back(make_engine: Callable[..., Engine]) -> None:
    """It asks for what it lacks; the rest must not stay pinned at the producer until the lease ends."""
    producer, consumer = make_engine(), make_engine()
    keys = make_keys(20)
    told = producer.prefill(keys)
    expected = consumer.half.expect("r", [keys], told)
    wait_until(lambda: consumer.half.lookup("r", [keys[12:]], expected=expected - 12) == 8)
    consumer.half.forget("r")
    wait_until(lambda: producer.held() == (0, 0))


def test_requests_that_share_a_prefix_go_to_two_consumers(make_engine: Callable[..., Engine]) -> None:
    producer, consumers = make_engine(), [make_engine(), make_engine()]
    head = make_keys(10)
    prompts = [[*head, *make_keys(8, seed=i)] for i in (1, 2)]
    told = [producer.prefill(keys) for keys in prompts]
    for consumer, keys, hand_over in zip(consumers, prompts, told, strict=True):
        assert consumer.decode("r", keys, hand_over) == 18
    wait_until(lambda: producer.held() == (0, 0))


def test_several_producers(make_engine: Callable[..., Engine]) -> None:
    producers, consumer = [make_engine() for _ in range(3)], make_engine()
    for i, producer in enumerate(producers):
        keys = make_keys(10, seed=i + 1)
        assert consumer.decode(f"r{i}", keys, producer.prefill(keys)) == 10


def test_equal_ranks_at_both_ends(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = make_engine(num_workers=2), make_engine(num_workers=2)
    keys = make_keys(12)
    assert consumer.decode("r", keys, producer.prefill(keys)) == 12


@by_tcp
def test_a_lie_about_ranks_is_a_miss(make_engine: Callable[..., Engine]) -> None:
    """And what is told right afterwards is handed over."""
    producer, consumer = make_engine(identity=of_ranks(1)), make_engine(identity=of_ranks(1))
    keys, others = make_keys(8), make_keys(8, seed=1)
    told = producer.prefill(keys)
    lie = {"kvstore_peer": told["kvstore_peer"] | {"tp_size": 2}}
    assert consumer.decode("r1", keys, lie) == 0
    assert consumer.decode("r2", others, producer.prefill(others)) == 8
    wait_until(lambda: producer.held() == (0, 0))


@by_tcp
def test_nobody_takes_it(make_engine: Callable[..., Engine]) -> None:
    producer = make_engine(lease_s=0.3)
    producer.prefill(make_keys(20))
    assert producer.held() == (20, 0)
    wait_until(lambda: producer.held() == (0, 0))
    producer.wait_unpinned()


def test_a_full_producer_drops_and_the_rest_is_computed(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = make_engine(), make_engine()
    first, second = make_keys(24, seed=1), make_keys(24, seed=2)
    told = producer.prefill(first), producer.prefill(second)
    assert told[1]["kvstore_peer"]["num_blocks"] == NUM_BLOCKS - 24  # so that nobody waits for the others
    assert consumer.decode("r1", first, told[0]) == 24
    assert consumer.decode("r2", second, told[1]) == NUM_BLOCKS - 24


@by_tcp
def test_the_producer_dies_before_it_is_asked(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = Engine(), make_engine()
    keys = make_keys(20)
    told = producer.prefill(keys)
    producer.close()
    start = time.monotonic()
    assert consumer.decode("r", keys, told) == 0
    assert time.monotonic() - start < 10
    consumer.wait_unpinned()


@by_tcp
def test_after_a_reset_nothing_is_handed_over(make_engine: Callable[..., Engine]) -> None:
    producer, consumer = make_engine(), make_engine()
    keys = make_keys(10)
    told = producer.prefill(keys)
    producer.half.reset()
    assert consumer.decode("r", keys, told) == 0
    wait_until(lambda: producer.held() == (0, 0))


@pytest.mark.parametrize(
    "change",
    [
        {"address": "tcp://192.0.2.1:5"},
        {"address": "ipc:///tmp/x"},
        {"address": 7},
        {"key": "x" * 40},
        {"num_blocks": -1},
        {"num_blocks": True},
        {"tp_size": 0},
        {"tp_size": 1 << 40},
        {"tp_size": 3},  # of which there is no way here
        {"id": "x"},
        {"id": 0},  # anybody's
        {"namespace": "00" * 16},
    ],
    ids=str,
)
def test_what_is_no_hand_over_is_not_waited_for(make_engine: Callable[..., Engine], change: dict[str, Any]) -> None:
    """Whoever sends a request must not choose where this server connects to."""
    producer, consumer = make_engine(), make_engine()
    keys = make_keys(4)
    told = {"kvstore_peer": {**producer.prefill(keys)["kvstore_peer"], **change}}
    assert consumer.half.expect("r", [keys], told) == (4 if change.get("key") else 0)
    assert consumer.half.expect("r2", [keys], {"kvstore_peer": 5}) == 0
    assert consumer.half.expect("r3", [keys], None) == 0


@pytest.fixture
def keys_of_three(tmp_path: Path) -> list[CurveKeys]:
    """The first two know each other, the third knows both."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        generate(folder, folder.name)
    for mine, others in (("a", "b"), ("b", "a"), ("c", "ab")):
        for other in others:
            (tmp_path / mine / "peers").mkdir(exist_ok=True)
            (tmp_path / mine / "peers" / f"{other}.key").write_text((tmp_path / other / "public.key").read_text())
    return [CurveKeys.load(folder) for folder in folders]


@by_tcp
def test_peers_that_know_each_other(make_engine: Callable[..., Engine], keys_of_three: list[CurveKeys]) -> None:
    producer, consumer, stranger = (make_engine(keys=keys) for keys in keys_of_three)
    keys = make_keys(10)
    told = producer.prefill(keys)
    assert told["kvstore_peer"]["key"] == keys_of_three[0].public
    start = time.monotonic()
    assert stranger.decode("r", keys, told) == 0
    assert time.monotonic() - start < 10
    assert producer.held() == (10, 0)
    assert consumer.decode("r", keys, told) == 10


@by_tcp
def test_a_producer_whose_key_is_not_let_in_is_not_asked(
    make_engine: Callable[..., Engine], keys_of_three: list[CurveKeys]
) -> None:
    stranger, consumer = make_engine(keys=keys_of_three[2]), make_engine(keys=keys_of_three[0])
    keys = make_keys(10)
    assert consumer.half.expect("r", [keys], stranger.prefill(keys)) == 0
    assert not consumer.half._peers._connections


@by_tcp
def test_a_request_that_names_anothers_key_is_no_hindrance(
    make_engine: Callable[..., Engine], keys_of_three: list[CurveKeys]
) -> None:
    a, b, c = keys_of_three
    producer, consumer = make_engine(keys=replace(a, peers={"c": c.public})), make_engine(keys=c)
    keys = make_keys(10)
    told = producer.prefill(keys)
    wrong = {"kvstore_peer": {**told["kvstore_peer"], "key": b.public}}  # which is let in
    assert consumer.half.expect("wrong", [keys], wrong) == 10
    consumer.half.forget("wrong")
    assert consumer.decode("right", keys, told) == 10


def test_wrong_settings(tmp_path: Path) -> None:
    hand_over = HandOverConfig(transport=peers.chosen, make_end=make_end)
    with pytest.raises(ConfigError, match="blocks_per_chunk: 2"):
        HandOverScheduler(store_config(blocks_per_chunk=2), 1, hand_over=hand_over)
    disk = DiskTierConfig(path=str(tmp_path), capacity_nbytes=8 << 20)
    with pytest.raises(ConfigError, match="disk, shared"):
        HandOverScheduler(store_config(disk=disk), 1, hand_over=hand_over)
    with pytest.raises(ConfigError, match="listen"):
        HandOverScheduler(
            store_config(),
            1,
            hand_over=HandOverConfig(transport=peers.chosen, make_end=make_end, listen="tcp://0.0.0.0:0"),
        )
