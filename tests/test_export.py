"""Exported files are what any reader of safetensors expects."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from kvstore.export import export_prefix
from kvstore.keys import array_to_keys
from kvstore.prefix_file import PrefixFile
from tests.stores import Stores, make_blocks, make_keys


def test_export_is_byte_equal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvstore.export._PIECE_NBYTES", 5 * 1536)
    keys, blocks, seen = make_keys(24), make_blocks(24), []
    with Stores(tmp_path, 1, "thread").open("disk") as store:
        store.put(keys[:20], blocks[:20])
        path = tmp_path / "out.safetensors"
        assert asyncio.run(export_prefix(store, keys, path, lambda n, total: seen.append((n, total)))) == 20
    with safe_open(path, framework="pt") as file:
        for layer in range(blocks.shape[1]):
            for i, name in enumerate(("key", "value")):
                tokens = blocks[:20, layer, i].transpose(1, 2).flatten(0, 1)  # (tokens, heads, size)
                assert torch.equal(file.get_tensor(f"layers.{layer}.{name}"), tokens)
        assert array_to_keys(file.get_tensor("keys").numpy()) == keys[:20]
        assert json.loads(file.metadata()["identity"])["model"] == "m"
    read = PrefixFile(path)
    assert read.keys == keys[:20]
    assert torch.equal(torch.stack([read.block(i) for i in range(20)]), blocks[:20])
    read.close()
    assert seen[-1] == (20, 20) and len(seen) > 1
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == ["out.safetensors"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    with Stores(tmp_path, 1, "thread").open("") as store, pytest.raises(FileNotFoundError):
        asyncio.run(export_prefix(store, make_keys(4), tmp_path / "missing" / "out"))
    with Stores(tmp_path, 1, "thread").open("") as store:
        assert asyncio.run(export_prefix(store, make_keys(4), tmp_path / "empty")) == 0
    with safe_open(tmp_path / "empty", framework="pt") as file:
        assert file.get_tensor("layers.0.key").shape[0] == 0
