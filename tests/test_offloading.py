"""The halves of the offloading connector, without an engine: a paged cache of our own stands for its memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from connectors.base import Stripe
from connectors.offloading import OffloadingScheduler
from connectors.offloading_worker import OffloadingWorker
from connectors.pages import PageCopier
from kvstore import BlockKey, DiskTierConfig, HostTierConfig, KVIdentity, KVLayout, SharedTierConfig, StoreConfig
from kvstore.io_service import Located
from kvstore.keys import hash_blocks
from tests.waiting import wait_until

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
NUM_BLOCKS = 32  # of an engine's cache
PAGE_NBYTES = LAYOUT.layer_nbytes


def broken(*_: object) -> None:
    raise OSError("broken by a test")


def make_keys(n: int, seed: int = 0) -> list[BlockKey]:
    return hash_blocks([seed * 100_000 + i for i in range(n * 4)], block_size=4, identity=IDENTITY)


class Engine:
    """One scheduler and its workers, in step."""

    def __init__(
        self,
        path: Path | None,
        *,
        host_blocks: int = 64,
        per_chunk: int = 1,
        num_workers: int = 1,
        windows: tuple[int | None, ...] = (None,),
        num_replicas: int = 1,
    ) -> None:
        self.scheduler = OffloadingScheduler(
            StoreConfig(
                identity=IDENTITY,
                host=HostTierConfig(num_blocks=host_blocks),
                disk=DiskTierConfig(path=str(path / "disk"), capacity_nbytes=8 << 20) if path else None,
                shared=SharedTierConfig(path=str(path / "shared"), capacity_nbytes=8 << 20) if path else None,
                blocks_per_chunk=per_chunk,
                io="process" if path else "thread",
                put_timeout_s=0.0,
            ),
            num_workers,
            windows,
        )
        page = PAGE_NBYTES * num_replicas // num_workers
        self.windows = windows
        self.caches = [torch.zeros((3, NUM_BLOCKS, page), dtype=torch.uint8) for _ in range(num_workers)]
        self.workers = [
            OffloadingWorker(
                Stripe.of_rank(rank, num_workers, num_replicas),
                [list(cache[: 3 - group]) for group in range(len(windows))],  # of unequal numbers of layers
                per_chunk,
            )
            for rank, cache in enumerate(self.caches)
        ]

    def of_groups(self, keys: list[BlockKey]) -> list[list[BlockKey]]:
        return [[BlockKey.of(key.block_hash, group) for key in keys] for group in range(len(self.windows))]

    def begin(self, request: str, keys: list[BlockKey]) -> None:
        self.scheduler.begin(request, self.of_groups(keys))

    def load(self, request: str, *blocks: Sequence[int | None]) -> None:
        self.scheduler.load(request, blocks)

    def store(self, keys: list[BlockKey], *blocks: Sequence[int | None]) -> None:
        self.scheduler.store(self.of_groups(keys), blocks)

    def fill(self, blocks: list[int], seed: int) -> torch.Tensor:
        """Compute something into blocks; what each of them holds then, (workers, layers, n, page)."""
        generator = torch.Generator().manual_seed(seed)
        for cache in self.caches:
            cache[:, blocks] = torch.randint(256, (3, len(blocks), cache.shape[2]), generator=generator).to(torch.uint8)
        return self.content(blocks)

    def content(self, blocks: list[int]) -> torch.Tensor:
        return torch.stack([cache[:, blocks] for cache in self.caches])

    def step(self) -> None:
        step = self.scheduler.end_step()
        for worker in self.workers:
            worker.load(step)
            worker.store(step)
        self.report()

    def report(self) -> None:
        for worker in self.workers:
            self.scheduler.failed(worker.take_failed_jobs())
            self.scheduler.reported(worker.take_reports())

    def lookup(self, request: str, keys: list[BlockKey], *, expected: int = 0) -> int:
        """Ask, step by step, until there is an answer."""
        answers: list[int | None] = []

        def answered() -> bool:
            answers.append(self.scheduler.lookup(request, self.of_groups(keys), expected=expected))
            if answers[-1] is None:
                self.step()
            return answers[-1] is not None

        wait_until(answered)
        assert answers[-1] is not None
        return answers[-1]

    def pinned(self) -> int:
        return self.scheduler.stats()["host"]["pinned_blocks"]

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.scheduler.close()


@pytest.fixture(params=[(1, 1), (4, 1), (1, 2), (2, 2)], ids=lambda p: f"chunks of {p[0]}, {p[1]} workers")
def shape(request: pytest.FixtureRequest) -> tuple[int, int]:
    per_chunk, num_workers = request.param
    return per_chunk, num_workers


@pytest.fixture
def engine(shape: tuple[int, int]) -> Iterator[Engine]:
    engine = Engine(None, per_chunk=shape[0], num_workers=shape[1])
    yield engine
    engine.close()


def test_what_was_stored_is_loaded_into_other_blocks(engine: Engine) -> None:
    keys, stored = make_keys(8), engine.fill(list(range(8)), seed=1)
    engine.store(keys, list(range(8)))
    assert engine.scheduler.has_open_jobs()
    engine.step()
    assert not engine.scheduler.has_open_jobs()
    engine.fill(list(range(NUM_BLOCKS)), seed=2)
    assert engine.lookup("r", [*keys, *make_keys(2, seed=9)]) == 8
    engine.load("r", [20, 11, 25, 13, 9, 8, 31])  # seven of the eight
    engine.step()
    assert torch.equal(engine.content([20, 11, 25, 13, 9, 8, 31]), stored[:, :, :7])
    assert engine.pinned() == 0


def test_a_hit_begins_in_the_engines_own_cache_and_goes_on_in_ours(engine: Engine) -> None:
    keys, stored = make_keys(8), engine.fill(list(range(8)), seed=1)
    engine.store(keys, list(range(8)))
    engine.step()
    assert engine.lookup("r", keys[3:]) == 5
    engine.load("r", [10, 11, 12, 13, 14])
    engine.step()
    assert torch.equal(engine.content([10, 11, 12, 13, 14]), stored[:, :, 3:])


def test_nothing_is_found_before_it_has_been_copied(engine: Engine) -> None:
    engine.store(make_keys(4), [0, 1, 2, 3])
    assert engine.lookup("r", make_keys(4)) == 0
    engine.step()
    assert engine.lookup("r", make_keys(4)) == 4


def test_of_a_sliding_window_only_the_last_blocks_are_needed_and_loaded(tmp_path: Path) -> None:
    """Group 1 reads two blocks back, group 2 one; the engine has given their older blocks away."""
    engine = Engine(tmp_path, windows=(None, 2, 1))
    try:
        keys = make_keys(8)
        engine.fill(list(range(24)), seed=1)
        engine.store(keys, list(range(8)), [None] * 2 + [8, 9, 10, 11, 12, 13], [None] * 3 + [14, 15, 16, 17, 18])
        stored = [engine.content([7]), engine.content([12, 13])[:, :2], engine.content([18])[:, :1]]
        engine.step()
        for is_in_host in (True, False):
            if not is_in_host:
                assert engine.scheduler.flush(30)
                engine.scheduler._planes.forget_host()
                engine.scheduler.forget("r")
            engine.fill(list(range(NUM_BLOCKS)), seed=2)
            assert engine.lookup("r", [*keys, *make_keys(1, seed=9)]) == 8
            engine.load("r", list(range(8)), [None] * 6 + [20, 21], [None] * 7 + [30])
            engine.step()
            loaded = [engine.content([7]), engine.content([20, 21])[:, :2], engine.content([30])[:, :1]]
            assert all(torch.equal(*pair) for pair in zip(loaded, stored, strict=True))
        assert engine.lookup("s", keys[:3]) == 0  # group 2 has its last block of no shorter prefix than four
        assert engine.lookup("s", keys[:5]) == 5
        assert engine.lookup("s", [*keys[:3], *make_keys(1, seed=9)]) == 0
        assert engine.lookup("s", keys[:5]) == 5
        with pytest.raises(ValueError, match="blocks 2 to 2 of group 1 are to be loaded; promised were 3 to 4"):
            engine.load("s", list(range(5)), [None] * 2 + [20] + [None] * 2, [None] * 5)
        engine.step()
        assert engine.pinned() == 0
    finally:
        engine.close()


@pytest.mark.parametrize("windows", [(2,), (2, None)])
def test_a_group_with_a_window_may_be_the_first(windows: tuple[int | None, ...]) -> None:
    engine = Engine(None, windows=windows)
    try:
        keys = make_keys(8)
        engine.store(keys, *[list(range(8))] * len(windows))
        engine.step()
        assert engine.lookup("r", keys) == 8
        engine.load("r", [None] * 6 + [20, 21], *[list(range(10, 18))] * (len(windows) - 1))
        engine.step()
        assert engine.pinned() == 0
    finally:
        engine.close()


def test_the_longest_prefix_whose_windows_are_there(tmp_path: Path) -> None:
    engine = Engine(None, windows=(None, 2))
    try:
        keys = make_keys(8)
        engine.store(keys, list(range(8)), [None, 1, 2, None, 4, 5, None, 7])
        engine.step()
        assert [engine.lookup("r", keys[:n]) for n in range(1, 9)] == [0, 0, 3, 3, 3, 6, 6, 6]
    finally:
        engine.close()


def test_what_ranks_hold_alike_is_stored_once(tmp_path: Path) -> None:
    engine = Engine(None, num_workers=2, num_replicas=2)
    try:
        keys, stored = make_keys(4), engine.fill([0, 1, 2, 3], seed=1)[:1]
        engine.store(keys, [0, 1, 2, 3])
        engine.step()
        assert engine.lookup("r", keys) == 4
        engine.load("r", [4, 5, 6, 7])
        engine.step()
        assert torch.equal(engine.content([4, 5, 6, 7]), stored.expand(2, -1, -1, -1))
    finally:
        engine.close()


def test_a_promise_ends_with_the_step(engine: Engine) -> None:
    engine.store(make_keys(4), [0, 1, 2, 3])
    engine.step()
    assert engine.lookup("r", make_keys(4)) == 4
    assert engine.lookup("r", make_keys(4)) == 4  # asked again: pinned once
    assert engine.pinned() == 4
    engine.step()  # the answer was ignored
    assert engine.pinned() == 0
    assert engine.lookup("r", make_keys(4)) == 4
    engine.scheduler.forget("r")
    assert engine.pinned() == 0


def test_more_than_was_promised_is_refused() -> None:
    engine = Engine(None)
    try:
        engine.store(make_keys(4), [0, 1, 2, 3])
        engine.step()
        engine.lookup("r", make_keys(4))
        with pytest.raises(ValueError, match="blocks 0 to 4 of group 0 are to be loaded; promised were 0 to 3"):
            engine.load("r", [1, 2, 3, 4, 5])
        assert engine.pinned() == 0
    finally:
        engine.close()


def test_where_there_is_no_room_the_tail_is_dropped() -> None:
    engine = Engine(None, host_blocks=6)
    try:
        engine.store(make_keys(10), list(range(10)))
        engine.step()
        assert engine.lookup("r", make_keys(10)) == 6
        assert engine.scheduler.stats()["host"]["dropped_blocks"] == 4
    finally:
        engine.close()


def test_a_reset_hides_what_was_stored_and_what_is_on_its_way(engine: Engine) -> None:
    engine.store(make_keys(4), [0, 1, 2, 3])
    engine.step()
    engine.store(make_keys(4, seed=1), [4, 5, 6, 7])
    engine.scheduler.reset()
    engine.step()
    assert engine.lookup("r", make_keys(4)) == 0
    assert engine.lookup("s", make_keys(4, seed=1)) == 0


def test_a_store_that_fails_is_not_found(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    engine.store(make_keys(4), [0, 1, 2, NUM_BLOCKS])
    engine.step()
    assert "out of bounds" in caplog.text
    assert engine.lookup("r", make_keys(4)) == 0
    assert engine.pinned() == 0
    assert not engine.scheduler.has_open_jobs()


def test_after_a_load_that_fails_nothing_is_stored_until_it_is_known(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that was planned before computes from what was not loaded."""
    engine.store(make_keys(4), [0, 1, 2, 3])
    engine.step()
    assert engine.lookup("r", make_keys(4)) == 4
    engine.load("r", [10, 11, 12, 13])
    engine.store(make_keys(4, seed=1), [4, 5, 6, 7])
    first = engine.scheduler.end_step()
    engine.store(make_keys(4, seed=2), [8, 9, 14, 15])
    second = engine.scheduler.end_step()
    with monkeypatch.context() as patch:
        patch.setattr(PageCopier, "load", broken)
        engine.workers[0].load(first)
    for worker in engine.workers[1:]:
        worker.load(first)
    for worker in engine.workers:
        worker.store(first)
        worker.load(second)
        worker.store(second)
    engine.report()
    assert engine.workers[0].take_failed_blocks() == [(0, block) for block in (10, 11, 12, 13)]
    assert engine.lookup("s", make_keys(4, seed=1)) == 0
    assert engine.lookup("t", make_keys(4, seed=2)) == 0
    engine.store(make_keys(4, seed=1), [4, 5, 6, 7])
    engine.step()
    assert engine.lookup("u", make_keys(4, seed=1)) == 4


def test_after_a_restart_the_disk_answers(tmp_path: Path, shape: tuple[int, int]) -> None:
    per_chunk, num_workers = shape
    engine = Engine(tmp_path, per_chunk=per_chunk, num_workers=num_workers)
    stored = engine.fill(list(range(8)), seed=1)
    engine.store(make_keys(8), list(range(8)))
    engine.step()
    assert engine.scheduler.flush(30)
    engine.close()
    engine = Engine(tmp_path, per_chunk=per_chunk, num_workers=num_workers)
    try:
        engine.begin("r", make_keys(8))
        assert engine.lookup("r", make_keys(8)) == 8
        assert engine.lookup("s", make_keys(8)) == 8  # shares the prefix: it is in host memory now
        engine.load("r", list(range(10, 18)))
        engine.step()
        assert torch.equal(engine.content(list(range(10, 18))), stored)
        assert engine.pinned() == 0
    finally:
        engine.close()


def test_requests_that_share_a_prefix_bring_it_up_once(tmp_path: Path) -> None:
    engine = Engine(tmp_path)
    engine.store(make_keys(8), list(range(8)))
    engine.step()
    assert engine.scheduler.flush(30)
    engine.close()
    engine = Engine(tmp_path)
    try:
        engine.begin("long", make_keys(8))
        engine.begin("short", make_keys(8)[:4])
        engine.begin("other", [*make_keys(8)[:4], *make_keys(4, seed=5)])
        assert engine.lookup("short", make_keys(8)[:4]) == 4
        assert engine.lookup("other", [*make_keys(8)[:4], *make_keys(4, seed=5)]) == 4
        assert engine.lookup("long", make_keys(8)) == 8
        assert engine.scheduler.stats()["disk"]["hit_blocks"] == 8
    finally:
        engine.close()


def test_the_scheduler_never_waits_for_storage(tmp_path: Path) -> None:
    """While the I/O process is stopped, answers take no longer; and past the deadline it is a miss."""
    import os
    import signal

    engine = Engine(tmp_path)
    engine.store(make_keys(8), list(range(8)))
    engine.step()
    assert engine.scheduler.flush(30)
    engine.scheduler._planes.forget_host()
    pid = engine.scheduler._planes.io._connection._process.pid  # type: ignore[union-attr]
    os.kill(pid, signal.SIGSTOP)
    try:
        start = time.monotonic()
        for _ in range(10):
            assert engine.scheduler.lookup("r", [make_keys(8)]) is None
            engine.step()
        assert time.monotonic() - start < 1.5  # the find itself may take two seconds
    finally:
        os.kill(pid, signal.SIGCONT)
    assert engine.lookup("r", make_keys(8)) in (0, 8)
    engine.close()


def test_what_is_on_its_way_up_at_a_reset_is_not_found_after_it(tmp_path: Path) -> None:
    """Found in the old epoch, read while the lower tiers are told of the new one."""
    engine = Engine(tmp_path)
    keys = make_keys(8)
    engine.fill(list(range(8)), 1)
    engine.store(keys, list(range(8)))
    engine.step()
    assert engine.scheduler.flush(20)
    planes = engine.scheduler._planes
    planes.forget_host()
    io = planes.io
    assert io is not None
    is_found, is_reset = threading.Event(), threading.Event()
    find, set_namespace = io.find_prefix, io.set_namespace

    def find_slowly(keys: Sequence[BlockKey]) -> Located:
        found = find(keys)
        is_found.set()
        is_reset.wait(5)
        return found

    def set_slowly(namespace: bytes) -> None:
        is_reset.set()
        time.sleep(0.3)
        set_namespace(namespace)

    io.find_prefix, io.set_namespace = find_slowly, set_slowly  # type: ignore[method-assign]
    engine.begin("r", keys)
    assert is_found.wait(5)
    engine.scheduler.reset()
    io.find_prefix = find  # type: ignore[method-assign]
    time.sleep(0.1)
    assert engine.lookup("q", keys) == 0
    engine.close()


def test_of_a_prompt_the_tail_leaves_before_the_head() -> None:
    """Though its tail was stored after its head was last looked for."""
    engine = Engine(None, host_blocks=8)
    try:
        keys, others = make_keys(6), make_keys(4, seed=1)
        engine.store(keys[:3], range(3))
        engine.step()
        assert engine.lookup("r", keys) == 3
        engine.store(keys[3:], range(3, 6))
        engine.step()
        engine.scheduler.ended("", engine.of_groups(keys))
        engine.store(others, range(6, 10))
        engine.step()
        assert engine.lookup("again", keys) == 4
        assert engine.lookup("others", others) == 4
    finally:
        engine.close()
