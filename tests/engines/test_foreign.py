"""What vLLM's own writers write is what `tools.foreign` reads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.engines.engine import NEEDS_VLLM
from tests.foreign import BLOCK, FS_CONFIG, HEADS, LAYERS, SIZE, fs_base, tensors_of
from tests.tools.test_cli import kvstore_json

pytestmark = NEEDS_VLLM
NUM_BLOCKS = 4


def connector(path: Path, tokens: list[int]) -> Any:
    """ExampleConnector's worker side, about to store a prompt that lies in blocks 1, 2, ..."""
    from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import (
        ExampleConnector,
        ExampleConnectorMetadata,
    )

    made = ExampleConnector.__new__(ExampleConnector)
    made._block_size, made._storage_path = BLOCK, str(path)
    metadata = ExampleConnectorMetadata()
    metadata.add_request(tokens, [1, 2, 3], BLOCK, True, [])
    made._connector_metadata = metadata
    return made


def test_example_connector(tmp_path: Path) -> None:
    tokens = list(range(2 * BLOCK + 5))
    pages_lbhnc = torch.randn(len(LAYERS), NUM_BLOCKS, HEADS, BLOCK, 2 * SIZE).to(torch.bfloat16)
    made = connector(tmp_path / "kv", tokens)
    for name, pages_bhnc in zip(LAYERS, pages_lbhnc, strict=True):
        made.save_kv_layer(name, pages_bhnc, SimpleNamespace())
    (row,) = kvstore_json("ls", tmp_path / "kv")["namespaces"]
    assert (row["tier"], row["chunks"]) == ("vllm-example", 1)
    listed = tmp_path / "tokens.json"
    listed.write_text(json.dumps(tokens))
    kvstore_json("dump", tmp_path / "kv", "--tokens", listed, "--out", tmp_path / "out")
    found, metadata = tensors_of(tmp_path / "out")
    for i in range(len(LAYERS)):
        rows_thc = pages_lbhnc[i, 1:3].transpose(1, 2).reshape(2 * BLOCK, HEADS, 2 * SIZE)
        assert torch.equal(found[f"layers.{i}.kv"], rows_thc)
    assert json.loads(metadata["layers"])["layers.2.kv"] == LAYERS[2]


def test_example_connector_with_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.distributed.kv_transfer.kv_connector.v1.example_connector as module

    class Metadata:
        pass

    monkeypatch.setattr(module, "MLACommonMetadata", Metadata)
    pages_b1nc = torch.randn(NUM_BLOCKS, 1, BLOCK, 24).to(torch.bfloat16)
    connector(tmp_path / "kv", list(range(2 * BLOCK + 1))).save_kv_layer(LAYERS[0], pages_b1nc, Metadata())
    (folder,) = (tmp_path / "kv").iterdir()
    kvstore_json("dump", tmp_path / "kv", "--key", folder.name[:8], "--out", tmp_path / "out")
    assert torch.equal(tensors_of(tmp_path / "out")[0]["layers.0.latent"], pages_b1nc[1:3].reshape(2 * BLOCK, 24))


@pytest.mark.parametrize("direct", [False, True])
def test_fs_tier(tmp_path: Path, direct: bool) -> None:
    """vLLM's names, configuration and writes."""
    from vllm.v1.kv_offload.base import make_offload_key
    from vllm.v1.kv_offload.file_mapper import FileMapper
    from vllm.v1.kv_offload.tiering.fs.io import batch_store_block, probe_o_direct

    mapper = FileMapper(
        root_dir=str(tmp_path),
        **{k: v for k, v in FS_CONFIG.items() if k != "inference_engine"},  # type: ignore[arg-type]
        rank=0,
        parallel_agnostic=True,
    )
    config = Path(mapper.get_config_file_path())
    assert str(config.parent) == fs_base(tmp_path, FS_CONFIG)
    config.parent.mkdir()
    config.write_text(json.dumps(mapper.get_run_config(), indent=2, sort_keys=True))
    pages = torch.randn(2, len(LAYERS), 2, BLOCK * HEADS * 2 * SIZE).to(torch.bfloat16)
    row_nbytes = pages[0].nbytes + -pages[0].nbytes % 4096
    rows = torch.zeros(2, row_nbytes + 4096, dtype=torch.uint8)
    start = -rows.data_ptr() % 4096
    view = rows.view(-1)[start : start + 2 * row_nbytes].view(2, row_nbytes)
    view[:, : pages[0].nbytes] = pages.view(torch.uint8).reshape(2, -1)
    names = [mapper.get_file_name(make_offload_key(bytes([i]) * 32, 0)) for i in range(2)]
    use_direct = direct and probe_o_direct(str(tmp_path))
    batch_store_block(names, memoryview(view.numpy()), [0, row_nbytes], row_nbytes, use_direct)
    (row,) = kvstore_json("ls", tmp_path)["namespaces"]
    assert (row["tier"], row["model"], row["chunks"], row["nbytes"]) == ("vllm-fs", "org/model", 2, 2 * row_nbytes)
    kvstore_json("dump", tmp_path, "--key", "01" * 32, "--out", tmp_path / "out")
    found, _ = tensors_of(tmp_path / "out")
    for layer in range(len(LAYERS)):
        assert torch.equal(found[f"layers.{layer}.pages"], pages[1, layer])
