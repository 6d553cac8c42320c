"""What every connector must hold: a suite to be inherited, for ours and for yours.

    class TestMine(ConnectorTests):
        def make(self, caches, tmp_path):
            return MyScheduler(24, len(caches)), [MyWorker(groups) for groups in caches]

It sees a connector through `SchedulerHalf` and `WorkerHalf` only. The paged cache is the
suite's own, and what a block holds follows from its key: whatever is loaded is checked byte
by byte. Stores begin and end at multiples of 4 blocks, as connectors need that store chunks.
"""

from __future__ import annotations

import copy
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch

from connectors.base import SchedulerHalf, WorkerHalf
from kvstore.identity import KVIdentity
from kvstore.keys import BlockKey, hash_blocks
from kvstore.layout import KVLayout
from kvstore.tiers.base import TierStats

LAYOUT: Final = KVLayout(num_layers=3, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY: Final = KVIdentity(model="conformance", revision="r1", layout=LAYOUT)
TIMEOUT_S: Final = 30.0  # ends a test that hangs; nothing is asserted about time
_NOTHING: Final = 0xEE  # what is in blocks that nobody has computed or loaded
_CHUNK: Final = 4

Caches = list[list[list[torch.Tensor]]]
"""By worker, KV cache group and layer: uint8, (blocks, page_nbytes)."""


def make_keys(n: int, seed: int = 0, head: Sequence[int] = ()) -> list[BlockKey]:
    """Keys of n blocks of a prompt: those of ``head``'s seeds, then its own; of other seeds it shares nothing."""
    seeds = [*head, *[seed] * (n - len(head))]
    tokens = [s * 1_000_000 + i * 4 + j for i, s in enumerate(seeds) for j in range(4)]
    return hash_blocks(tokens, block_size=4, identity=IDENTITY)


def make_caches(num_workers: int = 1, num_groups: int = 1, num_blocks: int = 128) -> Caches:
    """Groups have unequal numbers of layers; each worker has its part of every page."""
    shape = (num_blocks, LAYOUT.layer_nbytes // num_workers)
    return [
        [
            [torch.full(shape, _NOTHING, dtype=torch.uint8) for _ in range(LAYOUT.num_layers - group)]
            for group in range(num_groups)
        ]
        for _ in range(num_workers)
    ]


@dataclass
class PlannedStep:
    """What the scheduler half said, and what the engine does besides."""

    step: Any = None
    loads: list[tuple[str, list[BlockKey], list[int | None]]] = field(default_factory=list)  # by request
    stores: list[tuple[list[BlockKey], list[int | None]]] = field(default_factory=list)


class PagedEngine:
    """An engine's cache, and the steps in which it runs a connector. Every load is checked in its step."""

    def __init__(self, scheduler: SchedulerHalf, workers: Sequence[WorkerHalf], caches: Caches) -> None:
        self.scheduler, self.workers, self.caches = scheduler, list(workers), caches
        self._num_groups, self._num_blocks = len(caches[0]), len(caches[0][0][0])
        self._plan = PlannedStep()
        self._asked: dict[str, list[BlockKey]] = {}

    # -- what an engine asks its connector; keys are those of group 0

    def store(self, keys: Sequence[BlockKey], blocks: Sequence[int | None]) -> None:
        self._plan.stores.append((list(keys), list(blocks)))
        self.scheduler.store(self._of_groups(keys), self._in_groups(blocks))

    def ask(self, request_id: str, keys: Sequence[BlockKey]) -> int | None:
        self._asked[request_id] = list(keys)
        return self.scheduler.lookup(request_id, self._of_groups(keys))

    def lookup(self, request_id: str, keys: Sequence[BlockKey]) -> int:
        return self.lookups({request_id: keys})[request_id]

    def lookups(self, requests: Mapping[str, Sequence[BlockKey]]) -> dict[str, int]:
        """Ask, step by step, until all have an answer in one step."""
        found: dict[str, int] = {}

        def are_answered() -> bool:
            answers = {request_id: self.ask(request_id, keys) for request_id, keys in requests.items()}
            found.update({request_id: n for request_id, n in answers.items() if n is not None})
            if None in answers.values():
                self.step()
            return None not in answers.values()

        _wait_until(are_answered, "asked again and again, and never answered")
        return found

    def load(self, request_id: str, blocks: Sequence[int | None]) -> None:
        self.scheduler.load(request_id, self._in_groups(blocks))
        self._plan.loads.append((request_id, self._asked[request_id][: len(blocks)], list(blocks)))

    def begin(self, request_id: str, keys: Sequence[BlockKey]) -> None:
        self.scheduler.begin(request_id, self._of_groups(keys))

    def forget(self, request_id: str) -> None:
        """What it was to load may come or not: nobody reads it."""
        self.scheduler.forget(request_id)
        self._plan.loads = [load for load in self._plan.loads if load[0] != request_id]

    # -- steps

    def step(self) -> None:
        self.run(self.end_step())
        self.report()

    def end_step(self) -> PlannedStep:
        """What is to be done, as the workers get it: a copy."""
        plan, self._plan = self._plan, PlannedStep()
        plan.step = copy.deepcopy(self.scheduler.end_step())
        return plan

    def run(self, plan: PlannedStep) -> None:
        """Load; compute; store; then the blocks are given to others."""
        for worker in self.workers:
            worker.load(plan.step)
            assert worker.take_failed_blocks() == []
        for _, keys, blocks in plan.loads:
            self.check(keys, blocks)
        for keys, blocks in plan.stores:
            self._compute(keys, blocks)
        for worker in self.workers:
            worker.store(plan.step)
        for _, blocks in plan.stores:
            self.scribble(blocks)

    def report(self) -> None:
        for worker in self.workers:
            if failed := worker.take_failed_jobs():
                self.scheduler.failed(failed)
            self.scheduler.reported(worker.take_reports())

    def settle(self) -> None:
        """Step until what was stored can be found."""

        def is_settled() -> bool:
            self.step()
            return not self.scheduler.has_open_jobs()

        _wait_until(is_settled, "has_open_jobs() stays true though every worker has been asked for its reports")

    def wait_unpinned(self) -> None:
        """Nothing is held any more, once what is written behind is through."""
        _wait_until(
            lambda: not any(fields.get("pinned_blocks") for fields in self.scheduler.stats().values()),
            "blocks stay pinned though no request and no job holds them",
        )

    def close(self) -> None:
        for worker in self.workers:
            worker.close()
        self.scheduler.close()

    # -- the cache

    def check(self, keys: Sequence[BlockKey], blocks: Sequence[int | None]) -> None:
        """Assert that blocks hold what these keys stand for."""
        for key, block, plane, page in self._pages(keys, blocks):
            assert torch.equal(plane[block], page), f"block {block} does not hold what was stored as {key}"

    def scribble(self, blocks: Sequence[int | None]) -> None:
        for group, ids in enumerate(self._in_groups(blocks)):
            for planes in self.caches:
                for plane in planes[group]:
                    plane[[block for block in ids if block is not None]] = _NOTHING

    def _compute(self, keys: Sequence[BlockKey], blocks: Sequence[int | None]) -> None:
        for _, block, plane, page in self._pages(keys, blocks):
            plane[block] = page

    def _pages(
        self, keys: Sequence[BlockKey], blocks: Sequence[int | None]
    ) -> Iterator[tuple[BlockKey, int, torch.Tensor, torch.Tensor]]:
        """Of every block: its key and number, and of each layer at each worker the plane and what belongs there."""
        for group, (of_group, ids) in enumerate(zip(self._of_groups(keys), self._in_groups(blocks), strict=True)):
            planes = [plane for groups in self.caches for plane in groups[group]]
            for key, block in zip(of_group, ids, strict=True):
                if block is not None:
                    content = random.Random(bytes(key)).randbytes(len(planes) * planes[0].shape[1])
                    pages = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(len(planes), -1)
                    for plane, page in zip(planes, pages, strict=True):
                        yield key, block, plane, page

    def _of_groups(self, keys: Sequence[BlockKey]) -> list[list[BlockKey]]:
        return [[BlockKey.of(key.block_hash, group) for key in keys] for group in range(self._num_groups)]

    def _in_groups(self, blocks: Sequence[int | None]) -> list[list[int | None]]:
        """Each group has its own numbers for them."""
        return [
            [None if block is None else (block + 7 * group) % self._num_blocks for block in blocks]
            for group in range(self._num_groups)
        ]


class ConnectorTests(ABC):
    """Subclass it, name the subclass ``Test…``, and give `make`.

    Attributes:
        num_slots: blocks (of every group) that the connector has room for; at least 24.
        num_workers: workers, each with its part of every page: 1 or 2.
        num_groups: KV cache groups: 1 or 2.
    """

    num_slots = 24
    num_workers = 1
    num_groups = 1

    @abstractmethod
    def make(self, caches: Caches, tmp_path: Path) -> tuple[SchedulerHalf, Sequence[WorkerHalf]]:
        """A new connector, empty, with a worker half over each of ``caches``."""

    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[PagedEngine]:
        caches = make_caches(self.num_workers, self.num_groups, 64 + 2 * self.num_slots)
        before = set(threading.enumerate())
        engine = PagedEngine(*self.make(caches, tmp_path), caches)
        yield engine
        engine.close()
        _wait_until(
            lambda: not any(thread.is_alive() for thread in set(threading.enumerate()) - before),
            f"close() leaves threads behind: {set(threading.enumerate()) - before}",
        )

    # -- what was stored is loaded

    def test_what_was_stored_is_loaded_into_other_blocks(self, engine: PagedEngine) -> None:
        keys = make_keys(8)
        engine.store(keys, range(8))
        engine.settle()
        assert engine.lookup("r", [*keys, *make_keys(4, seed=9)]) == 8
        engine.load("r", [20, 11, 25, 13, 9, 8, 31, 63])
        assert sum(engine.scheduler.sources("r", 8).values()) == 8
        engine.step()

    def test_a_hit_may_begin_anywhere(self, engine: PagedEngine) -> None:
        """The engine's own cache has the head."""
        keys = make_keys(8)
        engine.store(keys, range(8))
        engine.settle()
        assert engine.lookup("r", keys[3:]) == 5
        engine.load("r", [40, 41, 42, 43, 44])
        engine.step()

    def test_fewer_than_promised_may_be_taken(self, engine: PagedEngine) -> None:
        keys = make_keys(8)
        engine.store(keys, range(8))
        engine.settle()
        assert engine.lookup("r", keys) == 8
        engine.load("r", [50, 51])
        engine.settle()
        engine.wait_unpinned()

    def test_only_leading_blocks_count(self, engine: PagedEngine) -> None:
        keys = make_keys(12)
        engine.store(keys[:4], range(4))
        engine.store(keys[8:], range(8, 12))
        engine.settle()
        assert engine.lookup("r", keys) == 4
        assert engine.lookup("r", keys[4:]) == 0
        assert engine.lookup("r", keys[8:]) == 4
        engine.load("r", range(4))
        engine.step()

    def test_blocks_that_an_engine_does_not_have_are_left_out(self, engine: PagedEngine) -> None:
        keys = make_keys(12)
        engine.store(keys, [*range(4), *[None] * 4, *range(8, 12)])
        engine.settle()
        assert engine.lookup("r", keys) == 4
        engine.scribble(range(32))
        engine.load("r", [None, 20, None, 21])
        engine.step()

    def test_requests_share_a_prefix(self, engine: PagedEngine) -> None:
        one, other = make_keys(8), make_keys(8, seed=1, head=[0] * 4)
        engine.store(one, range(8))
        engine.store(one, range(10, 18))  # computed twice in one step
        engine.store(other[4:], range(20, 24))
        engine.settle()
        assert engine.lookups({"a": one, "b": one, "c": other}) == {"a": 8, "b": 8, "c": 8}
        for i, request_id in enumerate("abc"):
            engine.load(request_id, range(30 + 8 * i, 38 + 8 * i))
        engine.settle()
        engine.wait_unpinned()

    # -- promises

    def test_nothing_is_found_before_every_worker_has_reported_it(self, engine: PagedEngine) -> None:
        keys = make_keys(4)
        engine.store(keys, range(4))
        assert not engine.ask("r", keys)
        plan = engine.end_step()
        assert not engine.ask("r", keys)
        engine.run(plan)
        for worker in engine.workers:
            assert not engine.ask("r", keys)
            engine.scheduler.reported(worker.take_reports())
        engine.settle()
        assert engine.lookup("r", keys) == 4

    def test_an_answer_may_be_asked_for_again_and_ignored(self, engine: PagedEngine) -> None:
        keys = make_keys(4)
        engine.store(keys, range(4))
        engine.settle()
        for _ in range(3):
            assert engine.lookup("r", keys) == 4
        engine.settle()
        engine.wait_unpinned()
        assert engine.lookup("r", keys) == 4
        for request_id in ("r", "r", "never seen"):
            engine.forget(request_id)
        engine.wait_unpinned()

    def test_more_than_promised_is_refused(self, engine: PagedEngine) -> None:
        engine.store(make_keys(4), range(4))
        engine.settle()
        assert engine.lookup("r", make_keys(8)) == 4
        with pytest.raises(ValueError, match=r"\S"):
            engine.load("r", range(10, 15))
        engine.settle()
        engine.wait_unpinned()

    def test_what_is_no_promise_or_none_any_more_is_refused(self, engine: PagedEngine) -> None:
        keys = make_keys(4)
        engine.store(keys, range(4))
        engine.settle()
        with pytest.raises(ValueError, match=r"\S"):
            engine.scheduler.load("never asked", [[10]] * self.num_groups)
        for end in (engine.step, lambda: engine.forget("r")):
            assert engine.lookup("r", keys) == 4
            end()
            with pytest.raises(ValueError, match=r"\S"):
                engine.load("r", range(10, 14))

    def test_a_promise_outlives_everything_else_of_its_step(self, engine: PagedEngine) -> None:
        """Stores of twice the room there is, before it is taken and after, and reports of the step before."""
        keys, n = make_keys(8), self.num_slots - self.num_slots % _CHUNK
        engine.store(keys, range(8))
        engine.settle()
        engine.store(make_keys(8, seed=1), range(8))
        before = engine.end_step()
        assert engine.lookup("r", keys) == 8
        engine.store(make_keys(n, seed=2), range(8, 8 + n))
        engine.run(before)
        engine.report()
        engine.load("r", range(n + 8, n + 16))
        engine.store(make_keys(n, seed=3), range(n + 16, n + n + 16))
        engine.settle()
        engine.wait_unpinned()

    def test_aborts_at_every_stage(self, engine: PagedEngine) -> None:
        keys = make_keys(8)
        engine.store(keys, range(8))
        engine.settle()
        engine.begin("a", keys)
        engine.forget("a")
        engine.begin("b", keys)
        engine.ask("b", keys)
        engine.forget("b")
        assert engine.lookup("c", keys) == 8
        engine.load("c", range(10, 18))
        engine.forget("c")
        engine.settle()
        assert engine.lookup("d", keys) == 8
        engine.load("d", range(10, 18))
        engine.step()
        engine.forget("d")
        engine.settle()
        engine.wait_unpinned()
        assert engine.lookup("e", keys) == 8

    # -- reset, room, reports, close

    def test_after_a_reset_nothing_old_is_found(self, engine: PagedEngine) -> None:
        """Neither what was stored, nor what is copied and not reported, nor what is to be copied."""
        old = [make_keys(4, seed=i) for i in range(3)]
        engine.store(old[0], range(4))
        engine.settle()
        engine.store(old[1], range(4, 8))
        engine.run(engine.end_step())
        engine.store(old[2], range(8, 12))
        engine.scheduler.reset()
        engine.report()
        engine.settle()
        for i, keys in enumerate(old):
            assert engine.lookup(f"r{i}", keys) == 0
        engine.wait_unpinned()
        engine.store(old[2], range(4))
        engine.settle()
        assert engine.lookup("s", old[2]) == 4
        engine.load("s", range(8, 12))
        engine.step()

    @pytest.mark.parametrize("late", [0, 1], ids=["in-step", "a-step-ahead"])
    def test_many_times_what_there_is_room_for(self, engine: PagedEngine, late: int) -> None:
        """Random prompts that share heads, several a step, some aborted: something is dropped, nothing is wrong.

        Args:
            late: steps that the scheduler is ahead of the workers.
        """
        rng = random.Random(0)
        prompts = [
            make_keys(_CHUNK * rng.randint(1, 4), seed=10 + i, head=[rng.randrange(3)] * rng.choice((0, 2, 4)))
            for i in range(self.num_slots // 2)
        ]
        waiting: dict[str, list[BlockKey]] = {}
        plans: list[PlannedStep] = []
        num_hits = num_begun = num_served = 0
        deadline = time.monotonic() + TIMEOUT_S
        while num_served < 8 * self.num_slots:
            assert time.monotonic() < deadline, "asked again and again, and never answered"
            while len(waiting) < 3:
                num_begun += 1
                waiting[f"r{num_begun}"] = rng.choice(prompts)
                engine.begin(f"r{num_begun}", waiting[f"r{num_begun}"])
            free = rng.sample(range(64), 64)
            for request_id, keys in list(waiting.items()):
                found = engine.ask(request_id, keys)
                if found is None:
                    continue
                del waiting[request_id]
                num_served += 1
                blocks, free = free[: len(keys)], free[len(keys) :]
                if found and rng.random() < 0.9:
                    engine.load(request_id, blocks[:found])
                    num_hits += found
                engine.store(keys, blocks)
                if rng.random() < 0.2:
                    engine.forget(request_id)
            plans.append(engine.end_step())
            if len(plans) > late:
                engine.run(plans.pop(0))
                engine.report()
        for plan in plans:
            engine.run(plan)
            engine.report()
        for number in range(num_begun):
            engine.forget(f"r{number + 1}")
        assert num_hits > self.num_slots
        engine.settle()
        engine.wait_unpinned()
        fresh = make_keys(2 * _CHUNK, seed=9)  # no room was lost
        engine.store(fresh, range(2 * _CHUNK))
        engine.settle()
        assert engine.lookup("fresh", fresh) == 2 * _CHUNK

    def test_open_jobs_are_those_that_have_not_been_reported(self, engine: PagedEngine) -> None:
        assert not engine.scheduler.has_open_jobs()
        engine.store(make_keys(4), range(4))
        plan = engine.end_step()
        assert engine.scheduler.has_open_jobs()
        engine.run(plan)
        assert engine.scheduler.has_open_jobs()
        engine.report()
        engine.settle()
        engine.scheduler.reported({})
        assert not engine.scheduler.has_open_jobs()
        assert all(worker.take_reports() == {} for worker in engine.workers)

    def test_stats_and_events_can_be_taken_by_another_thread(self, engine: PagedEngine) -> None:
        engine.store(make_keys(4), range(4))
        engine.settle()
        with ThreadPoolExecutor(1) as pool:
            stats = pool.submit(engine.scheduler.stats).result()
            events = pool.submit(engine.scheduler.take_events).result()
        assert stats
        assert [TierStats(**fields).name for fields in stats.values()] == list(stats)
        assert {event.tier for event in events} <= set(stats)

    def test_closed_with_everything_under_way(self, engine: PagedEngine) -> None:
        keys = make_keys(8)
        engine.store(keys, range(8))
        engine.settle()
        engine.begin("r", make_keys(8, seed=1))
        assert engine.lookup("r", keys) == 8
        engine.load("r", range(10, 18))
        engine.store(make_keys(4, seed=2), range(20, 24))
        engine.run(engine.end_step())
        engine.ask("s", keys)
        engine.close()  # and by the fixture once more


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.001)
