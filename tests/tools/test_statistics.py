"""What `inspect` says of numbers is so, by layer and by head, in every dtype."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from kvstore import Placement
from kvstore.layout import DTYPES
from tests.small import IDENTITY, LAYOUT, copy_store, fill, small_blocks, small_config, small_keys
from tests.tools.test_cli import kvstore, kvstore_json
from tools.statistics import statistics_of


@pytest.mark.parametrize("dtype", [dtype.of_torch for dtype in DTYPES.values()], ids=str)
def test_numbers_of_each_head(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    block = (torch.randn(3, 2, 4, 5, 8, generator=generator) * 20).to(dtype)
    found = statistics_of(block, per_head=True)
    assert [(s.layer, s.part, s.head) for s in found] == [
        (layer, part, head) for layer in range(3) for part in "KV" for head in range(4)
    ]
    for s in found:
        values = block[s.layer, "KV".index(s.part), s.head or 0].to(torch.float64)
        assert (s.min, s.max) == (values.min(), values.max())
        assert s.mean == pytest.approx(float(values.mean()))
        assert s.norm == pytest.approx(float(values.norm()))
        assert s.zeros == int((values == 0).sum())
        largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        assert s.of_max == pytest.approx(float(values.abs().max()) / largest)
        if dtype.is_floating_point:
            exponents = [math.floor(math.log2(abs(x))) for x in values.flatten().tolist() if x]
            assert (s.min_exponent, s.max_exponent) == (min(exponents), max(exponents))
        else:
            assert s.min_exponent is None


def test_all_heads_are_one_row() -> None:
    block = torch.randn(2, 2, 4, 5, 8)
    found = statistics_of(block, per_head=False)
    assert [(s.layer, s.part, s.head) for s in found] == [(i, p, None) for i in range(2) for p in "KV"]
    assert found[3].norm == pytest.approx(float(block[1, 1].norm()))
    (latent,) = statistics_of(block[:1, :1, :1], per_head=False)
    assert latent.part == "latent"


def test_what_uses_the_dtypes_ends() -> None:
    limits = torch.finfo(torch.float8_e4m3fn)
    block = torch.ones(1, 1, 1, 1, 8)
    block[..., 0], block[..., 1], block[..., 2] = limits.max, -limits.max, limits.smallest_normal / 2
    (found,) = statistics_of(block.to(torch.float8_e4m3fn), per_head=False)
    assert (found.saturated, found.subnormals, found.of_max) == (2, 1, 1.0)
    assert found.subnormal_share == pytest.approx(1 / 8)
    assert (found.min_exponent, found.max_exponent) == (-7, 8)


def test_a_head_without_a_finite_number() -> None:
    block = torch.ones(1, 2, 2, 1, 4)
    block[0, 0, 1] = float("nan")
    block[0, 1, 0] = 0.0
    _, k1, v0, _ = statistics_of(block, per_head=True)
    assert math.isnan(k1.min) and math.isnan(k1.mean) and math.isnan(k1.norm) and k1.nan == 4
    assert k1.min_exponent is None and k1.cells()[11] == ""
    assert (v0.zeros, v0.norm, v0.min_exponent, v0.of_max) == (4, 0.0, None, 0.0)


def test_inspect_per_head(small_store: Path, tmp_path: Path) -> None:
    kv = copy_store(small_store, tmp_path / "kv")
    (found,) = kvstore_json("inspect", kv / "disk", small_keys()[5], "--per-head")["blocks"]
    assert len(found["statistics"]) == LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads
    for row in found["statistics"]:
        part = small_blocks()[5, row["layer"], "KV".index(row["part"]), row["head"]].to(torch.float64)
        assert row["norm"] == pytest.approx(float(part.norm()))
    code, out, _ = kvstore("inspect", kv / "disk", small_keys()[5], "--per-head")
    assert code == 0
    assert "head" in out and "saturated" in out


@pytest.mark.parametrize(("byte_layout", "is_known"), [("vllm 0.32 cpu LBHNC vec", True), ("other", False)])
def test_inspect_of_an_engines_pages(tmp_path: Path, byte_layout: str, is_known: bool) -> None:
    identity = dataclasses.replace(IDENTITY, placement=Placement(byte_layout=byte_layout))
    fill(small_config(identity, disk=tmp_path / "disk"))
    (found,) = kvstore_json("inspect", tmp_path, small_keys(identity)[5])["blocks"]
    assert found["ok"]
    assert bool(found["statistics"]) == is_known
    _, out, _ = kvstore("inspect", tmp_path, small_keys(identity)[5])
    assert ("is not known here" in out) == (not is_known)


def test_a_prompt_together(small_store: Path, tmp_path: Path) -> None:
    kv = copy_store(small_store, tmp_path / "kv")
    (tmp_path / "ids").write_text(json.dumps(list(range(48))))
    found = kvstore_json("inspect", kv / "disk", "--tokens", tmp_path / "ids", "--per-head")
    assert (found["blocks"], found["tokens"], found["damaged"]) == (12, 48, [])
    assert len(found["statistics"]) == LAYOUT.num_layers * 2 * LAYOUT.num_kv_heads
    for row in found["statistics"]:
        part = small_blocks()[:, row["layer"], "KV".index(row["part"]), row["head"]].to(torch.float64)
        assert row["norm"] == pytest.approx(float(part.norm()))
        assert (row["min"], row["max"]) == (part.min(), part.max())
    with (kv / "disk/data").open("r+b") as f:
        f.write(b"\xff\x00\xff")
    code, out, _ = kvstore("inspect", kv / "disk", "--tokens", tmp_path / "ids")
    assert (code, "BAD: " in out) == (1, True)
    code, _, err = kvstore("inspect", kv / "disk", "ab", "--tokens", tmp_path / "ids")
    assert (code, "KEY: give it, or" in err) == (2, True)
