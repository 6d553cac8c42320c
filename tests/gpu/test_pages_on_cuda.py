"""An engine's pages in CUDA memory: the same bytes as on a CPU, on the caller's stream."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from connectors.base import CopyJob
from connectors.pages import PageCopier
from kvstore.arena import HostArena
from tests.test_pages import round_trip

NUM_LAYERS, NUM_BLOCKS, PAGE_NBYTES, NUM_SLOTS = 32, 256, 64 << 10, 128


@pytest.mark.parametrize("per_chunk", [1, 3])
def test_round_trip(per_chunk: int) -> None:
    round_trip(per_chunk, "cuda", None)


def test_1000_loads_beside_compute_with_poisoned_pages() -> None:
    """What follows on the stream reads what was loaded, while another stream computes."""
    cache = torch.zeros((NUM_LAYERS, NUM_BLOCKS, PAGE_NBYTES), dtype=torch.uint8, device="cuda")
    copier = PageCopier(list(cache), 1)
    arena = HostArena(NUM_SLOTS, copier.chunk_nbytes)
    try:
        arena.rows[:] = np.random.default_rng(0).integers(0, 256, arena.rows.shape, dtype=np.uint8)
        sums = torch.from_numpy(arena.rows.astype(np.int64).sum(axis=1))
        busy, side = torch.randn((2048, 2048), device="cuda"), torch.cuda.Stream()
        rng = np.random.default_rng(1)
        for round_ in range(1000):
            slots, blocks = rng.permutation(NUM_SLOTS)[:16], rng.permutation(NUM_BLOCKS)[:16]
            with torch.cuda.stream(side):
                busy = busy @ busy / 2048
            cache.fill_(255)
            copier.load(arena.rows, CopyJob(round_, slots.tolist(), [0] * 16, blocks.tolist()))
            found = cache[:, torch.from_numpy(blocks).cuda()].sum(dim=(0, 2), dtype=torch.int64)
            assert torch.equal(found.cpu(), sums[slots]), round_
    finally:
        arena.close()
