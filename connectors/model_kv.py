"""What the KV of a Hugging Face model looks like, and what names it.

Refuses models whose KV is not, for every token and layer, one K and one V of equal shape
that depend on nothing but the tokens before. Imports no engine: the adapter passes in the
empty cache that the engine would use and its class of plain attention layers.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from connectors.weights_digest import weights_digest
from kvstore.errors import ConfigError, UnsupportedModelError
from kvstore.identity import KVIdentity
from kvstore.layout import KVLayout

# RoPE whose frequencies change with the length of the whole prompt: a prefix's K then isn't its own.
_LENGTH_DEPENDENT_ROPE: Final = ("dynamic", "longrope")
_DIGEST_PREFIX: Final = "sha256:"
# What a config says about loading or output, not about the KV.
_NOT_KV: Final = {
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    *("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
    *("id2label", "label2id", "output_attentions", "output_hidden_states", "problem_type", "return_dict"),
}
_WEIGHT_FILES: Final = ("*.safetensors", "*.bin", "*.gguf")


@dataclass(frozen=True, slots=True)
class ModelKV:
    """The KV of one token, as the model's own cache holds it."""

    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    devices: tuple[torch.device, ...]  # one a layer

    def layout(self, block_size: int) -> KVLayout:
        return KVLayout(
            num_layers=len(self.devices),
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            block_size=block_size,
            dtype=self.dtype,
        )


def describe_kv(model: Any, cache: Any, plain_layer: type) -> ModelKV:
    """Inspect the config, then run one token through the model and look at what is cached.

    Args:
        cache: an empty cache made for this model's config; it is filled.
        plain_layer: the class of layers that keep K and V of every token.
    Raises:
        UnsupportedModelError: naming the layer type, or what else can't be represented.
    """
    _check_config(model, cache, plain_layer)
    weight = model.get_input_embeddings().weight
    token = torch.zeros((1, 1), dtype=torch.long, device=weight.device)
    with torch.no_grad():
        model(input_ids=token, past_key_values=cache, use_cache=True)
    shapes = set()
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer.keys, torch.Tensor) or not isinstance(layer.values, torch.Tensor):
            raise _unsupported(model, f"layer {index} caches no K and V (shared with another layer, or recurrent)")
        if layer.keys.shape != layer.values.shape or layer.keys.dtype != layer.values.dtype:
            raise _unsupported(
                model,
                f"layer {index} caches K of shape {tuple(layer.keys.shape)} but V of shape "
                f"{tuple(layer.values.shape)} (multi-head latent attention)",
            )
        shapes.add((tuple(layer.keys.shape), layer.keys.dtype))
    if len(shapes) != 1:
        raise _unsupported(model, f"its layers cache KV of different shapes: {sorted(map(str, shapes))}")
    (shape, dtype) = shapes.pop()
    if len(shape) != 4 or shape[0] != 1 or shape[2] != 1:
        raise _unsupported(model, f"one token is cached with shape {shape} instead of (1, heads, 1, head size)")
    return ModelKV(shape[1], shape[3], dtype, tuple(layer.keys.device for layer in cache.layers))


def _check_config(model: Any, cache: Any, plain_layer: type) -> None:
    config = model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(model, "encoder-decoder: its KV depends on the encoder's input")
    kinds = list(getattr(config, "layer_types", None) or ())
    for index, layer in enumerate(cache.layers):
        if type(layer) is not plain_layer:
            kind = kinds[index] if index < len(kinds) else type(layer).__name__
            raise _unsupported(model, f"layer {index} is {kind!r}{_detail(config)}; only full attention is supported")
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _unsupported(model, "its layers are recurrent: its forward takes no past_key_values")
    if len(cache.layers) != config.num_hidden_layers:
        raise _unsupported(model, f"{config.num_hidden_layers} layers share the KV of {len(cache.layers)}")
    if getattr(config, "use_bidirectional_attention", False):
        raise _unsupported(model, "bidirectional attention: a token's KV depends on later tokens")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise _unsupported(model, "tensor parallel: this process holds a part of the KV heads")
    for rope in _rope_parameters(config):
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise _unsupported(model, f"RoPE type {rope['rope_type']!r}: a prefix's K depends on the prompt's length")


def _detail(config: Any) -> str:
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(config, name, None) is not None:
            return f" ({name}={getattr(config, name)})"
    return ""


def _rope_parameters(config: Any) -> list[Mapping[str, Any]]:
    """RoPE parameters, one mapping or one a layer type."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    return nested or [rope]


def _unsupported(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} cannot be cached in blocks: {reason}")


# -- identity


def describe_identity(model: Any, layout: KVLayout, name: str | None, revision: str | None) -> KVIdentity:
    """Identity from the config as it took effect; see `connectors.transformers.identity_of`."""
    path = str(getattr(model, "name_or_path", "") or "")
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None)
    return KVIdentity(
        model=name or os.path.basename(path.rstrip("/")) * os.path.isdir(path) or path or type(model).__name__,
        revision=revision or commit_of(model) or digest_of(model),
        layout=layout,
        rope=json.dumps(rope, sort_keys=True) if rope else "",
    )


def commit_of(model: Any) -> str:
    """The commit on the Hub that the weights came from, and how they were quantised; or ""."""
    commit = getattr(model.config, "_commit_hash", None) or ""
    quantization = getattr(model.config, "quantization_config", None)
    if commit and quantization is not None:
        to_dict = getattr(quantization, "to_dict", None)
        text = json.dumps(to_dict() if to_dict else quantization, sort_keys=True, default=str)
        return f"{commit}+quantized:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return commit


def digest_of(model: Any) -> str:
    """``sha256:`` and a digest of the weights in memory and of what the config says about KV."""
    path = Path(str(getattr(model, "name_or_path", "") or "."))
    named = bool(getattr(model, "name_or_path", "")) and path.is_dir()
    files = [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)] if named else []
    weights = weights_digest(model.state_dict(), files)
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in _NOT_KV}
    text = json.dumps([weights, type(model).__name__, config], sort_keys=True, default=str)
    return _DIGEST_PREFIX + hashlib.sha256(text.encode()).hexdigest()


def check_identity(model: Any, kv: ModelKV, stored: KVIdentity) -> None:
    """Hold a store's identity against the model.

    A revision is checked where it is a digest, or a commit while the model's is known; any
    other is taken at its word. An empty ``rope`` says nothing.

    Raises:
        ConfigError: naming the fields that differ, with both values.
    """
    revision = stored.revision
    if revision.startswith(_DIGEST_PREFIX):
        revision = digest_of(model)
    elif re.match(r"[0-9a-f]{40}\b", revision):
        revision = commit_of(model) or revision
    mine = describe_identity(model, kv.layout(stored.layout.block_size), stored.model, revision)
    asked = {**stored.content(), **stored.placed(1)}
    ours = {**mine.content(), **mine.placed(1), "hash_seed": stored.hash_seed}
    if not stored.rope:
        ours["rope"] = ""
    wrong = [f"{name}: the store has {asked[name]!r}, the model has {ours[name]!r}" for name in asked]
    wrong = [line for name, line in zip(asked, wrong, strict=True) if asked[name] != ours[name]]
    if wrong:
        raise ConfigError("the store is for another model: " + "; ".join(wrong))
