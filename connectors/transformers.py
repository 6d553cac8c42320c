"""Prefix reuse for any Hugging Face causal LM: `PrefixCache` around a model and a store.

    [0, cached)      loaded from the store into a DynamicCache
    [cached, total)  computed by the model in chunks; its new full blocks are stored

Only public cache classes of transformers are used. A model whose cache is not one K and one
V of equal shape for every token in every layer is refused, naming the layer type.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch

from connectors.generate_settings import check_settings
from connectors.kv_blocks import BlockMover, BlockStore
from connectors.model_kv import ModelKV, check_identity, describe_identity, describe_kv
from kvstore import BlockKey, KVIdentity, KVLayout, hash_blocks
from kvstore.errors import ConfigError, MissingExtraError, UnsupportedModelError

try:
    from transformers import DynamicCache, DynamicLayer, PreTrainedModel
except ImportError as e:
    raise MissingExtraError("transformers", "transformers") from e

__all__ = ["PrefillResult", "PrefixCache", "identity_of", "layout_of"]

CHUNK_TOKENS: Final = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillResult:
    """What `PrefixCache.prefill` found, loaded and computed.

    Attributes:
        logits: of the last position, shape (1, vocabulary).
        kept_logits: of the last ``logits_to_keep`` computed positions, shape (1, n, vocabulary).
        past_key_values: KV of the whole prompt; pass it on to the model or to its ``generate``.
        num_cached_tokens: leading tokens whose KV was loaded.
        loaded_nbytes: bytes of the blocks loaded.
        stored_blocks: new blocks that the store took.
        load_s: finding and loading; compute_s: the model; store_s: handing new blocks over.
    """

    logits: torch.Tensor
    kept_logits: torch.Tensor
    past_key_values: DynamicCache
    num_cached_tokens: int
    loaded_nbytes: int
    stored_blocks: int
    load_s: float
    compute_s: float
    store_s: float


@dataclass(slots=True)
class _Sequence:
    """One prompt on its way: its tokens, keys, cache, and what the store has of it."""

    ids_1t: torch.Tensor
    keys: Sequence[BlockKey]
    cache: DynamicCache
    stored_blocks: int
    loaded_blocks: int
    load_s: float

    @property
    def num_cached_tokens(self) -> int:
        return int(self.cache.get_seq_length())


def layout_of(model: PreTrainedModel, block_size: int, dtype: torch.dtype | None = None) -> KVLayout:
    """The layout of a model's KV; it runs one token through the model to see it.

    Args:
        dtype: by default that of the model's own cache.
    Raises:
        UnsupportedModelError: the KV can't be represented in blocks.
    """
    layout = _kv_of(model).layout(block_size)
    if dtype is None:
        return layout
    return KVLayout(
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_size,
        block_size=block_size,
        dtype=dtype,
    )


def identity_of(
    model: PreTrainedModel, *, name: str | None = None, revision: str | None = None, block_size: int = 16
) -> KVIdentity:
    """Identity of a model as it is in memory: dtype and RoPE parameters are those in effect.

    Args:
        name: by default the model's name, or its folder's.
        revision: immutable; by default the commit on the Hub, else a SHA-256 of all weights
            (kept under ``~/.cache/kvstore`` by the files they came from). Give it if you
            changed weights of a Hub model in memory.
    Raises:
        ConfigError: the weights are not in memory and no revision is known.
        UnsupportedModelError: the KV can't be represented in blocks.
    """
    return describe_identity(model, layout_of(model, block_size), name, revision)


def _kv_of(model: PreTrainedModel) -> ModelKV:
    try:
        cache = DynamicCache(config=model.config)
    except KeyError as e:
        raise UnsupportedModelError(f"{type(model).__name__} cannot be cached in blocks: layer type {e}") from e
    return describe_kv(model, cache, DynamicLayer)


class PrefixCache:
    """Reuses stored prefixes for one model. One thread at a time; the store may be shared.

    Args:
        model: a causal LM in eval mode, on any device.
        store: a `TieredStore` whose identity is the model's (`identity_of`).
        tenant: KV of one tenant is never loaded for another.
        adapter_digest: digest of the content of the LoRA adapters in effect.
        chunk_tokens: the model computes a prompt in chunks of this to twice this many tokens.
    Raises:
        UnsupportedModelError: the model's KV can't be represented; names the layer type.
        ConfigError: the store is for another model, naming the fields; the model is in
            training mode; or adapters are in effect and have no digest.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: BlockStore,
        *,
        tenant: str = "",
        adapter_digest: bytes = b"",
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        if model.training:
            raise ConfigError("model: in training mode, where dropout makes KV random; call model.eval() first")
        if not adapter_digest and _has_adapters(model):
            raise ConfigError("adapter_digest: the model has adapters; give a digest of their content")
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens: {chunk_tokens} is not allowed; give at least 1")
        kv = _kv_of(model)
        check_identity(model, kv, store.identity)
        self._model = cast(Any, model)  # its stubs know no generate()
        self._store = store
        self._tenant, self._adapter_digest, self._chunk_tokens = tenant, adapter_digest, chunk_tokens
        self._block_size = store.layout.block_size
        self._mover = BlockMover(store.layout, kv.devices, store.blocks_per_chunk)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._device: torch.device = self._model.get_input_embeddings().weight.device

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor | Sequence[int],
        *,
        logits_to_keep: int | None = 1,
        request_id: str = "",
        progress: Callable[[int, int], None] | None = None,
    ) -> PrefillResult:
        """Load the longest stored prefix, compute the rest, store its full blocks.

        Args:
            input_ids: one prompt without padding, shape (num_tokens,) or (1, num_tokens).
            logits_to_keep: of how many last positions; None is all that are computed.
            request_id: what the store's journal calls this prompt.
            progress: called with how many of how many tokens are done.
        Raises:
            ConfigError: not one prompt of at least one token.
        """
        sequence = self._load(input_ids, request_id)
        num_tokens, cached = sequence.ids_1t.shape[1], sequence.num_cached_tokens
        start = time.perf_counter()
        keep = num_tokens - cached if logits_to_keep is None else max(1, logits_to_keep)
        pieces = []
        for end in self._chunk_ends(cached, num_tokens):
            logits = self._forward(sequence, end, keep=max(1, end - (num_tokens - keep)))
            if end > num_tokens - keep:
                pieces.append(logits)
            if progress is not None:
                progress(end, num_tokens)
        kept = torch.cat(pieces, dim=1)[:, -keep:] if len(pieces) > 1 else pieces[0][:, -keep:]
        self._synchronize()
        computed = time.perf_counter()
        stored = self._put(sequence)
        return PrefillResult(
            logits=kept[:, -1],
            kept_logits=kept,
            past_key_values=sequence.cache,
            num_cached_tokens=cached,
            loaded_nbytes=sequence.loaded_blocks * self._store.layout.block_nbytes,
            stored_blocks=stored,
            load_s=sequence.load_s,
            compute_s=computed - start,
            store_s=time.perf_counter() - computed,
        )

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor | Sequence[int], *, request_id: str = "", **kwargs: Any) -> Any:
        """As ``model.generate``, from the stored prefix; stores the full blocks of the prompt
        and of what was generated.

        Args:
            input_ids, request_id: as for `prefill`.
            kwargs: settings of a GenerationConfig, logits processors, stopping criteria, a
                streamer; an attention mask must be all ones.
        Returns:
            What ``model.generate`` returns.
        Raises:
            ConfigError: an argument that this can't do right: padding, beams, several
                sequences, another cache, embeddings or other inputs beside tokens.
        """
        check_settings(kwargs, self._model.generation_config)
        sequence = self._load(input_ids, request_id)
        mask = kwargs.pop("attention_mask", None)
        if mask is not None and not bool(torch.as_tensor(mask).all()):
            raise ConfigError("attention_mask: it masks tokens; give one prompt without padding")
        *ends, _ = self._chunk_ends(sequence.num_cached_tokens, sequence.ids_1t.shape[1])
        for end in ends:
            self._forward(sequence, end, keep=1)
        self._put(sequence)
        # The mask is given, as generate would take pad tokens within a prompt for padding.
        result = self._model.generate(
            sequence.ids_1t,
            attention_mask=torch.ones_like(sequence.ids_1t),
            past_key_values=sequence.cache,
            **kwargs,
        )
        sequence.ids_1t = result if isinstance(result, torch.Tensor) else result.sequences
        sequence.keys = self._keys(sequence.ids_1t)
        self._put(sequence)
        self._store.ended(sequence.keys[: sequence.stored_blocks], request_id=request_id, tenant=self._tenant)
        return result

    # -- loading and storing

    def _load(self, input_ids: torch.Tensor | Sequence[int], request_id: str) -> _Sequence:
        """Bring the longest stored prefix into a cache; at least one token is left to compute."""
        ids_1t = self._one_row(input_ids)
        start = time.perf_counter()
        keys = self._keys(ids_1t)
        limit_tokens = ids_1t.shape[1] - 1
        hit = self._store.prefix_hit(keys)
        wanted = min(hit, -(-limit_tokens // self._block_size))
        cache, loaded, sources = DynamicCache(config=self._model.config), 0, dict[str, int]()
        if wanted:
            layers, loaded = self._mover.load(
                wanted, lambda blocks, first: self._store.get(keys, blocks, first_block=first, sources=sources)
            )
            _fill(cache, layers, min(limit_tokens, loaded * self._block_size))
        stored = hit if loaded == wanted else loaded  # what could not be loaded is stored again
        load_s = time.perf_counter() - start
        self._store.asked(
            keys, sources, request_id=request_id, tenant=self._tenant, adapter_digest=self._adapter_digest,
            num_tokens=ids_1t.shape[1], waited_s=load_s,
        )  # fmt: skip
        return _Sequence(ids_1t, keys, cache, stored, loaded, load_s)

    def _put(self, sequence: _Sequence) -> int:
        """Store the full blocks that are in the cache and not in the store; whole chunks."""
        per_chunk = self._store.blocks_per_chunk
        first = sequence.stored_blocks // per_chunk * per_chunk
        end = sequence.num_cached_tokens // self._block_size // per_chunk * per_chunk
        if end <= max(first, sequence.stored_blocks):
            return 0
        stop = self._mover.store(
            _layers(sequence.cache), first, end, lambda kv, at: self._store.put(sequence.keys, kv, first_block=at)
        )
        new = max(0, stop - sequence.stored_blocks)
        sequence.stored_blocks = max(sequence.stored_blocks, stop)
        return new

    def _keys(self, ids_1t: torch.Tensor) -> list[BlockKey]:
        return hash_blocks(
            ids_1t[0],
            self._block_size,
            self._store.identity,
            tenant=self._tenant,
            adapter_digest=self._adapter_digest,
        )

    # -- computing

    def _chunk_ends(self, start: int, end: int) -> list[int]:
        """Where chunks end: at whole multiples, and the last one is never short.

        Kernels sum in another order for few rows, so a short last chunk would cost equality
        with a prefill in one piece.
        """
        size = self._chunk_tokens
        first = (start // size + 1) * size
        return [*range(first, end - size + 1, size), end] if end - start > size else [end]

    def _forward(self, sequence: _Sequence, end: int, *, keep: int) -> torch.Tensor:
        """Compute [cached, end); logits of the last ``keep`` of them, or of more."""
        ids = sequence.ids_1t[:, sequence.num_cached_tokens : end]
        extra = {"logits_to_keep": keep} if self._keeps_logits else {}
        output = self._model(input_ids=ids, past_key_values=sequence.cache, use_cache=True, **extra)
        logits: torch.Tensor = output.logits
        return logits if self._keeps_logits else logits[:, -keep:]

    def _one_row(self, input_ids: torch.Tensor | Sequence[int]) -> torch.Tensor:
        ids = torch.as_tensor(input_ids)
        if ids.ndim == 2 and ids.shape[0] > 1:
            raise ConfigError(
                f"input_ids: {ids.shape[0]} rows; give one prompt at a time, as each has a prefix length of its own"
            )
        if ids.ndim not in (1, 2) or ids.numel() == 0 or ids.is_floating_point():
            raise ConfigError(f"input_ids: {ids.dtype} of shape {tuple(ids.shape)}; give (num_tokens,) token ids")
        return ids.reshape(1, -1).to(device=self._device, dtype=torch.long)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()


def _fill(cache: DynamicCache, layers: Sequence[tuple[torch.Tensor, torch.Tensor]], num_tokens: int) -> None:
    """Put K and V into an empty cache without the copy that its ``update`` would make."""
    if num_tokens == 0:
        return
    for layer, (keys, values) in zip(cache.layers, layers, strict=True):
        assert isinstance(layer, DynamicLayer)
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys[:, :, :num_tokens], values[:, :, :num_tokens]


def _layers(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """K and V, each (1, heads, tokens, head_size), of every layer of a filled cache."""
    layers = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        layers.append((layer.keys, layer.values))
    return layers


def _has_adapters(model: PreTrainedModel) -> bool:
    return bool(getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False))
