"""What comes into tiers and what leaves them, as a router of requests sees it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kvstore import BlockKey, DiskTierConfig, HostTierConfig, SharedTierConfig, StoreConfig, TieredStore
from kvstore.events import EventLog, TierEvent
from tests.stores import IDENTITY, make_blocks, make_keys


def config(path: Path, io: str, **settings: object) -> StoreConfig:
    return StoreConfig(
        identity=IDENTITY,
        host=HostTierConfig(num_blocks=16),
        disk=DiskTierConfig(path=str(path / "disk"), num_blocks=32),
        shared=SharedTierConfig(path=str(path / "shared"), capacity_nbytes=8 << 20),
        io=io,  # type: ignore[arg-type]
        **{"event_log_blocks": 4096, **settings},  # type: ignore[arg-type]
    )


class Router:
    """Knows of each tier what events have told it."""

    def __init__(self) -> None:
        self.found: dict[str, set[BlockKey]] = {"host": set(), "disk": set(), "shared": set()}

    def follow(self, store: TieredStore) -> None:
        assert store.flush()
        for event in store.take_events():
            known = self.found[event.tier]
            if event.kind == "stored":
                known.update(event.keys)
            else:
                known.difference_update(event.keys)


@pytest.mark.parametrize("io", ["thread", "process"])
def test_who_follows_the_events_knows_what_is_where(tmp_path: Path, io: str) -> None:
    router = Router()
    with TieredStore(config(tmp_path, io)) as store:
        keys = [make_keys(8, seed) for seed in range(8)]
        for seed in range(8):
            assert store.put(keys[seed], make_blocks(8, seed)) == 8
            router.follow(store)
        assert len(router.found["host"]) == 16
        assert 0 < len(router.found["disk"]) <= 32
        assert len(router.found["shared"]) == 64
        for of_one in keys:
            assert set(of_one) <= router.found["shared"]
            in_host = store._planes.manager.prefix_hit(of_one)
            assert router.found["host"].issuperset(of_one[:in_host])
            assert router.found["host"].isdisjoint(of_one[in_host:])
        store.purge(keys[7])
        router.follow(store)
        assert router.found["host"].isdisjoint(keys[7])
        assert router.found["disk"].isdisjoint(keys[7])
        store.reset()
        router.follow(store)
        assert not router.found["host"] | router.found["disk"]


def test_what_lies_on_disk_is_told_at_the_start(tmp_path: Path) -> None:
    with TieredStore(config(tmp_path, "thread")) as store:
        store.put(make_keys(8), make_blocks(8))
        assert store.flush()
    router = Router()
    with TieredStore(config(tmp_path, "thread")) as store:
        router.follow(store)
    assert router.found["disk"] == set(make_keys(8))


def test_nobody_asks_nothing_is_kept(tmp_path: Path) -> None:
    with TieredStore(config(tmp_path, "thread", event_log_blocks=0)) as store:
        store.put(make_keys(8), make_blocks(8))
        assert store.take_events() == []


def test_what_is_not_taken_in_time_is_lost_oldest_first() -> None:
    log = EventLog(10)
    for i in range(4):
        log.add(TierEvent("stored", str(i), np.full(36 * 4, i, dtype=np.uint8).tobytes()))
    assert [(event.tier, len(event)) for event in log.take()] == [("2", 4), ("3", 4)]
    assert log.num_lost == 8
    assert log.take() == []
