"""dump, load, diff and plot: what comes back is equal to the byte, and what differs is found."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kvstore import HostTierConfig, KVIdentity, KVLayout, StoreConfig, TieredStore, hash_blocks
from kvstore.byte_layout import blocks_of
from kvstore.config import DiskTierConfig
from kvstore.identity import Placement
from kvstore.prefix_file import PrefixFile, PrefixFileError, PrefixHeader
from kvstore.tiers.disk_catalog import DiskCatalog
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, copy_store, small_blocks, small_config, small_keys
from tests.tools.test_cli import kvstore, kvstore_json

TOKENS = list(range(NUM_BLOCKS * LAYOUT.block_size))


@pytest.fixture
def kv(small_store: Path, tmp_path: Path) -> Path:
    return copy_store(small_store, tmp_path / "kv")


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps([*TOKENS, 1, 2]))
    return path


def store_of(identity: KVIdentity, path: Path, per_chunk: int = 1) -> TieredStore:
    disk = DiskTierConfig(path=str(path), capacity_nbytes=64 << 20)
    host = HostTierConfig(num_blocks=16)
    return TieredStore(StoreConfig(identity=identity, host=host, disk=disk, blocks_per_chunk=per_chunk))


def test_a_prompt_is_dumped(kv: Path, prompt: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    said = kvstore_json("dump", kv / "disk", "--tokens", prompt, "--out", out)
    assert (said["blocks"], said["tokens"], said["is_raw"]) == (NUM_BLOCKS, 48, False)
    file = load_file(out)
    for layer in range(LAYOUT.num_layers):
        for i, name in enumerate(("key", "value")):
            wanted = small_blocks()[:, layer, i].transpose(1, 2).flatten(0, 1)
            assert torch.equal(file[f"layers.{layer}.{name}"], wanted)
    assert b"".join(small_keys()) == file["keys"].numpy().tobytes()
    assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == ["out.safetensors"]
    code, _, err = kvstore("dump", kv / "disk", "--tokens", prompt, "--out", out)
    assert (code, "is there already" in err) == (2, True)
    assert kvstore("dump", kv / "disk", "--tokens", prompt, "--out", out, "--force")[0] == 0


def test_of_a_prompt_the_leading_blocks_are_dumped(tmp_path: Path, prompt: Path) -> None:
    with store_of(IDENTITY, tmp_path / "disk") as store:
        keys = small_keys()
        store.put(keys, small_blocks())
        store.flush()
        store.purge([keys[7]])
    said = kvstore_json("dump", tmp_path / "disk", "--tokens", prompt, "--out", tmp_path / "a")
    assert said["blocks"] == 7
    said = kvstore_json("dump", tmp_path / "disk", "--out", tmp_path / "b", "--key", keys[9], "--key", str(keys[2])[:9])
    assert said["blocks"] == 2
    assert PrefixFile(tmp_path / "b").keys == [keys[9], keys[2]]
    for tokens, message in (("[5, 6, 7, 8]", "nothing of this prompt"), ("[5, -1]", "no list"), ("[[", "not JSON")):
        prompt.write_text(tokens)
        code, _, err = kvstore("dump", tmp_path / "disk", "--tokens", prompt, "--out", tmp_path / "c")
        assert (code, message in err) == (2, True), err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("byte_layout", ["LBKHTD", "vllm 0.32 cuda LBNHC X 9.0", "vllm 0.32 cpu LBHNC vec", "other"])
@pytest.mark.parametrize("kv_dim", [1, 2])
def test_dump_load_get_is_byte_equal(tmp_path: Path, dtype: torch.dtype, byte_layout: str, kv_dim: int) -> None:
    """Also where an engine of two ranks has stripes, and into a store that they are cut in another way for."""
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_size=8, block_size=4, dtype=dtype, kv_dim=kv_dim)
    tp_size = 1 if byte_layout == "LBKHTD" else 2
    identity = KVIdentity(model="m", revision="r", layout=layout,
                          placement=Placement(tp_size=tp_size, byte_layout=byte_layout))  # fmt: skip
    keys = hash_blocks(range(24), 4, identity)
    rng = np.random.default_rng(1)
    bytes_ = torch.from_numpy(rng.integers(0, 256, (6, layout.block_nbytes), dtype=np.uint8))
    blocks = bytes_.view(dtype).view(6, *layout.block_shape)
    with store_of(identity, tmp_path / "a") as store:
        assert store.put(keys, blocks) == 6
        assert store.flush()
    is_raw = byte_layout == "other" or (kv_dim == 1 and "cpu" in byte_layout)
    names = [option for key in keys for option in ("--key", key)]
    said = kvstore_json("dump", tmp_path / "a", "--out", tmp_path / "file", *names)
    assert said["is_raw"] == is_raw
    assert kvstore_json("load", tmp_path / "file", "--into", tmp_path / "b", "--capacity", "64MiB")["blocks"] == 6
    with store_of(identity, tmp_path / "b") as store:
        out = torch.zeros_like(blocks)
        assert store.get(keys, out) == 6
        assert torch.equal(out.flatten(1).view(torch.uint8), blocks.flatten(1).view(torch.uint8))
    if not is_raw:
        kvstore_json("load", tmp_path / "file", "--into", tmp_path / "c", "--blocks-per-chunk", 4)
        catalog = DiskCatalog(tmp_path / "c")
        (chunk,) = catalog.chunks()
        verdict = catalog.read(chunk)
        assert not verdict.reason and chunk.keys == keys[:4]
        assert verdict.row is not None and chunk.space.fmt is not None
        payload = torch.from_numpy(verdict.row[: 4 * layout.block_nbytes].copy())
        found = blocks_of(payload, layout, 4, byte_layout, tp_size)
        wanted = [blocks_of(block.contiguous().view(-1).view(torch.uint8), layout, 1, byte_layout, tp_size)[0]
                  for block in blocks[:4]]  # fmt: skip
        assert torch.equal(found.view(torch.uint8), torch.stack(wanted).view(torch.uint8))


def test_a_store_of_another_identity_is_refused(kv: Path, prompt: Path, tmp_path: Path) -> None:
    kvstore_json("dump", kv / "disk", "--tokens", prompt, "--out", tmp_path / "file")
    other = dataclasses.replace(IDENTITY, revision="other")
    store_of(other, tmp_path / "b").close()
    code, _, err = kvstore("load", tmp_path / "file", "--into", tmp_path / "b")
    assert code == 2 and "revision" in err and "other" in err
    assert "on_mismatch" not in err and "give another directory" in err
    code, _, err = kvstore("load", tmp_path / "file", "--into", kv / "disk", "--capacity", "8MiB")
    assert code == 2 and "give --blocks-per-chunk 2" in err


def test_what_is_damaged_is_not_dumped(kv: Path, tmp_path: Path) -> None:
    data = kv / "disk" / "data"
    content = bytearray(data.read_bytes())
    content[100] ^= 1
    data.write_bytes(content)
    code, _, err = kvstore("dump", kv / "disk", "--key", small_keys()[0], "--out", tmp_path / "file")
    assert code == 1 and "checksum" in err
    assert not list(tmp_path.glob("file*"))
    kvstore_json("dump", kv, "--key", small_keys()[0], "--out", tmp_path / "file")  # the shared path has it too


def test_equal_and_apart(kv: Path, prompt: Path, tmp_path: Path) -> None:
    kvstore_json("dump", kv / "disk", "--tokens", prompt, "--out", tmp_path / "a")
    found = kvstore_json("diff", tmp_path / "a", kv / "disk")
    assert found["equal"] and found["common"] == NUM_BLOCKS
    blocks = small_blocks()
    blocks[5, 1, 0, 1, 2] += 0.5
    blocks[7, 0, 1] *= 1.5
    with TieredStore(small_config(disk=tmp_path / "other")) as store:
        store.put(small_keys()[:10], blocks[:10])
        store.flush()
    code, out, _ = kvstore("diff", tmp_path / "a", tmp_path / "other", "--json")
    found = json.loads(out)
    assert code == 1 and not found["equal"]
    assert found["only_a"] == [{"key": str(k), "token": 40 + 4 * i} for i, k in enumerate(small_keys()[10:])]
    assert found["only_b"] == []
    assert found["first"] == {"key": str(small_keys()[5]), "position": 22, "token": 2, "layer": 1, "part": "K"}
    assert found["first_layer"] == 0
    layers = {(d["layer"], d["part"]): d for d in found["layers"]}
    a, b = small_blocks()[:10].double(), blocks[:10].double()
    for (layer, part), d in layers.items():
        x, y = (t[:, layer, "KV".index(part)].flatten() for t in (a, b))
        assert d["max_abs"] == pytest.approx(float((x - y).abs().max()))
        assert d["relative"] == pytest.approx(float((x - y).norm() / x.norm()))
        assert d["cosine"] == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)))
    assert kvstore("diff", tmp_path / "a", tmp_path / "other", "--key", small_keys()[5], "--atol", 0.51)[0] == 0
    assert "first apart: token 22," in kvstore("diff", tmp_path / "a", tmp_path / "other")[1]


def test_by_position_over_identities_and_dtypes(tmp_path: Path) -> None:
    """The same prompt by another model: other keys; and quantised."""
    coarse = dataclasses.replace(IDENTITY, revision="2", layout=dataclasses.replace(LAYOUT, dtype=torch.float8_e4m3fn))
    for name, identity in (("a", IDENTITY), ("b", coarse)):
        keys = hash_blocks(TOKENS, LAYOUT.block_size, identity)
        with store_of(identity, tmp_path / name) as store:
            store.put(keys, small_blocks().to(identity.layout.dtype))
            store.flush()
        options = [o for key in keys for o in ("--key", key)]
        kvstore_json("dump", tmp_path / name, "--out", tmp_path / f"{name}.file", *options)
    code, out, _ = kvstore("diff", tmp_path / "a.file", tmp_path / "b.file", "--by-position", "--json")
    found = json.loads(out)
    assert code == 1 and found["common"] == NUM_BLOCKS and found["only_a"] == []
    assert all(0.01 < d["relative"] < 0.1 and d["cosine"] > 0.99 for d in found["layers"])
    assert (
        kvstore("diff", tmp_path / "a.file", tmp_path / "b.file", "--by-position", "--rtol", 0.2, "--atol", 0.01)[0]
        == 0
    )


def test_inspect_by_head(kv: Path) -> None:
    (found,) = kvstore_json("inspect", kv / "disk", small_keys()[0], "--per-head")["blocks"]
    assert len(found["statistics"]) == 2 * LAYOUT.num_layers * LAYOUT.num_kv_heads
    part = small_blocks()[0].double()[1, 0, 1]
    row = next(s for s in found["statistics"] if (s["layer"], s["part"], s["head"]) == (1, "K", 1))
    assert row["max"] == part.max() and row["norm"] == pytest.approx(float(part.norm()))


def test_plot(kv: Path, prompt: Path, tmp_path: Path) -> None:
    said = kvstore_json("plot", kv / "disk", "--tokens", prompt, "--out", tmp_path / "out.png")
    assert (said["blocks"], said["tokens"]) == (NUM_BLOCKS, 48)
    data = (tmp_path / "out.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n") and int.from_bytes(data[16:20], "big") >= 1200
    norms = small_blocks().float().square().sum(-1).mean((0, 4)).sqrt()  # (layers, kv, heads)
    assert torch.allclose(torch.tensor(said["norm_by_head"]), norms, rtol=1e-3)


def test_plot_says_what_is_wrong(kv: Path, prompt: Path, tmp_path: Path) -> None:
    """Of the path before of what is not given; keys and prompts are looked for in a file too."""
    out, file = ("--out", tmp_path / "out.png"), tmp_path / "file"
    kvstore_json("dump", kv / "disk", "--tokens", prompt, "--out", file)
    (tmp_path / "empty").write_bytes(packed(PrefixHeader.of(IDENTITY, 0)))
    other = tmp_path / "other.json"
    other.write_text("[1, 2, 3, 4]")
    for arguments, said in (
        ((tmp_path / "nope",), "is no directory"),
        ((kv / "disk",), "give one of --key"),
        ((file, "--key", "ffffffff"), "no block whose key begins with 'ffffffff' is in this file"),
        ((file, "--tokens", other), "nothing of this prompt"),
        ((tmp_path / "empty",), "holds no block"),
    ):
        code, _, err = kvstore("plot", *arguments, *out)
        assert (code, said in err) == (2, True), err
    assert not (tmp_path / "out.png").exists()
    assert kvstore_json("plot", file, "--key", small_keys()[3], *out)["blocks"] == 1


# -- files that anybody may have written


def packed(header: PrefixHeader, **changes: Any) -> bytes:
    fields = header.fields() | changes
    text = json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + bytes(header.data_nbytes)


HEADER = PrefixHeader.of(IDENTITY, 2)
KEY0 = HEADER.fields()["layers.0.key"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"{}",
        (4).to_bytes(8, "little") + b"[[[[",
        (1 << 20).to_bytes(8, "little") + b"[" * (1 << 20),
        packed(HEADER)[:-1],
        packed(HEADER) + b"x",
        packed(HEADER, more={"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}),
        packed(HEADER, **{"layers.0.key": KEY0 | {"data_offsets": [-8, 0]}}),
        packed(HEADER, **{"layers.0.key": KEY0 | {"data_offsets": [0, 1 << 62]}}),
        packed(HEADER, **{"layers.0.key": KEY0 | {"shape": [10**9] * 5}}),
        packed(HEADER, **{"layers.0.key": KEY0 | {"dtype": "F64"}}),
        packed(HEADER, **{"layers.0.key": HEADER.fields()["layers.0.value"]}),
        packed(HEADER, keys={"dtype": "U8", "shape": [10**9, 36], "data_offsets": [0, 36 * 10**9]}),
        packed(HEADER, keys={"dtype": "U8", "shape": [True, 36], "data_offsets": [0, 36]}),
        packed(HEADER, __metadata__={"identity": "{}", "placement": "{}"}),
        packed(HEADER, __metadata__={"identity": "[" * 10000, "placement": "{}"}),
        packed(HEADER, __metadata__={"identity": '{"head_size": NaN}', "placement": "{}"}),
        packed(HEADER).replace(b'"layers.0.value"', b'"layers.0.key"  '),
    ],
    ids=range(20),
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(PrefixFileError, match="file"):
        PrefixFile(path)
    for command in (
        ["load", path, "--into", tmp_path / "x"],
        ["diff", path, path],
        ["plot", path, "--out", tmp_path / "p"],
    ):
        code, _, err = kvstore(*command)
        assert code == 2 and "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.integers(0, 1 << 30))
def test_a_file_with_changed_bytes_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int, seed: int
) -> None:
    data = bytearray(packed(HEADER))
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        data[(at + rng.randint(0, 40)) % len(data)] = byte
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(data)
    try:
        file = PrefixFile(path)
    except PrefixFileError:
        return
    assert file.block(1).shape == LAYOUT.block_shape
    file.close()
