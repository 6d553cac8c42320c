"""Identity of the KV of a vLLM engine, from its resolved configuration; what can't be restored right is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import vllm
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig

from connectors.weights_digest import folder_digest
from kvstore.errors import ConfigError
from kvstore.identity import KVIdentity, Placement
from kvstore.layout import KVLayout

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_DEFAULT_SEED: Final = "vllm-none-hash"  # vllm.v1.core.kv_cache_utils


class UnsupportedEngineError(ConfigError):
    """The engine is set up in a way whose KV cannot be stored and restored right."""


def identity_of(config: VllmConfig, kv_cache: KVCacheConfig, revision: str | None) -> KVIdentity:
    """Content identity and placement of one engine.

    Args:
        revision: of the weights; by default the commit on the Hub, else a digest of the files.
    Raises:
        UnsupportedEngineError: names what is not supported.
        ConfigError: no immutable revision can be found out.
    """
    spec = _spec(config, kv_cache)
    model, text = config.model_config, config.model_config.hf_text_config
    num_layers = sum(len(group.layer_names) for group in kv_cache.kv_cache_groups)
    tp_size = config.parallel_config.tensor_parallel_size
    layout = KVLayout(
        num_layers=num_layers,
        num_kv_heads=spec.num_kv_heads * tp_size,
        head_size=spec.head_size,
        block_size=spec.block_size,
        dtype=spec.dtype,
    )
    if spec.page_size_bytes * tp_size != layout.layer_nbytes:
        raise UnsupportedEngineError(
            f"a page of {spec.page_size_bytes} bytes is not {layout.layer_nbytes // tp_size}: "
            "padded pages, or scales in them, are not supported"
        )
    draft = config.speculative_config.draft_model_config if config.speculative_config is not None else None
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    return KVIdentity(
        model=str(model.served_model_name or model.model) if not os.path.isdir(model.model) else Path(model.model).name,
        revision=revision or _revision(model),
        layout=layout,
        draft_model="" if draft is None else f"{Path(draft.model).name}@{_revision(draft)}",
        kv_scales=str(config.cache_config.cache_dtype) if layout.dtype.itemsize == 1 else "",
        rope=json.dumps(rope, sort_keys=True, default=str),
        group_kind=_group_kind(spec),
        hash_algorithm=config.cache_config.prefix_caching_hash_algo,
        hash_seed=_hash_seed(config),
        placement=Placement(tp_size=tp_size, byte_layout=_byte_layout(config, kv_cache)),
    )


def _spec(config: VllmConfig, kv_cache: KVCacheConfig) -> FullAttentionSpec:
    """The one kind of KV cache that there is; raises UnsupportedEngineError for any other set-up."""
    parallel, cache = config.parallel_config, config.cache_config
    for what, value in (
        ("pipeline parallelism", parallel.pipeline_parallel_size),
        ("decode context parallelism", parallel.decode_context_parallel_size),
        ("prefill context parallelism", getattr(parallel, "prefill_context_parallel_size", 1)),
        ("tensor parallelism over hosts", getattr(parallel, "nnodes", 1)),
    ):
        if value > 1:
            raise UnsupportedEngineError(f"{what} ({value}) is not supported")
    if getattr(cache, "calculate_kv_scales", False):
        raise UnsupportedEngineError(
            "calculate_kv_scales: KV with scales found at run time cannot be reused; give static ones"
        )
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache.kv_cache_groups}
    spec = kv_cache.kv_cache_groups[0].kv_cache_spec if kv_cache.kv_cache_groups else None
    if spec is None or len(kv_cache.kv_cache_groups) != 1 or type(spec) is not FullAttentionSpec:
        raise UnsupportedEngineError(
            f"KV cache groups of {', '.join(sorted(kinds)) or 'no kind'} are not supported; one of FullAttentionSpec is"
        )
    if spec.head_size_v != spec.head_size or spec.num_heads != spec.num_kv_heads or spec.tokens_per_state != 1:
        raise UnsupportedEngineError("K and V of different sizes, or packed heads or states, are not supported")
    return spec


def _revision(model: ModelConfig) -> str:
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


def _group_kind(spec: FullAttentionSpec) -> str:
    """Sliding windows are part of what is computed, though their KV is kept in full here."""
    parts: dict[str, Any] = {"window": spec.sliding_window, "chunk": spec.attention_chunk_size}
    return "full_attention" + "".join(f" {name}={value}" for name, value in parts.items() if value)


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


def _byte_layout(config: VllmConfig, kv_cache: KVCacheConfig) -> str:
    """Pages are stored as the engine has them: its version, device and layout say how."""
    version = ".".join(vllm.__version__.split(".")[:2])
    layout = kv_cache.kv_cache_layout or config.cache_config.get_resolved_kv_cache_layout().name
    return f"vllm {version} {config.device_config.device_type} {layout}"
