"""Pages of a cache, by memmove and by way of a staging buffer: the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import connectors.pages
from connectors.base import CopyJob
from connectors.pages import PageCopier

SIZES = (96, 32, 160)  # bytes of a page, plane by plane
NUM_BLOCKS, NUM_SLOTS = 40, 12


def caches(device: str = "cpu") -> list[torch.Tensor]:
    """Planes that are strided, as where an engine keeps the blocks of all layers together."""
    memory = torch.randint(256, (NUM_BLOCKS, sum(SIZES) + 8), dtype=torch.uint8, device=device)
    starts = [sum(SIZES[:i]) for i in range(len(SIZES))]
    return [memory[:, start : start + size] for start, size in zip(starts, SIZES, strict=True)]


def round_trip(per_chunk: int, device: str, staged: bool | None) -> None:
    planes = caches(device)
    copier = PageCopier(planes, per_chunk, staged=staged)
    slots = np.zeros((NUM_SLOTS, copier.chunk_nbytes + 24), dtype=np.uint8)
    stripe = slots[:, 8 : 8 + copier.chunk_nbytes]
    rng = np.random.default_rng(per_chunk)
    n = 6 * per_chunk
    where = np.repeat(rng.permutation(NUM_SLOTS)[:6], per_chunk).tolist()
    positions = np.tile(np.arange(per_chunk), 6).tolist()
    blocks = rng.permutation(NUM_BLOCKS)[:n].tolist()
    wanted = [plane[blocks].clone() for plane in planes]
    copier.store(stripe, CopyJob(1, where, positions, blocks))
    wait(copier)
    for plane in planes:
        plane.zero_()
    order = rng.permutation(n)[: n - 1]  # a hit may begin and end inside a chunk
    others = rng.permutation(NUM_BLOCKS)[: n - 1].tolist()
    copier.load(stripe, CopyJob(2, [where[i] for i in order], [positions[i] for i in order], others))
    wait(copier)
    for plane, pages in zip(planes, wanted, strict=True):
        assert torch.equal(plane[others], pages[torch.from_numpy(order).to(plane.device)])
        untouched = sorted(set(range(NUM_BLOCKS)) - set(others))
        assert not plane[untouched].any()
    assert not slots[:, :8].any()
    assert not slots[:, 8 + copier.chunk_nbytes :].any()


def wait(copier: PageCopier) -> None:
    event = copier.mark()
    if event is not None:
        event.synchronize()


@pytest.mark.parametrize("per_chunk", [1, 3])
@pytest.mark.parametrize("staged", [False, True])
def test_round_trip(per_chunk: int, staged: bool) -> None:
    round_trip(per_chunk, "cpu", staged)


def test_more_slots_than_staging_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connectors.pages, "_STAGING_NBYTES", 2 * 3 * sum(SIZES))
    round_trip(3, "cpu", True)


@pytest.mark.parametrize(
    "job", [CopyJob(7, [NUM_SLOTS], [0], [0]), CopyJob(7, [0], [1], [0]), CopyJob(7, [0], [0], [-1])]
)
def test_out_of_bounds_copies_nothing(job: CopyJob) -> None:
    copier = PageCopier(caches(), 1)
    stripe = np.zeros((NUM_SLOTS, copier.chunk_nbytes), dtype=np.uint8)
    with pytest.raises(IndexError, match="job 7 is out of bounds"):
        copier.store(stripe, job)
    assert not stripe.any()
