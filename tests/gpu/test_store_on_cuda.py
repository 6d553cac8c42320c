"""The store with blocks in CUDA memory: right bytes under load, and near the pinned-copy limit."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch

from kvstore import DeviceTierConfig, HostTierConfig, KVIdentity, KVLayout, StoreConfig, TieredStore, hash_blocks

LAYOUT = KVLayout(num_layers=32, num_kv_heads=8, head_size=128, block_size=16, dtype=torch.bfloat16)  # 2 MiB a block
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
NUM_BLOCKS = 64


def make_store(**settings: object) -> TieredStore:
    config = {"identity": IDENTITY, "host": HostTierConfig(num_blocks=2 * NUM_BLOCKS), **settings}
    return TieredStore(StoreConfig(**config))  # type: ignore[arg-type]


def make(seed: int) -> tuple[list, torch.Tensor]:  # type: ignore[type-arg]
    keys = hash_blocks([seed * 10**6 + i for i in range(NUM_BLOCKS * 16)], 16, IDENTITY)
    generator = torch.Generator(device="cuda").manual_seed(seed)
    blocks = torch.randn((NUM_BLOCKS, *LAYOUT.block_shape), generator=generator, device="cuda", dtype=torch.bfloat16)
    return keys, blocks


def test_the_arena_is_pinned() -> None:
    with make_store() as store:
        assert torch.from_numpy(store._planes.arena.rows[0]).is_pinned()


@pytest.mark.parametrize("device_blocks", [0, NUM_BLOCKS // 2])
def test_1000_loads_under_compute_with_poisoned_blocks(device_blocks: int) -> None:
    """What `get` returned is right at once, on the caller's stream, while another one computes."""
    device = DeviceTierConfig(num_blocks=device_blocks, device="cuda") if device_blocks else None
    with make_store(device=device) as store:
        data = [make(seed) for seed in range(3)]
        busy, side = torch.randn((2048, 2048), device="cuda"), torch.cuda.Stream()
        out = torch.empty_like(data[0][1])
        for round_ in range(1000):
            keys, blocks = data[round_ % 3]
            if store.prefix_hit(keys) < NUM_BLOCKS:
                source = blocks.clone()
                assert store.put(keys, source) == NUM_BLOCKS
                source.fill_(float("nan"))  # put has copied when it returns
            with torch.cuda.stream(side):
                busy = busy @ busy / 2048
            out.fill_(float("nan"))
            assert store.get(keys, out) == NUM_BLOCKS
            assert torch.equal(out, blocks), round_


def seconds(work: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@pytest.mark.parametrize("direction", ["load", "offload"])
def test_copies_beside_a_matrix_product_run_near_the_pinned_copy_limit(
    direction: str, record_property: Callable[[str, object], None]
) -> None:
    keys, blocks = make(0)
    pinned = torch.empty(blocks.shape, dtype=blocks.dtype, pin_memory=True)
    matrix, side = torch.randn((8192, 8192), device="cuda", dtype=torch.bfloat16), torch.cuda.Stream()
    ratios = []
    with make_store() as store:
        store.put(keys, blocks)
        for round_ in range(9):
            fresh, _ = make(100 + round_)
            with torch.cuda.stream(side):
                for _ in range(20):
                    torch.mm(matrix, matrix)
            if direction == "load":
                limit = seconds(lambda: blocks.copy_(pinned, non_blocking=True))
                ours = seconds(lambda: store.get(keys, blocks))
            else:
                limit = seconds(lambda: pinned.copy_(blocks, non_blocking=True))
                ours = seconds(lambda fresh=fresh: store.put(fresh, blocks))  # type: ignore[misc]
            ratios.append(limit / ours)
    ratio = statistics.median(ratios)
    record_property("ratio_to_pinned_copy", ratio)
    print(f"{torch.cuda.get_device_name()}: {direction} at {ratio:.2f} of a pinned copy")
    assert ratio > 0.5
