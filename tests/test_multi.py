"""Several connectors as one: who loads, what is stored, and what happens when one of them fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from connectors.base import Stripe
from connectors.multi import MultiScheduler, MultiWorker
from connectors.offloading import OffloadingScheduler
from connectors.offloading_worker import OffloadingWorker
from connectors.shared_storage import SharedStorageScheduler
from connectors.testing import IDENTITY, PagedEngine, make_caches, make_keys
from kvstore import BlockKey, HostTierConfig, SharedTierConfig, StoreConfig

Children = list[OffloadingScheduler]


def config(shared: Path | None = None, *, per_chunk: int = 1) -> StoreConfig:
    return StoreConfig(
        identity=IDENTITY,
        host=HostTierConfig(num_blocks=32),
        shared=SharedTierConfig(path=str(shared), capacity_nbytes=64 << 20) if shared else None,
        blocks_per_chunk=per_chunk,
        put_timeout_s=0.0,
        event_log_blocks=1000,
    )


def engine_of(children: Children, per_chunk: int = 1) -> PagedEngine:
    caches = make_caches()
    workers = [OffloadingWorker(Stripe(0, 1), caches[0], child.config.blocks_per_chunk) for child in children]
    return PagedEngine(MultiScheduler(children, per_chunk), [MultiWorker(workers)], caches)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[PagedEngine]:
    """Memory; and memory over a shared path."""
    engine = engine_of([OffloadingScheduler(config(), 1), SharedStorageScheduler(config(tmp_path / "shared"), 1)])
    yield engine
    engine.close()


@pytest.fixture
def children(engine: PagedEngine) -> Children:
    return engine.scheduler.children  # type: ignore[attr-defined]


def store_at(engine: PagedEngine, child: int, keys: list[BlockKey]) -> None:
    """Something that one child has and the others do not."""
    multi = engine.scheduler
    others = [c for i, c in enumerate(multi.children) if i != child]  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        for other in others:
            patch.setattr(other, "store", lambda keys, blocks: None)
        engine.store(keys, range(len(keys)))
        engine.settle()


def has(children: Children) -> list[int]:
    return [child.stats()["host"]["used_blocks"] for child in children]


def hits(children: Children) -> list[int]:
    return [child.stats()["host"]["hit_blocks"] for child in children]


def broken(*_: object, **__: object) -> Any:
    raise OSError("broken by a test")


# -- who loads


@pytest.mark.parametrize("longer", [0, 1])
def test_the_longest_prefix_loads(engine: PagedEngine, children: Children, longer: int) -> None:
    keys = make_keys(8)
    store_at(engine, 1 - longer, keys[:2])
    store_at(engine, longer, keys[:6])
    assert engine.lookup("r", keys) == 6
    engine.load("r", range(20, 26))
    engine.step()
    assert hits(children)[longer] == 6
    assert hits(children)[1 - longer] == 0
    assert engine.scheduler.sources("r", 6) == {"host": 6}
    engine.wait_unpinned()


def test_of_two_that_have_as_much_the_first_loads(engine: PagedEngine, children: Children) -> None:
    keys = make_keys(4)
    engine.store(keys, range(4))
    engine.settle()
    assert engine.lookup("r", keys) == 4
    engine.load("r", range(20, 24))
    engine.step()
    assert hits(children) == [4, 0]


def test_it_waits_for_a_child_that_may_have_more(engine: PagedEngine, children: Children) -> None:
    keys = make_keys(8)
    store_at(engine, 0, keys[:2])
    store_at(engine, 1, keys)
    assert children[1].flush(10)
    children[1]._planes.forget_host()
    assert engine.lookup("r", keys) == 8
    engine.load("r", range(20, 28))
    engine.step()
    assert engine.scheduler.sources("r", 8) == {"shared": 8}


def test_it_waits_for_none_that_cannot_have_more(
    engine: PagedEngine, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = make_keys(4)
    store_at(engine, 1, keys)
    monkeypatch.setattr(children[0], "lookup", lambda *_, **__: None)
    assert engine.ask("r", keys) == 4
    engine.load("r", range(20, 24))
    engine.step()
    assert engine.ask("r", make_keys(8)) is None
    with pytest.raises(ValueError, match="nothing is promised to r"):
        engine.load("r", [20])


def test_only_who_was_told_waits_for_what_is_handed_over(engine: PagedEngine, children: Children) -> None:
    """The engine has the first block itself, and so asks for those behind it."""
    keys = make_keys(6)
    store_at(engine, 1, keys)
    told = children[1].hand_over([keys])
    assert engine.scheduler.hand_over([keys]) == told
    assert engine.scheduler.expect("r", [keys], told) == 6
    asked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        for child in children:
            patch.setattr(child, "lookup", lambda request_id, keys, *, expected: asked.append(expected))
        engine.scheduler.lookup("r", [keys[1:]], expected=5)
        engine.scheduler.forget("r")
        engine.scheduler.lookup("r", [keys[1:]], expected=3)
    assert asked == [-1, 5, 3, 3]


def test_an_abort_leaves_nothing_at_any_child(engine: PagedEngine, children: Children) -> None:
    keys = make_keys(4)
    engine.store(keys, range(4))
    engine.settle()
    engine.wait_unpinned()
    assert engine.lookup("r", keys) == 4
    assert [child.stats()["host"]["pinned_blocks"] for child in children] == [4, 4]
    engine.forget("r")
    assert [child.stats()["host"]["pinned_blocks"] for child in children] == [0, 0]
    engine.lookup("s", keys)
    engine.load("s", range(20, 24))
    engine.step()  # what the other had promised is over too
    assert [child.stats()["host"]["pinned_blocks"] for child in children] == [0, 0]
    for request_id in ("r", "s"):
        engine.forget(request_id)
    state = {name: value for name, value in vars(engine.scheduler).items() if name not in ("children", "_per_chunk")}
    assert not any(state.values())


# -- what is stored


def test_what_was_just_loaded_is_not_stored_back(engine: PagedEngine, children: Children) -> None:
    keys = make_keys(8)
    store_at(engine, 1, keys[:5])
    for request_id in ("r", "s"):
        assert engine.lookup(request_id, keys) == 5
        engine.load(request_id, range(20, 25))
        engine.step()
    engine.store(keys, range(20, 28))  # all that the request has now, three of them computed
    engine.settle()
    assert has(children) == [3, 8]
    engine.forget("r")
    engine.store(keys, range(20, 28))  # another one goes on
    engine.settle()
    assert has(children) == [3, 8]
    engine.forget("s")
    engine.store(keys, range(20, 28))  # by one who has computed them
    engine.settle()
    assert has(children) == [8, 8]


def test_what_the_engine_had_itself_is_stored(engine: PagedEngine, children: Children) -> None:
    """Blocks 0 and 1 were in the engine's own cache, 2 to 4 are loaded, the rest is computed."""
    keys = make_keys(8)
    store_at(engine, 1, keys[2:5])
    assert engine.lookup("r", keys[2:]) == 3
    engine.load("r", range(22, 25))
    engine.step()
    engine.store(keys, range(20, 28))
    engine.settle()
    assert has(children) == [5, 8]
    assert children[0].lookup("s", [keys]) == 2


def test_after_a_reset_all_is_stored_again(engine: PagedEngine, children: Children) -> None:
    keys = make_keys(4)
    engine.store(keys, range(4))
    engine.settle()
    assert engine.lookup("r", keys) == 4
    engine.load("r", range(20, 24))
    engine.step()
    engine.scheduler.reset()
    engine.store(keys, range(4))
    engine.settle()
    assert engine.lookup("s", keys) == 4
    assert [child.lookup("t", [keys]) for child in children] == [4, 4]


def test_chunks_begin_where_they_did() -> None:
    """Six blocks are loaded from a child without chunks; the other stores the chunk that has new ones, whole."""
    engine = engine_of([OffloadingScheduler(config(), 1), OffloadingScheduler(config(per_chunk=4), 1)], per_chunk=4)
    children: Children = engine.scheduler.children  # type: ignore[attr-defined]
    try:
        keys = make_keys(8)
        store_at(engine, 0, keys[:6])
        assert engine.lookup("r", keys) == 6
        engine.load("r", range(20, 26))
        engine.step()
        engine.store(keys, range(20, 28))
        engine.settle()
        assert has(children) == [8, 4]
        assert children[1].lookup("s", [keys[4:]]) == 4
    finally:
        engine.close()


# -- when one fails


def test_a_child_that_fails_is_left_out(
    engine: PagedEngine, children: Children, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = make_keys(4)
    for name in ("begin", "lookup", "store", "stats", "take_events"):
        monkeypatch.setattr(children[0], name, broken)
    engine.begin("r", keys)
    engine.store(keys, range(4))
    engine.settle()
    assert engine.lookup("r", keys) == 4
    engine.load("r", range(20, 24))
    engine.step()
    engine.settle()
    assert list(engine.scheduler.stats()) == ["host.1", "shared.1"]
    assert {event.tier for event in engine.scheduler.take_events()} <= {"host.1", "shared.1"}
    assert "connector 0 (OffloadingScheduler) failed, and is left out" in caplog.text


def test_where_all_fail_nothing_is_found(
    engine: PagedEngine, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    for child in children:
        monkeypatch.setattr(child, "lookup", broken)
    assert engine.ask("r", make_keys(4)) == 0


@pytest.mark.parametrize("call", [lambda half: half.reset(), lambda half: half.end_step()], ids=["reset", "end_step"])
def test_what_would_give_wrong_answers_is_told(
    engine: PagedEngine,
    children: Children,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    call: Callable[[MultiScheduler], object],
) -> None:
    keys = make_keys(4)
    engine.store(keys, range(4))
    engine.settle()
    monkeypatch.setattr(children[0], request.node.callspec.id, broken)
    with pytest.raises(OSError, match="broken by a test"):
        call(engine.scheduler)  # type: ignore[arg-type]
    if request.node.callspec.id == "reset":
        assert children[1].lookup("r", [keys]) in (None, 0)  # the others are reset all the same


def test_a_close_that_fails_keeps_none_open(
    engine: PagedEngine, children: Children, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    closed = []
    with monkeypatch.context() as patch:
        for half in (engine.scheduler, engine.workers[0]):
            first, second = half.children  # type: ignore[attr-defined]
            patch.setattr(first, "close", broken)
            patch.setattr(second, "close", lambda second=second: closed.append(second))
            half.close()
            assert closed.pop() is second
    assert "connector 0 (OffloadingScheduler) failed" in caplog.text
    assert "connector 0 (OffloadingWorker) could not be closed" in caplog.text


# -- names


def test_tiers_are_told_apart(engine: PagedEngine) -> None:
    engine.store(make_keys(4), range(4))
    engine.settle()
    stats = engine.scheduler.stats()
    assert list(stats) == ["host", "host.1", "shared.1"]
    assert [fields["name"] for fields in stats.values()] == list(stats)
    assert {"host", "host.1"} <= {event.tier for event in engine.scheduler.take_events()}


def test_at_least_one() -> None:
    with pytest.raises(ValueError, match="at least one connector"):
        MultiScheduler([])
