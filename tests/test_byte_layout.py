"""Blocks are told apart the same in every known order of bytes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys

import pytest
import torch

from kvstore import KVLayout
from kvstore.byte_layout import blocks_of, parts_of, payload_tensors
from kvstore.errors import KVStoreError

LAYOUT = KVLayout(num_layers=3, num_kv_heads=4, head_size=8, block_size=5, dtype=torch.bfloat16)
PER_CHUNK = 2


@pytest.fixture
def blocks() -> torch.Tensor:
    return torch.randn(PER_CHUNK, *LAYOUT.block_shape).to(LAYOUT.dtype)


def payload_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).reshape(-1)


def test_the_stores_own(blocks: torch.Tensor) -> None:
    payload = payload_of(blocks.transpose(0, 1))
    assert torch.equal(blocks_of(payload, LAYOUT, PER_CHUNK, "LBKHTD", 1), blocks)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_an_engines_pages(blocks: torch.Tensor, order: str, tp_size: int) -> None:
    ranks = []
    for part_bl2htd in blocks.chunk(tp_size, dim=3):
        pages_lbhtc = torch.cat([part_bl2htd[:, :, 0], part_bl2htd[:, :, 1]], dim=-1).transpose(0, 1)
        ranks.append(pages_lbhtc if order == "LBHNC" else pages_lbhtc.transpose(2, 3))
    payload = payload_of(torch.stack(ranks))
    assert torch.equal(blocks_of(payload, LAYOUT, PER_CHUNK, f"vllm 0.32 cuda {order}", tp_size), blocks)


@pytest.mark.parametrize(("tp_size", "names"), [(1, ["layer.000"]), (2, ["rank.0.layer.000", "rank.1.layer.002"])])
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_tensors_of_an_engines_pages(blocks: torch.Tensor, order: str, tp_size: int, names: list[str]) -> None:
    """Each is what its name and shape say: pages of a rank's heads, K then V."""
    parts = payload_tensors(LAYOUT, PER_CHUNK, f"vllm 0.32 cuda {order}", tp_size)
    assert set(names) <= {part.name for part in parts}
    sizes = [math.prod(part.shape) * 2 for part in parts]
    assert sum(sizes) == PER_CHUNK * LAYOUT.block_nbytes
    pages_bhtc = torch.cat([blocks[:, 2, 0], blocks[:, 2, 1]], dim=-1).chunk(tp_size, dim=1)[-1]
    wanted = pages_bhtc if order == "LBHNC" else pages_bhtc.transpose(1, 2)
    ranks = []
    for part_bl2htd in blocks.chunk(tp_size, dim=3):
        pages_lbhtc = torch.cat([part_bl2htd[:, :, 0], part_bl2htd[:, :, 1]], dim=-1).transpose(0, 1)
        ranks.append(pages_lbhtc if order == "LBHNC" else pages_lbhtc.transpose(2, 3))
    payload = payload_of(torch.stack(ranks))
    last = payload[-sizes[-1] :].view(parts[-1].dtype.of_torch).reshape(parts[-1].shape)
    assert torch.equal(last, wanted)


@pytest.mark.parametrize(
    "byte_layout", ["LBKHTD", "vllm 0.32 cuda LBHNC X 9.0", "vllm 0.32 cuda LBNHC", "vllm 0.32 cpu LBHNC vec"]
)
def test_what_is_written_to_its_parts_is_there(blocks: torch.Tensor, byte_layout: str) -> None:
    tp_size = 1 if byte_layout == "LBKHTD" else 2
    payload = torch.zeros(PER_CHUNK * LAYOUT.block_nbytes, dtype=torch.uint8)
    for i, part in enumerate(parts_of(payload, LAYOUT, PER_CHUNK, byte_layout, tp_size)):
        part.copy_(blocks[:, :, i].unflatten(2, (tp_size, -1)))
    assert torch.equal(blocks_of(payload, LAYOUT, PER_CHUNK, byte_layout, tp_size), blocks)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed")
@pytest.mark.parametrize(("dtype", "packing", "size"), [(torch.float32, "vec", 64), (torch.bfloat16, "vec", 32),
                                                        (torch.bfloat16, "vec16", 80)])  # fmt: skip
def test_what_vllms_cpu_attention_writes(dtype: torch.dtype, packing: str, size: int) -> None:
    """By its own kernel, in a process of its own."""
    code = f"""
import sys, torch
from vllm import _custom_ops as ops
kv = torch.zeros(2, 3, 64, 2 * {size}, dtype={dtype})
k, v = torch.randn(2, 128, 3, {size}).to({dtype})
keys, values = kv.view(2, 3, 128, {size}).chunk(2, dim=2)
ops.cpu_attn_reshape_and_cache(k, v, keys, values, torch.arange(128), "{packing}")
parts = [t.contiguous().view(torch.uint8).numpy().tobytes() for t in (kv, k, v)]
sys.stdout.buffer.write(b"here they come:" + b"".join(parts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=150)
    data = torch.frombuffer(bytearray(done.stdout.partition(b"here they come:")[2]), dtype=dtype).view(4, -1)
    layout = KVLayout(num_layers=1, num_kv_heads=3, head_size=size, block_size=64, dtype=dtype)
    for block, payload in enumerate(data[:2].view(torch.uint8).view(2, -1)):
        found = blocks_of(payload.clone(), layout, 1, f"vllm 0.32 cpu LBHNC {packing}", 1)[0, 0]
        for i in range(2):
            assert torch.equal(found[i], data[2 + i].view(2, 64, 3, size)[block].transpose(0, 1))


def test_what_is_not_known_is_bytes() -> None:
    for layout, tp_size in (("other", 1), ("vllm 0.32 cuda LBHNC", 3)):
        (part,) = payload_tensors(LAYOUT, PER_CHUNK, layout, tp_size)
        assert (part.name, part.dtype.name, part.shape) == ("payload", "uint8", (PER_CHUNK * LAYOUT.block_nbytes,))
    many = KVLayout(num_layers=1 << 17, num_kv_heads=1, head_size=1, block_size=1, dtype=torch.uint8)
    assert len(payload_tensors(many, 1, "LBKHTD", 1)) == 1


def test_another_is_refused(blocks: torch.Tensor) -> None:
    with pytest.raises(KVStoreError, match="byte layout 'other' is not known"):
        blocks_of(payload_of(blocks), LAYOUT, PER_CHUNK, "other", 1)
