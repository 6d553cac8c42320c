"""A hand-over: what a producer is about to have on a shared path is waited for, and for so long only."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from connectors.base import Stripe
from connectors.offloading_worker import OffloadingWorker
from connectors.shared_storage import SharedStorageScheduler
from kvstore import BlockKey, HostTierConfig, KVIdentity, KVLayout, SharedTierConfig, StoreConfig
from kvstore.errors import ConfigError
from kvstore.keys import hash_blocks
from tests.waiting import wait_until

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
KEYS = hash_blocks(list(range(32)), block_size=4, identity=IDENTITY)


def config(path: Path | None, *, load_timeout_s: float = 5.0, revision: str = "r1") -> StoreConfig:
    return StoreConfig(
        identity=KVIdentity(model="m", revision=revision, layout=LAYOUT),
        host=HostTierConfig(num_blocks=32),
        shared=SharedTierConfig(path=str(path), capacity_nbytes=8 << 20) if path else None,
        load_timeout_s=load_timeout_s,
        put_timeout_s=0.0,
    )


@pytest.fixture
def producer(tmp_path: Path) -> Iterator[SharedStorageScheduler]:
    half = SharedStorageScheduler(config(tmp_path), 1)
    yield half
    half.close()


@pytest.fixture
def consumer(tmp_path: Path) -> Iterator[SharedStorageScheduler]:
    half = SharedStorageScheduler(config(tmp_path, load_timeout_s=1.0), 1)
    yield half
    half.close()


def store(half: SharedStorageScheduler, keys: list[BlockKey]) -> None:
    worker = OffloadingWorker(Stripe(0, 1), [list(torch.ones((2, 8, LAYOUT.layer_nbytes), dtype=torch.uint8))], 1)
    half.store([keys], [list(range(len(keys)))])
    worker.store(half.end_step())
    half.reported(worker.take_reports())
    worker.close()


def told_by(half: SharedStorageScheduler) -> dict[str, Any]:
    """What a producer hands over that has reserved slots for six blocks, and not filled them yet."""
    half._filling.update(KEYS[:6])
    told = half.hand_over([KEYS])
    assert told is not None
    half._filling.clear()
    return told


def ask(half: SharedStorageScheduler, request: str, expected: int) -> int | None:
    answer = half.lookup(request, [KEYS], expected=expected)
    half.end_step(wait_s=0.002)
    return answer


def test_what_is_expected_is_waited_for(producer: SharedStorageScheduler, consumer: SharedStorageScheduler) -> None:
    expected = consumer.expect("r", [KEYS], told_by(producer))
    assert expected == 6
    asked = [ask(consumer, "r", expected) for _ in range(20)]
    assert asked == [None] * 20
    store(producer, KEYS[:2])
    assert producer.flush(10)
    asked = [ask(consumer, "r", expected) for _ in range(20)]
    assert asked == [None] * 20
    store(producer, KEYS[:6])
    answers: list[int | None] = []
    wait_until(lambda: answers.append(ask(consumer, "r", expected)) or answers[-1] is not None)
    assert answers[-1] == 6


def test_what_was_dropped_is_not_handed_over(producer: SharedStorageScheduler) -> None:
    assert producer.hand_over([KEYS]) is None
    store(producer, KEYS[:3])
    told = producer.hand_over([KEYS])
    assert told is not None
    assert told["kvstore"]["num_blocks"] == 3


def test_what_never_comes_is_waited_for_until_the_deadline(consumer: SharedStorageScheduler) -> None:
    start = time.monotonic()
    while (answer := ask(consumer, "r", 6)) is None:
        assert time.monotonic() - start < 20
    assert answer == 0
    assert time.monotonic() - start >= 1.0
    assert ask(consumer, "r", 6) == 0  # and not again


def test_who_waits_holds_up_nobody(producer: SharedStorageScheduler, consumer: SharedStorageScheduler) -> None:
    """More wait than there are threads; another request's prefix comes up meanwhile."""
    others = hash_blocks(list(range(1000, 1032)), block_size=4, identity=IDENTITY)
    store(producer, others)
    assert producer.flush(10)
    for i in range(20):
        keys = hash_blocks([5000 + i, *range(31)], block_size=4, identity=IDENTITY)
        assert consumer.lookup(f"waits-{i}", [keys], expected=8) is None
    answers: list[int | None] = []
    wait_until(lambda: answers.append(consumer.lookup("r", [others])) or answers[-1] is not None)
    assert answers[-1] == 8
    assert consumer.lookup(
        "waits-0", [hash_blocks([5000, *range(31)], block_size=4, identity=IDENTITY)], expected=8
    ) in (None, 0)


@pytest.mark.parametrize(
    "told",
    [
        None,
        {},
        {"kvstore": 7},
        {"kvstore": {}},
        {"kvstore": {"namespace": "00" * 16, "num_blocks": 6}},
        {"kvstore": {"namespace": None, "num_blocks": 6}},
        {"num_blocks": True},
        {"num_blocks": -1},
        {"num_blocks": 1 << 40},
        {"num_blocks": "6"},
        {"num_blocks": 6.5},
    ],
)
def test_what_is_no_hand_over_of_ours_is_not_waited_for(
    told: dict[str, Any] | None, producer: SharedStorageScheduler, consumer: SharedStorageScheduler
) -> None:
    if told is not None and "num_blocks" in told:
        told = {"kvstore": {**told_by(producer)["kvstore"], **told}}
    assert consumer.expect("r", [KEYS], told) == 0


def test_another_models_hand_over_is_not_waited_for(tmp_path: Path, producer: SharedStorageScheduler) -> None:
    other = SharedStorageScheduler(config(tmp_path, revision="r2"), 1)
    assert other.expect("r", [KEYS], told_by(producer)) == 0
    other.close()


def test_a_path_is_needed() -> None:
    with pytest.raises(ConfigError, match="shared: not set"):
        SharedStorageScheduler(config(None), 1)
