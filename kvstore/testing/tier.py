"""Conformance suite of `LowerTier`: what every lower tier must do, whatever it stores things in.

    class TestMyTier(TierTests):
        def make_tier(self, bench): ...
        def corrupt(self, bench, key, at): ...     # these three go to the files themselves,
        def truncate(self, bench, key): ...        # never through the tier under test
        def delete(self, bench, key): ...

Runs at 1 and at 4 blocks a chunk. Content is derived from keys, so any process that has a
`TierBench` can check what another one stored.
"""

from __future__ import annotations

import hashlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvstore.arena import HostArena
from kvstore.identity import KVIdentity
from kvstore.jobs import Indices
from kvstore.keys import BlockKey, array_to_keys, keys_to_array
from kvstore.layout import KVLayout
from kvstore.slot import SlotCodec, SlotFormat
from kvstore.tiers.base import FoundChunks, LowerTier, SealedChunks

NUM_SLOTS: Final = 64  # the first half is written from, the second is read into
LONG_S: Final = 60.0  # ends a test that hangs; nothing is asserted about time
OTHER_NAMESPACE: Final = b"another namespac"
FLIPPED_AT: Final = (0.0, 0.1, 0.37, 0.5, 0.83, 0.99, 0.9999999)

TierFactory = Callable[[], LowerTier]


class TierBench:
    """A small arena, an identity, and content to store and check.

    Attributes:
        directory: an empty directory for the tier.
        namespace: what tiers are opened under, and chunks sealed under.
    """

    def __init__(self, directory: Path, blocks_per_chunk: int) -> None:
        self.directory = directory
        self.blocks_per_chunk = blocks_per_chunk
        layout = KVLayout(num_layers=2, num_kv_heads=2, head_size=16, block_size=16, dtype=torch.bfloat16)
        self.identity = KVIdentity(model="bench", revision="r1", layout=layout)
        self.codec = SlotCodec(SlotFormat.of(self.identity, blocks_per_chunk))
        self.namespace = self.identity.namespace()
        self._arena = HostArena(NUM_SLOTS, self.codec.fmt.slot_nbytes)
        self._generation = 0

    @property
    def rows(self) -> NDArray[np.uint8]:
        return self._arena.rows

    def chain(self, name: str, num_chunks: int) -> list[BlockKey]:
        """Keys of ``num_chunks`` chunks of one prefix."""
        parent, keys = hashlib.sha256(name.encode()).digest(), []
        for _ in range(num_chunks * self.blocks_per_chunk):
            parent = hashlib.sha256(parent).digest()
            keys.append(BlockKey.of(parent))
        return keys

    def payload(self, last_key: BlockKey) -> NDArray[np.uint8]:
        """The payload of the chunk whose last block has this key."""
        rng = np.random.default_rng(int.from_bytes(last_key[:8], "little"))
        return rng.integers(0, 256, self.codec.fmt.payload_nbytes, dtype=np.uint8)

    def seal(self, keys: Sequence[BlockKey], namespace: bytes | None = None) -> SealedChunks:
        """Fill and seal slots 0, 1, ... with these keys' chunks."""
        array = keys_to_array(keys).reshape(-1, self.blocks_per_chunk, len(keys[0]))
        slots = np.arange(len(array), dtype=np.int64)
        first = max(time.time_ns(), self._generation + 1)  # as write-behind gives them
        self._generation = first + len(array)
        generations = np.arange(self._generation - 1, first - 1, -1, dtype=np.uint64)
        for slot, chunk in zip(slots, array, strict=True):
            self.rows[slot, : self.codec.fmt.payload_nbytes] = self.payload(array_to_keys(chunk)[-1])
        namespace = self.namespace if namespace is None else namespace
        self.codec.seal(self.rows, slots, array, namespace, generations)
        return SealedChunks(slots, array, namespace, generations)

    def put(self, tier: LowerTier, keys: Sequence[BlockKey], namespace: bytes | None = None) -> list[bool]:
        """Write these keys' chunks; which are stored."""
        stored: list[bool] = tier.write(self.seal(keys, namespace)).tolist()
        return stored

    def read_slots(self, chunks: FoundChunks) -> NDArray[np.int64]:
        """A slot for each chunk, filled with what no chunk has."""
        slots = np.arange(NUM_SLOTS // 2, NUM_SLOTS // 2 + len(chunks), dtype=np.int64)
        self.rows[slots] = 0xEE
        return slots

    def get(self, tier: LowerTier, keys: Sequence[BlockKey]) -> int:
        """Find and read these keys; how many leading ones came, every byte of them checked."""
        return self.collect(tier, keys, tier.find_prefix(keys))

    def collect(self, tier: LowerTier, keys: Sequence[BlockKey], chunks: FoundChunks) -> int:
        """Read chunks that were found for these keys; how many leading keys came."""
        slots = self.read_slots(chunks)
        job = tier.read(chunks, slots, time.monotonic() + LONG_S)
        good = {i for i, ok in job if ok}
        job.abandon(lambda indices: None)
        starts = np.cumsum([0, *chunks.num_keys.tolist()]).tolist()
        assert starts[-1] <= len(keys)
        for i in good:
            self.check(int(slots[i]), keys[starts[i] : starts[i + 1]])
        leading = next((i for i in range(len(chunks)) if i not in good), len(chunks))
        return int(starts[leading])

    def check(self, slot: int, keys: Sequence[BlockKey]) -> None:
        """Assert that a slot holds a chunk with these consecutive keys, and its right content."""
        fmt = self.codec.fmt
        trailers = self.codec.parse(self.rows[slot : slot + 1, fmt.body_nbytes :])
        assert trailers.valid[0]
        held = array_to_keys(trailers.keys[0])
        at = held.index(keys[0])
        assert held[at : at + len(keys)] == list(keys)
        assert np.array_equal(self.rows[slot, : fmt.payload_nbytes], self.payload(held[-1]))

    def close(self) -> None:
        self._arena.close()


class TierTests(ABC):
    """Subclass it as ``Test...`` and give the four methods."""

    @abstractmethod
    def make_tier(self, bench: TierBench) -> LowerTier:
        """Open a tier on ``bench.directory``, with room for some hundred chunks."""

    @abstractmethod
    def corrupt(self, bench: TierBench, key: BlockKey, at: float) -> None:
        """Change one byte of what is stored of this key's chunk, ``at`` from 0 (the first byte) to 1."""

    @abstractmethod
    def truncate(self, bench: TierBench, key: BlockKey) -> None:
        """Cut the file that holds this key's chunk, within the chunk."""

    @abstractmethod
    def delete(self, bench: TierBench, key: BlockKey) -> None:
        """Take away what is stored of this key's chunk."""

    @pytest.fixture(params=[1, 4], ids=["1-block", "4-blocks"])
    def bench(self, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[TierBench]:
        directory = tmp_path / "tier"
        directory.mkdir(mode=0o700)
        bench = TierBench(directory, request.param)
        yield bench
        bench.close()

    @pytest.fixture
    def tier_factory(self, bench: TierBench) -> Iterator[TierFactory]:
        """Opens tiers, and closes them at the end of the test."""
        opened: list[LowerTier] = []

        def open_tier() -> LowerTier:
            opened.append(self.make_tier(bench))
            return opened[-1]

        yield open_tier
        for tier in opened:
            tier.close()

    @pytest.fixture
    def tier(self, tier_factory: TierFactory) -> LowerTier:
        return tier_factory()

    # -- what is stored comes back

    def test_put_then_get_gives_equal_bytes(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 5)
        assert bench.put(tier, keys) == [True] * 5
        assert bench.get(tier, keys) == len(keys)

    def test_what_was_never_stored_is_a_miss(self, bench: TierBench, tier: LowerTier) -> None:
        assert len(tier.find_prefix(bench.chain("a", 2))) == 0
        assert len(tier.find_prefix([])) == 0
        assert all(bench.put(tier, bench.chain("b", 1)))
        assert bench.get(tier, bench.chain("a", 2)) == 0

    def test_storing_twice_is_stored(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        assert bench.put(tier, keys) == bench.put(tier, keys) == [True] * 3
        assert bench.get(tier, keys) == len(keys)

    def test_many_prefixes_do_not_mix(self, bench: TierBench, tier: LowerTier) -> None:
        chains = [bench.chain(f"c{i}", 3) for i in range(8)]
        for keys in chains:
            assert all(bench.put(tier, keys))
        assert [bench.get(tier, keys) for keys in chains] == [len(keys) for keys in chains]

    def test_reopened_tier_has_what_was_flushed(
        self, bench: TierBench, tier: LowerTier, tier_factory: TierFactory
    ) -> None:
        keys = bench.chain("a", 4)
        bench.put(tier, keys)
        assert tier.flush(time.monotonic() + LONG_S)
        tier.close()
        assert bench.get(tier_factory(), keys) == len(keys)

    def test_readers_beside_a_writer_get_right_bytes_only(self, bench: TierBench, tier: LowerTier) -> None:
        chains = [bench.chain(f"c{i}", 2) for i in range(12)]
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(lambda: [bench.put(tier, keys) for keys in chains])
            while not writing.done():
                for keys in chains:
                    assert bench.get(tier, keys) <= len(keys)
        assert writing.result() == [[True, True]] * 12
        assert all(bench.get(tier, keys) == len(keys) for keys in chains)

    # -- prefixes and parts of chunks

    def test_only_leading_keys_are_found(self, bench: TierBench, tier: LowerTier) -> None:
        n = bench.blocks_per_chunk
        keys = bench.chain("a", 4)
        bench.put(tier, [*keys[:n], *keys[2 * n :]])  # a hole at chunk 1
        assert bench.get(tier, keys) == n
        assert bench.get(tier, keys[n:]) == 0
        assert bench.get(tier, keys[2 * n :]) == 2 * n

    def test_a_chunk_counts_once(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        assert tier.find_prefix(keys).num_keys.tolist() == [bench.blocks_per_chunk] * 3

    def test_a_hit_begins_and_ends_inside_chunks(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        for start in range(bench.blocks_per_chunk):
            for end in range(start + 1, len(keys) + 1):
                assert bench.get(tier, keys[start:end]) == end - start

    def test_a_hit_ends_where_the_askers_keys_differ(self, bench: TierBench, tier: LowerTier) -> None:
        keys, other = bench.chain("a", 2), bench.chain("b", 2)
        bench.put(tier, keys)
        for same in range(len(keys)):
            assert bench.get(tier, [*keys[:same], *other[same:]]) == same

    def test_two_chunks_with_the_same_head(self, bench: TierBench, tier: LowerTier) -> None:
        n = bench.blocks_per_chunk
        one, two = bench.chain("a", 1), bench.chain("b", 1)
        two[: n // 2] = one[: n // 2]
        assert all(bench.put(tier, one))
        assert all(bench.put(tier, two))
        assert bench.get(tier, one) == bench.get(tier, two) == n

    # -- namespaces

    def test_another_namespace_misses(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 2)
        bench.put(tier, keys)
        found = tier.find_prefix(keys)
        tier.set_namespace(OTHER_NAMESPACE)
        assert bench.collect(tier, keys, found) == 0, "found before, read after"
        assert bench.get(tier, keys) == 0
        bench.put(tier, keys)  # sealed before: stays in the old one
        assert bench.get(tier, keys) == 0
        assert all(bench.put(tier, keys, OTHER_NAMESPACE))
        assert bench.get(tier, keys) == len(keys)
        assert tier.stats().corrupt_chunks == 0

    # -- damage

    @pytest.mark.parametrize("at", FLIPPED_AT)
    def test_a_changed_byte_is_a_miss_and_heals(self, bench: TierBench, tier: LowerTier, at: float) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        self.corrupt(bench, keys[bench.blocks_per_chunk], at)
        assert bench.get(tier, keys) == bench.blocks_per_chunk
        assert tier.stats().corrupt_chunks == 1
        assert len(tier.find_prefix(keys)) == 1, "dropped, and not tried again"
        self._assert_heals(bench, tier, keys)
        assert tier.stats().corrupt_chunks == 1

    def test_a_truncated_chunk_is_a_miss_and_heals(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        self.truncate(bench, keys[-1])
        assert bench.get(tier, keys) <= len(keys) - bench.blocks_per_chunk
        stats = tier.stats()
        assert stats.corrupt_chunks + stats.failed_chunks >= 1
        self._assert_heals(bench, tier, keys)

    def test_a_deleted_chunk_is_a_miss_and_heals(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        self.delete(bench, keys[-1])
        assert bench.get(tier, keys) == len(keys) - bench.blocks_per_chunk
        self._assert_heals(bench, tier, keys)

    def _assert_heals(self, bench: TierBench, tier: LowerTier, keys: Sequence[BlockKey]) -> None:
        deadline = time.monotonic() + LONG_S
        while not all(bench.put(tier, keys)):  # a tier may have turned itself off: it comes back
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert bench.get(tier, keys) == len(keys)

    # -- purge

    def test_purge_deletes_whole_chunks_for_good(
        self, bench: TierBench, tier: LowerTier, tier_factory: TierFactory
    ) -> None:
        keys = bench.chain("a", 3)
        n = bench.blocks_per_chunk
        bench.put(tier, keys)
        assert tier.purge([keys[n + n // 2]]) == 1
        assert tier.purge(bench.chain("b", 1)) == 0
        for again in (tier, None):
            if again is None:
                tier.close()
                again = tier_factory()
            assert bench.get(again, keys) == n
            assert bench.get(again, keys[n:]) == 0
            assert bench.get(again, keys[2 * n :]) == n

    # -- jobs

    def test_each_slot_is_yielded_or_released_once(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 16)
        bench.put(tier, keys)
        for take in (0, 1, 7, 16):
            chunks = tier.find_prefix(keys)
            job = tier.read(chunks, bench.read_slots(chunks), time.monotonic() + LONG_S)
            seen = Counter(i for _, (i, _) in zip(range(take), job, strict=False))
            assert seen + self._released(job.abandon, len(chunks) - take) == Counter(range(16))

    def test_a_deadline_ends_the_wait(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 16)
        bench.put(tier, keys)
        chunks = tier.find_prefix(keys)
        job = tier.read(chunks, bench.read_slots(chunks), time.monotonic() - 1)
        seen = Counter(i for i, _ in job)
        assert seen + self._released(job.abandon, 16 - seen.total()) == Counter(range(16))
        assert tier.stats().late_chunks == 16 - seen.total()

    def _released(self, abandon: Callable[[Callable[[Indices], None]], None], expected: int) -> Counter[int]:
        """Abandon a job; what it releases, once that is as much as expected and a little later."""
        released: Counter[int] = Counter()
        change = threading.Condition()

        def release(indices: Indices) -> None:
            with change:
                released.update(indices)
                change.notify_all()

        abandon(release)
        with change:
            assert change.wait_for(lambda: released.total() >= expected, LONG_S)
        abandon(release)  # again: nothing is left to release
        time.sleep(0.01)
        return released

    # -- counters, flush, close

    def test_counters_move(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        slots_nbytes = 3 * bench.codec.fmt.slot_nbytes
        bench.put(tier, keys)
        stats = tier.stats()
        assert stats.name == tier.name
        assert stats.state == "on"
        assert stats.written_nbytes >= slots_nbytes
        assert stats.write_s > 0
        assert stats.capacity_nbytes >= stats.used_nbytes >= slots_nbytes
        bench.get(tier, keys)
        stats = tier.stats()
        assert stats.hit_blocks == len(keys)
        assert stats.read_nbytes >= slots_nbytes
        assert stats.read_s > 0
        misses = stats.miss_blocks
        bench.get(tier, bench.chain("b", 1))
        assert tier.stats().miss_blocks == misses + bench.blocks_per_chunk
        assert tier.stats().corrupt_chunks == tier.stats().failed_chunks == tier.stats().late_chunks == 0

    def test_flush(self, bench: TierBench, tier: LowerTier) -> None:
        bench.put(tier, bench.chain("a", 3))
        assert tier.flush(time.monotonic() + LONG_S)
        assert tier.flush(time.monotonic() + LONG_S)

    def test_after_close_everything_misses(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 3)
        bench.put(tier, keys)
        found = tier.find_prefix(keys)
        tier.close()
        assert bench.collect(tier, keys, found) == 0
        assert len(tier.find_prefix(keys)) == 0
        assert not any(bench.put(tier, keys))
        assert tier.purge(keys) == 0
        assert not tier.flush(time.monotonic() + LONG_S)
        assert tier.stats().name == tier.name
        tier.close()

    def test_close_ends_a_read_under_way(self, bench: TierBench, tier: LowerTier) -> None:
        keys = bench.chain("a", 16)
        bench.put(tier, keys)
        chunks = tier.find_prefix(keys)
        job = tier.read(chunks, bench.read_slots(chunks), time.monotonic() + LONG_S)
        tier.close()
        seen = Counter(i for i, _ in job)
        assert seen + self._released(job.abandon, 16 - seen.total()) == Counter(range(16))
