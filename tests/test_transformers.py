"""`connectors.transformers`: loaded KV is compared by logits against a prefill of everything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from connectors.transformers import PrefixCache, identity_of, layout_of
from connectors.weights_digest import weights_digest
from kvstore import HostTierConfig, KVIdentity, StoreConfig, TieredStore, hash_blocks
from kvstore.errors import ConfigError, UnsupportedModelError

VOCABULARY = 1000
BLOCK = 16
# Kernels sum in another order for other numbers of rows; a wrong prefix is off by far more.
TINY = 1e-4
_SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 4096,
    # so that attention, and with it a wrong prefix, makes a difference
    "initializer_range": 0.08,
}


def build(config: transformers.PretrainedConfig, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def llama(seed: int = 0, **settings: object) -> PreTrainedModel:
    return build(LlamaConfig(**{**_SMALL, "num_key_value_heads": 4, **settings}), seed)


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llama()


@pytest.fixture(scope="module")
def identity(model: PreTrainedModel) -> KVIdentity:
    return identity_of(model, block_size=BLOCK)


@pytest.fixture
def store(identity: KVIdentity) -> Iterator[TieredStore]:
    with open_store(identity) as store:
        yield store


def open_store(identity: KVIdentity, blocks_per_chunk: int = 1) -> TieredStore:
    host = HostTierConfig(num_blocks=512)
    return TieredStore(StoreConfig(identity=identity, host=host, blocks_per_chunk=blocks_per_chunk))


def tokens(num_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


# -- prefill


@pytest.mark.parametrize(
    ("num_tokens", "cached"),
    [(700, 688), (688, 687), (17, 16), (16, 15), (10, 0), (1, 0)],
    ids=["inside a block", "multiple of a block", "a block and one", "one block", "under a block", "one token"],
)
def test_second_prefill_loads_and_gives_the_same_logits(
    model: PreTrainedModel, store: TieredStore, num_tokens: int, cached: int
) -> None:
    ids = tokens(num_tokens)
    cache = PrefixCache(model, store)
    want = full_logits(model, ids)[:, -1]
    cold, warm = cache.prefill(ids), cache.prefill(ids[0].tolist())
    assert (cold.num_cached_tokens, cold.loaded_nbytes) == (0, 0)
    assert cold.stored_blocks == num_tokens // BLOCK
    assert warm.num_cached_tokens == cached
    assert warm.stored_blocks == 0
    assert warm.loaded_nbytes == num_tokens // BLOCK * store.layout.block_nbytes
    assert warm.past_key_values.get_seq_length() == num_tokens
    assert warm.logits.shape == (1, VOCABULARY)
    assert difference(cold.logits, want) <= TINY
    assert difference(warm.logits, want) <= TINY


@pytest.mark.parametrize("shared", [1, 15, 16, 333, 512])
def test_partial_hit_reuses_whole_blocks_only(model: PreTrainedModel, store: TieredStore, shared: int) -> None:
    first, second = tokens(600), tokens(600, seed=2)
    second[:, :shared] = first[:, :shared]
    second[:, shared] = (first[:, shared] + 1) % VOCABULARY
    cache = PrefixCache(model, store)
    cache.prefill(first)
    result = cache.prefill(second)
    assert result.num_cached_tokens == shared // BLOCK * BLOCK
    assert result.stored_blocks == 600 // BLOCK - shared // BLOCK
    assert difference(result.logits, full_logits(model, second)[:, -1]) <= TINY
    assert cache.prefill(second).num_cached_tokens == 592


def test_longer_prompt_extends_what_is_stored(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(900)
    cache = PrefixCache(model, store)
    cache.prefill(ids[:, :300])
    result = cache.prefill(ids)
    assert (result.num_cached_tokens, result.stored_blocks) == (288, 56 - 18)
    assert difference(result.logits, full_logits(model, ids)[:, -1]) <= TINY


def test_a_wrong_prefix_would_be_noticed(model: PreTrainedModel) -> None:
    """TINY tells right from wrong: KV of other tokens is off by a thousand times as much."""
    right, wrong = tokens(200), tokens(200, seed=2)
    wrong[:, 150:] = right[:, 150:]
    assert difference(full_logits(model, right)[:, -1], full_logits(model, wrong)[:, -1]) > 1000 * TINY


def test_chunked_prefill_equals_one_pass(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(1297)
    done: list[tuple[int, int]] = []
    result = PrefixCache(model, store, chunk_tokens=256).prefill(
        ids, logits_to_keep=None, progress=lambda now, total: done.append((now, total))
    )
    assert done == [(256, 1297), (512, 1297), (768, 1297), (1024, 1297), (1297, 1297)]
    assert result.kept_logits.shape == (1, 1297, VOCABULARY)
    assert difference(result.kept_logits, full_logits(model, ids)) <= TINY


@pytest.mark.parametrize("keep", [1, 5, 20, 300, None])
def test_kept_logits_are_those_of_the_last_positions(
    model: PreTrainedModel, store: TieredStore, keep: int | None
) -> None:
    ids = tokens(310)
    cache = PrefixCache(model, store, chunk_tokens=4)
    cache.prefill(ids[:, :288])
    kept = cache.prefill(ids, logits_to_keep=keep).kept_logits
    assert kept.shape[1] == min(keep or 22, 22)
    assert difference(kept, full_logits(model, ids)[:, -kept.shape[1] :]) <= TINY


@pytest.mark.parametrize("blocks_per_chunk", [3, 8])
def test_stores_whole_chunks(model: PreTrainedModel, blocks_per_chunk: int) -> None:
    ids = tokens(500)
    with open_store(identity_of(model), blocks_per_chunk) as store:
        cache = PrefixCache(model, store)
        cache.prefill(ids[:, :200])
        middle, last = cache.prefill(ids), cache.prefill(ids)
    assert middle.num_cached_tokens == 200 // BLOCK // blocks_per_chunk * blocks_per_chunk * BLOCK
    assert last.num_cached_tokens == 500 // BLOCK // blocks_per_chunk * blocks_per_chunk * BLOCK
    assert difference(last.logits, full_logits(model, ids)[:, -1]) <= TINY


@pytest.mark.parametrize(
    "config",
    [
        Qwen2Config(**{**_SMALL, "num_key_value_heads": 2}),
        GPTNeoXConfig(**_SMALL),
        GPT2Config(vocab_size=VOCABULARY, n_embd=256, n_layer=3, n_head=4, n_positions=1024),
        MistralConfig(**{**_SMALL, "num_key_value_heads": 2, "sliding_window": None}),
    ],
    ids=["qwen2", "gpt-neox", "gpt2", "mistral without a window"],
)
def test_other_architectures(config: transformers.PretrainedConfig) -> None:
    model, ids = build(config), tokens(300)
    with open_store(identity_of(model)) as store:
        cache = PrefixCache(model, store)
        cache.prefill(ids[:, :100])
        result = cache.prefill(ids)
    assert result.num_cached_tokens == 96
    assert difference(result.logits, full_logits(model, ids)[:, -1]) <= TINY


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
def test_bfloat16_model_stores_bfloat16(store: TieredStore) -> None:
    """Equal to the bit. Without oneDNN, whose AMX kernels round otherwise where KV lies otherwise in memory."""
    model = llama().to(torch.bfloat16)
    ids = tokens(512)
    with open_store(identity_of(model)) as store, torch.backends.mkldnn.flags(enabled=False):
        assert store.layout.dtype == torch.bfloat16
        cache = PrefixCache(model, store)
        cache.prefill(ids[:, :256])
        result = cache.prefill(ids)
        with torch.no_grad():
            want = model(input_ids=ids[:, 256:], past_key_values=model(input_ids=ids[:, :256]).past_key_values)
    assert result.num_cached_tokens == 256
    assert difference(result.logits, want.logits[:, -1]) == 0.0


@pytest.mark.gpu
def test_model_on_a_gpu() -> None:
    model, ids = llama().to("cuda"), tokens(300).to("cuda")
    with open_store(identity_of(model)) as store:
        cache = PrefixCache(model, store)
        cache.prefill(ids[:, :100])
        result = cache.prefill(ids)
        want = full_logits(model, ids)[:, -1]
    assert result.num_cached_tokens == 96
    assert result.past_key_values.layers[0].keys.device.type == "cuda"
    assert difference(result.logits, want) <= 1e-2


# -- generate


def test_generate_equals_the_models_and_is_reused(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(200)
    cache = PrefixCache(model, store, chunk_tokens=64)
    want = model.generate(ids, max_new_tokens=40, do_sample=False)
    cold = cache.generate(ids, max_new_tokens=40, do_sample=False)
    warm = cache.generate(ids, max_new_tokens=40, do_sample=False)
    assert torch.equal(cold, want)
    assert torch.equal(warm, want)
    # KV of the last token was never computed: 239 of 240 tokens, so 14 blocks
    assert cache.prefill(want).num_cached_tokens == 14 * BLOCK
    assert difference(cache.prefill(want).logits, full_logits(model, want)[:, -1]) <= TINY


def test_generate_passes_settings_on(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(50)
    cache = PrefixCache(model, store)
    result = cache.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert result.sequences.shape == (1, 55)
    assert difference(result.logits[0], full_logits(model, ids)[:, -1]) <= TINY


def test_a_pad_token_within_the_prompt_is_a_token(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(60)
    ids[:, 20:30] = 7
    cache = PrefixCache(model, store)
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 7}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(cache.generate(ids, **settings), want)
    assert torch.equal(cache.generate(ids, **settings), want)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 2}, "num_beams"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        ({"use_cache": False}, "use_cache"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"inputs_embeds": torch.zeros(1, 3, 512)}, "inputs_embeds"),
        ({"pixel_values": torch.zeros(1, 3)}, "pixel_values"),
        ({"attention_mask": torch.tensor([[0, 1, 1]])}, "attention_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_generate_refuses_what_it_would_do_wrong(
    model: PreTrainedModel, store: TieredStore, settings: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        PrefixCache(model, store).generate(tokens(3), **settings)


@pytest.mark.parametrize("bad", [torch.zeros(2, 5, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(5)])
def test_inputs_that_are_not_one_prompt_are_refused(
    model: PreTrainedModel, store: TieredStore, bad: torch.Tensor
) -> None:
    with pytest.raises(ConfigError, match="input_ids"):
        PrefixCache(model, store).prefill(bad)


# -- who may share


def test_tenants_and_adapters_do_not_share(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(100)
    PrefixCache(model, store).prefill(ids)
    for other in (PrefixCache(model, store, tenant="b"), PrefixCache(model, store, adapter_digest=b"lora")):
        assert other.prefill(ids).num_cached_tokens == 0
        assert other.prefill(ids).num_cached_tokens == 96
    assert PrefixCache(model, store, tenant="b").prefill(ids).num_cached_tokens == 96


def test_wrong_weights_are_refused(store: TieredStore) -> None:
    with pytest.raises(ConfigError, match="revision: the store has 'sha256:"):
        PrefixCache(llama(seed=1), store)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_hidden_layers": 4}, "num_layers: the store has 8, the model has 4"),
        ({"num_key_value_heads": 2}, "num_kv_heads: the store has 4, the model has 2"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}, "rope: "),
        ({"rms_norm_eps": 1e-3}, "revision: "),
    ],
)
def test_other_configs_are_refused(store: TieredStore, settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        PrefixCache(llama(**settings), store)


def test_other_dtype_is_refused(store: TieredStore) -> None:
    with pytest.raises(ConfigError, match="dtype: the store has 'float32', the model has 'bfloat16'"):
        PrefixCache(llama().to(torch.bfloat16), store)


def test_revision_of_ones_own_is_taken_at_its_word(model: PreTrainedModel) -> None:
    identity = KVIdentity(model="mine", revision="release-7", layout=layout_of(model, BLOCK))
    with open_store(identity) as store:
        assert PrefixCache(model, store).prefill(tokens(32)).stored_blocks == 2


def test_model_with_adapters_needs_their_digest(store: TieredStore) -> None:
    model = llama()
    model.peft_config = {"default": object()}
    with pytest.raises(ConfigError, match="adapter_digest"):
        PrefixCache(model, store)
    PrefixCache(model, store, adapter_digest=b"\x01" * 32)


def test_training_mode_is_refused(store: TieredStore) -> None:
    with pytest.raises(ConfigError, match="eval"):
        PrefixCache(llama().train(), store)


# -- identity


def test_identity_says_what_took_effect() -> None:
    model = llama(num_hidden_layers=2, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    identity = identity_of(model.to(torch.float16), name="tiny", revision="abc", block_size=32)
    assert (identity.model, identity.revision, identity.layout.dtype) == ("tiny", "abc", torch.float16)
    assert '"factor": 2.0' in identity.rope
    assert identity.layout.block_shape == (2, 2, 4, 32, 64)
    assert layout_of(model, 32, torch.bfloat16).dtype == torch.bfloat16


def test_identity_is_equal_after_saving_and_loading(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=2)
    model.save_pretrained(tmp_path / "tiny")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    assert identity_of(loaded).model == "tiny"
    assert identity_of(loaded, name="x") == identity_of(model, name="x")


def test_digest_of_files_is_kept_and_sees_changed_weights(tmp_path: Path) -> None:
    state = {"a": torch.arange(1000.0), "b": torch.ones(3, 5)}
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"x")
    digests = tmp_path / "cache" / "kvstore" / "digests"
    first = weights_digest(state, [file])
    assert first == weights_digest(state) == weights_digest(state, [file])
    (entry,) = digests.iterdir()
    entry.write_text("0" * 64)
    assert weights_digest(state, [file]) == "0" * 64  # so it is read
    entry.write_text("garbage")
    assert weights_digest(state, [file]) == first
    file.write_bytes(b"y2")
    weights_digest(state, [file])
    assert len(list(digests.iterdir())) == 2
    state["a"] += 1  # changed in memory, files as before
    assert weights_digest(state, [file]) != first


def test_weights_not_in_memory_need_a_revision() -> None:
    with pytest.raises(ConfigError, match="revision="):
        weights_digest({"w": torch.empty(3, device="meta")})


# -- refused models

_TINY = {**_SMALL, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (MistralConfig(**{**_TINY, "num_key_value_heads": 2, "sliding_window": 64}), "DynamicSlidingWindowLayer.*64"),
        (Gemma2Config(**{**_TINY, "num_key_value_heads": 2, "head_dim": 16}), "'sliding_attention'"),
        (
            Llama4TextConfig(
                **{**_TINY, "num_key_value_heads": 2, "intermediate_size_mlp": 64, "num_local_experts": 1}
            ),
            "'chunked_attention'",
        ),
        (MambaConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2), "'linear_attention'"),
        (
            JambaConfig(**{**_TINY, "num_key_value_heads": 2, "use_mamba_kernels": False, "num_experts": 2}),
            "'linear_attention'",
        ),
        (
            LlamaConfig(**{**_TINY, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
            "dynamic",
        ),
        (
            DeepseekV3Config(
                **{**_TINY, "num_key_value_heads": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
                qk_nope_head_dim=8,
                v_head_dim=8,
                n_routed_experts=8,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
                moe_intermediate_size=32,
            ),
            "latent attention",
        ),
    ],
    ids=["mistral", "gemma2", "llama4", "mamba", "jamba", "dynamic rope", "mla"],
)
def test_model_that_cannot_be_represented_is_refused(config: transformers.PretrainedConfig, named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        layout_of(build(config), BLOCK)


def test_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        layout_of(T5ForConditionalGeneration(config).eval(), BLOCK)


def test_hash_blocks_names_what_prefill_stores(model: PreTrainedModel, store: TieredStore) -> None:
    ids = tokens(100)
    PrefixCache(model, store, tenant="t").prefill(ids)
    assert store.prefix_hit(hash_blocks(ids[0], BLOCK, store.identity, tenant="t")) == 6
