"""The NCCL pipe proper, between two GPUs: the same suite as every pipe's."""

from __future__ import annotations

import pytest
import torch

from connectors.nccl import NcclEnd
from connectors.pipe import PipeEnd
from connectors.testing import PipeTests
from connectors.testing.pipe_content import MAX_NBYTES, join, make_arena
from kvstore.arena import HostArena

TIMEOUT_S = 60.0
pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices: NCCL takes one for each end of a pipe"
)


def make_end(arena: HostArena, *, is_server: bool, max_nbytes: int = MAX_NBYTES) -> PipeEnd:
    device = torch.device("cuda", 0 if is_server else 1)
    return NcclEnd(arena.rows, is_server=is_server, max_nbytes=max_nbytes, device=device)


class TestNcclPipeOnGpus(PipeTests):
    end = make_end
    leak_rounds = 5


def test_a_tensor_stays_on_the_gpu() -> None:
    """From one device to the other, without a copy in host memory."""
    arena = make_arena()
    ends = [make_end(arena, is_server=first) for first in (True, False)]
    a, b = join(*ends)
    sent = torch.arange(1000, device="cuda:0")
    try:
        a.send_tensor(sent, TIMEOUT_S)
        came = b.recv_tensor(TIMEOUT_S)
        assert came is not None and came.device == torch.device("cuda", 1)
        assert torch.equal(came.cpu(), sent.cpu())
    finally:
        for opened in (a, b, *ends, arena):
            opened.close()
