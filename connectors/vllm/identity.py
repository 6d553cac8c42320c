"""Identity of the KV of a vLLM engine, from its resolved configuration."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import vllm
from vllm.platforms import current_platform

from connectors.vllm.groups import CacheGroups
from connectors.weights_digest import folder_digest
from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity, Placement

if TYPE_CHECKING:
    from vllm.config import LoadConfig, ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_NOT_EFFECTIVE: Final = ("_name_or_path", "_commit_hash", "transformers_version", "architectures")
_WITHOUT_DRAFT_MODEL: Final = ("ngram", "ngram_gpu", "suffix", "custom_class")
_DEFAULT_SEED: Final = "vllm-none-hash"  # vllm.v1.core.kv_cache_utils


def identity_of(config: VllmConfig, kv_cache: KVCacheConfig, groups: CacheGroups, revision: str | None) -> KVIdentity:
    """Content identity and placement of one engine.

    Args:
        revision: of the weights; by default the commit on the Hub, else a digest of the files.
    Raises:
        ConfigError: no immutable revision can be found out.
    """
    model, text = config.model_config, config.model_config.hf_text_config
    draft = _draft_model(config)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return KVIdentity(
        model=Path(model.model).name if os.path.isdir(model.model) else model.model,
        revision=_with_effective(revision or _revision(config.load_config, model), model),
        layout=groups.layout,
        draft_model=""
        if draft is None
        else f"{Path(draft.model).name}@{_with_effective(_revision(config.load_config, draft), draft)}",
        kv_scales=str(config.cache_config.cache_dtype) if groups.layout.dtype.itemsize == 1 else "",
        rope=json.dumps(rope, sort_keys=True, default=str),
        group_kind=groups.kind,
        hash_algorithm=config.cache_config.prefix_caching_hash_algo,
        hash_seed=_hash_seed(config),
        placement=Placement(tp_size=groups.num_stripes, byte_layout=_byte_layout(config, kv_cache, groups)),
    )


def _draft_model(config: VllmConfig) -> ModelConfig | None:
    """The model that drafts, where it has KV of its own."""
    speculative = config.speculative_config
    if speculative is None or speculative.method in _WITHOUT_DRAFT_MODEL:
        return None
    return speculative.draft_model_config


def _with_effective(revision: str, model: ModelConfig) -> str:
    """Weights, and a digest of what vLLM makes of them: overrides, quantization, dtype."""
    values = {name: value for name, value in model.hf_text_config.to_dict().items() if name not in _NOT_EFFECTIVE}
    told = [values, str(model.quantization), str(model.dtype)]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
    return f"{revision} config:{digest[:16]}"


def _revision(load: LoadConfig, model: ModelConfig) -> str:
    if load.load_format == "dummy":
        return f"dummy weights of seed {model.seed}"
    for commit in (model.revision, getattr(model.hf_config, "_commit_hash", None)):
        if commit and _COMMIT.fullmatch(commit):
            return str(commit)
    path = Path(model.model)
    if path.exists():
        return folder_digest(path)
    raise ConfigError(
        f"{model.model}: no immutable revision is known; give --revision with a commit, "
        "or model_revision in kv_connector_extra_config"
    )


def revision_of_name(model: str) -> str:
    """Of a model in a folder, of which no more is known: a digest of its weights and of its ``config.json``.

    Raises:
        ConfigError: it is not in a folder.
    """
    path = Path(model)
    if not path.is_dir():
        raise ConfigError(f"model_revision: not set, and {model!r} is no folder; give the commit that is served")
    config = path / "config.json"
    told = config.read_bytes() if config.is_file() else b""
    return hashlib.sha256(folder_digest(path).encode() + told).hexdigest()


def _hash_seed(config: VllmConfig) -> str:
    algorithm, seed = config.cache_config.prefix_caching_hash_algo, os.environ.get("PYTHONHASHSEED")
    if seed is not None:
        return seed
    if not algorithm.startswith("sha256"):
        raise ConfigError(
            f"prefix_caching_hash_algo {algorithm!r} begins every process with a random seed; "
            "set PYTHONHASHSEED to one number everywhere, or use sha256"
        )
    return _DEFAULT_SEED


def _byte_layout(config: VllmConfig, kv_cache: KVCacheConfig, groups: CacheGroups) -> str:
    """Pages are stored as the engine has them: its version, device and layout say how."""
    version = ".".join(vllm.__version__.split(".")[:2])
    layout = kv_cache.kv_cache_layout or config.cache_config.get_resolved_kv_cache_layout().name
    return f"vllm {version} {config.device_config.device_type} {layout} {_packing(config, groups)}"


def _packing(config: VllmConfig, groups: CacheGroups) -> str:
    """What else decides how attention packs a page: on a CPU its instructions, on a GPU which backend is chosen."""
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        layout = groups.layout
        return str(
            _get_attn_isa(
                config.model_config.dtype, layout.block_size, layout.head_size, config.cache_config.cache_dtype
            )
        )
    return f"{getattr(config.attention_config, 'backend', None)} {device_text()}"


def device_text() -> str:
    """What a device is, as far as it decides how attention packs a page."""
    if current_platform.is_cpu():
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    switches = {k: v for k, v in sorted(os.environ.items()) if k.startswith(("VLLM_ROCM_", "VLLM_USE_TRITON_"))}
    return f"{current_platform.device_type} {current_platform.get_device_capability()} {switches or ''}".strip()
