"""Stores of other systems, in their formats, without them; `tests/engines/test_foreign.py` has vLLM's own writers."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

LAYERS = ("model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn", "model.layers.10.self_attn.attn")
TOKENS, HEADS, SIZE, BLOCK = 32, 2, 8, 16


def prompt_folder(path: Path, tokens: list[int], layers: dict[str, torch.Tensor]) -> Path:
    """As ExampleConnector has it."""
    name = hashlib.md5(np.asarray(tokens, dtype="<i8").tobytes(), usedforsecurity=False).hexdigest()
    (path / name).mkdir(parents=True)
    for layer, kv in layers.items():
        save_file({"kv_cache": kv}, path / name / f"{layer}.safetensors")
    return path / name


def example_store(path: Path) -> dict[str, torch.Tensor]:
    """Two prompts' folders; returns the layers of that of the tokens 0 to 31."""
    generator = torch.Generator().manual_seed(3)
    kv = {n: torch.randn(TOKENS, HEADS, 2 * SIZE, generator=generator).to(torch.bfloat16) for n in LAYERS}
    prompt_folder(path, list(range(TOKENS)), kv)
    prompt_folder(path, list(range(BLOCK)), {n: t[:BLOCK].clone() for n, t in kv.items()})
    return kv


FS_CONFIG = {
    "model_name": "org/model",
    "tokens_per_hash": BLOCK,
    "blocks_per_file": 2,
    "tp_size": 1,
    "pp_size": 1,
    "pcp_size": 1,
    "dcp_size": 1,
    "dtype": "bfloat16",
    "kv_cache_groups": [{"tokens_per_block": BLOCK, "layer_names": list(LAYERS)}],
    "inference_engine": "vllm",
}


def fs_base(path: Path, config: dict[str, object]) -> str:
    canonical = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    return f"{path}/{str(config['model_name']).replace('/', '_')}_{hashlib.sha256(canonical).hexdigest()[:12]}"


def fs_store(path: Path, num_files: int = 3, **changes: object) -> torch.Tensor:
    """As vLLM's fs tier has it; returns the pages, (file, layer, block, element)."""
    config = {**FS_CONFIG, **changes}
    base = fs_base(path, config)
    Path(base).mkdir(parents=True)
    (Path(base) / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    shape = (num_files, len(LAYERS), 2, BLOCK * HEADS * 2 * SIZE)
    pages = torch.randn(shape, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    for i in range(num_files):
        name = hashlib.sha256(bytes([i])).hexdigest()
        folder = Path(f"{base}_r0/{name[:3]}/{name[3:5]}_g0")
        folder.mkdir(parents=True)
        data = pages[i].view(torch.uint8).numpy().tobytes()
        (folder / f"{name}.bin").write_bytes(data + bytes(-len(data) % 4096))
    return pages


def tensors_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is in a dump, and its metadata."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
