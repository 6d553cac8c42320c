"""`TieredStore` end to end: what its docstrings promise, over every combination of tiers."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from kvstore import DeviceTierConfig, DiskTierConfig, KVIdentity, TieredStore, hash_blocks
from kvstore.errors import ConfigError, IdentityMismatchError, StoreClosedError
from tests.stores import IDENTITY, LAYOUT, MIB, Stores, check_get, make_blocks, make_keys


@pytest.fixture(params=[1, 4], ids=lambda n: f"chunks-of-{n}")
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    return Stores(tmp_path, request.param, "thread")


@pytest.fixture(params=[(1, "thread"), (4, "thread"), (3, "process")], ids=lambda p: f"{p[1]}-{p[0]}")
def stores_of_all_io(request: pytest.FixtureRequest, tmp_path: Path) -> Stores:
    return Stores(tmp_path, *request.param)


@pytest.mark.parametrize("tiers", ["", "device", "disk", "shared", "disk shared", "device disk shared"])
def test_put_then_get(stores: Stores, tiers: str) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with stores.open(tiers) as store:
        assert store.prefix_hit(keys) == 0
        assert store.put(keys, blocks) == 24
        blocks_before = blocks.clone()
        blocks.zero_()  # they were copied
        assert store.prefix_hit(keys) == 24
        check_get(store, keys, blocks_before, 24)
        assert store.flush() is True


@pytest.mark.parametrize("tiers", ["disk", "shared"])
def test_a_lower_tier_serves_after_a_restart(stores_of_all_io: Stores, tiers: str) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with stores_of_all_io.open(tiers) as store:
        store.put(keys, blocks)
    with stores_of_all_io.open(tiers, host_blocks=8) as store:  # host memory smaller than what is loaded
        assert store.prefix_hit(keys) == 24
        check_get(store, keys, blocks, 24)
        stats = store.stats().tiers
        assert stats[tiers].read_nbytes > 0 and stats[
            "host"
        ].capacity_blocks == 8 // stores_of_all_io.blocks_per_chunk * (stores_of_all_io.blocks_per_chunk)


def test_a_hit_begins_and_ends_inside_a_chunk(stores_of_all_io: Stores) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    for tiers in ("disk", "shared"):
        with stores_of_all_io.open(tiers) as store:
            store.put(keys, blocks)
        with stores_of_all_io.open(tiers) as store:
            for _ in ("from the tier", "from host memory"):
                out = torch.zeros_like(blocks[:10])
                assert store.prefix_hit(keys[:7]) == 7
                assert store.get(keys[:11], out, first_block=5) == 6
                assert torch.equal(out[:6], blocks[5:11])


def test_a_partial_last_chunk_is_not_stored(stores: Stores) -> None:
    keys, blocks, per_chunk = make_keys(10), make_blocks(10), stores.blocks_per_chunk
    with stores.open() as store:
        whole = 10 // per_chunk * per_chunk
        assert store.put(keys, blocks) == whole
        assert store.prefix_hit(keys) == whole


def test_a_prompt_that_goes_another_way_shares_the_prefix(stores: Stores) -> None:
    per_chunk = stores.blocks_per_chunk
    first = list(range(24 * 4))
    second = first[: 14 * 4] + [7] * (10 * 4)
    keys_a, keys_b = (hash_blocks(t, block_size=4, identity=IDENTITY) for t in (first, second))
    blocks_a, blocks_b = make_blocks(24, 1), make_blocks(24, 2)
    blocks_b[:14] = blocks_a[:14]
    with stores.open("disk") as store:
        store.put(keys_a, blocks_a)
        assert store.prefix_hit(keys_b) == 14
        assert store.put(keys_b, blocks_b) == 24 // per_chunk * per_chunk
        check_get(store, keys_b, blocks_b, 24)
        check_get(store, keys_a, blocks_a, 24)
    with stores.open("disk") as store:
        check_get(store, keys_b, blocks_b, 24)


def test_put_goes_on_behind_a_prefix(stores: Stores) -> None:
    keys, blocks = make_keys(24), make_blocks(24)
    with stores.open("disk") as store:
        assert store.put(keys[:12], blocks[:12]) == 12
        assert store.put(keys, blocks[12:], first_block=12) == 12
        check_get(store, keys, blocks, 24)


def test_reset_hides_everything_for_good(stores_of_all_io: Stores) -> None:
    keys, old, new = make_keys(12), make_blocks(12, 1), make_blocks(12, 2)
    with stores_of_all_io.open("device disk shared") as store:
        store.put(keys, old)
        store.flush()
        store.reset()
        assert store.prefix_hit(keys) == 0
        store.put(keys, new)
        store.flush()
        check_get(store, keys, new, 12)
    with stores_of_all_io.open("disk") as store:  # neither epoch is this opener's
        assert store.prefix_hit(keys) == 0


def test_purge(stores_of_all_io: Stores) -> None:
    keys, blocks = make_keys(12), make_blocks(12)
    with stores_of_all_io.open("device disk shared") as store:
        store.put(keys, blocks)
        store.flush()
        assert store.purge(keys[3:4]) >= 1
        assert store.prefix_hit(keys) <= 3
    with stores_of_all_io.open() as store:
        assert store.prefix_hit(keys) <= 3
        assert store.put(keys, blocks) == 12
        check_get(store, keys, blocks, 12)


def test_host_memory_smaller_than_a_put(stores_of_all_io: Stores) -> None:
    keys, blocks = make_keys(60), make_blocks(60)
    with stores_of_all_io.open("disk", host_blocks=6) as store:
        assert store.put(keys, blocks) == 60
        assert store.flush() is True
        check_get(store, keys, blocks, 60)
    with stores_of_all_io.open("", host_blocks=6) as store:
        store.put(keys, blocks)
        assert store.prefix_hit(keys) <= 6


def test_threads_put_and_get_at_once(stores_of_all_io: Stores) -> None:
    errors: list[BaseException] = []

    def work(store: TieredStore, seed: int) -> None:
        try:
            for round_ in range(6):
                keys, blocks = make_keys(18, seed % 2), make_blocks(18, seed % 2)
                store.put(keys, blocks)
                out = torch.zeros_like(blocks)
                n = store.get(keys, out)
                assert torch.equal(out[:n], blocks[:n]), (seed, round_)
        except BaseException as e:
            errors.append(e)

    with stores_of_all_io.open("device disk shared", host_blocks=24) as store:
        threads = [threading.Thread(target=work, args=(store, seed)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not errors and not any(t.is_alive() for t in threads)


def test_wrong_arguments(tmp_path: Path) -> None:
    keys, blocks = make_keys(4), make_blocks(4)
    with Stores(tmp_path, 1, "thread").open("") as store:
        with pytest.raises(ConfigError, match="blocks: shape"):
            store.put(keys, blocks[:, :2])
        with pytest.raises(ConfigError, match="blocks: shape"):
            store.put(keys, blocks.float())
        with pytest.raises(ConfigError, match="first_block=2"):
            store.put(keys, blocks, first_block=2)
        with pytest.raises(ConfigError, match="contiguous"):
            store.get(keys, torch.empty((8, *LAYOUT.block_shape), dtype=LAYOUT.dtype)[::2])
        assert store.put([], blocks[:0]) == 0 and store.get([], blocks) == 0
        assert store.get(keys, blocks[:0]) == 0
    with pytest.raises(StoreClosedError):
        store.prefix_hit(keys)
    store.close()


@pytest.mark.parametrize("io", ["thread", "process"])
def test_a_directory_of_another_model_is_refused(tmp_path: Path, io: str) -> None:
    stores = Stores(tmp_path, 1, io)
    stores.open("disk").close()
    other = KVIdentity(model="other", revision="r2", layout=LAYOUT)
    with pytest.raises(IdentityMismatchError) as refused:
        stores.open("disk", identity=other)
    assert refused.value.differences == {"model": ("m", "other"), "revision": ("r1", "r2")}
    assert "'m'" in str(refused.value) and "'other'" in str(refused.value)
    cleared = DiskTierConfig(path=str(tmp_path / "disk"), capacity_nbytes=8 * MIB, on_mismatch="clear")
    stores.open("disk", identity=other, disk=cleared).close()
    with pytest.raises(IdentityMismatchError):
        stores.open("disk")


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        Stores(tmp_path, 1, "thread").open("", device=DeviceTierConfig(num_blocks=2, device="nowhere"))


def test_more_host_memory_than_there_is_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"host.num_blocks: .* are available"):
        Stores(tmp_path, 1, "thread").open("", host_blocks=1 << 40)


def test_an_integrity_key_is_needed_to_read_what_it_signed(tmp_path: Path) -> None:
    keys, blocks = make_keys(4), make_blocks(4)
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "other").write_bytes(b"o" * 32)
    stores = Stores(tmp_path, 1, "thread")
    with stores.open("disk", integrity_key_file=str(tmp_path / "key")) as store:
        store.put(keys, blocks)
    with stores.open("disk", integrity_key_file=str(tmp_path / "key")) as store:
        check_get(store, keys, blocks, 4)
    with stores.open("disk", integrity_key_file=str(tmp_path / "other")) as store:
        check_get(store, keys, blocks, 0)
    with pytest.raises(ConfigError, match="integrity_key_file"):
        stores.open("disk", integrity_key_file=str(tmp_path / "missing"))
