"""One process of the demo: loads the model, then fills a store or answers from one.

Reads one JSON request a line from stdin, writes one JSON answer a line to stdout; see
`tools.demo` for the order of requests. Leaves when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
import transformers
from transformers import DynamicCache

from connectors.transformers import PrefixCache, identity_of
from kvstore import (
    BlockKey,
    DiskTierConfig,
    HostTierConfig,
    KVIdentity,
    SharedTierConfig,
    StoreConfig,
    TieredStore,
)
from kvstore.errors import KVStoreError
from tools.demo_model import MODEL_NAME

BLOCK_SIZE: Final = 16
_CAPACITY_NBYTES: Final = 1 << 30
_WARM_UP_TOKENS: Final = 48


class _ReadOnly:
    """A store that takes nothing, so that every question finds the same in it."""

    def __init__(self, store: TieredStore) -> None:
        self.identity, self.layout, self.blocks_per_chunk = store.identity, store.layout, store.blocks_per_chunk
        self.prefix_hit, self.get, self.asked, self.ended = store.prefix_hit, store.get, store.asked, store.ended

    def put(self, keys: Sequence[BlockKey], blocks: torch.Tensor, *, first_block: int = 0) -> int:
        return 0


class Worker:
    """The model, the store that is open, and the answers that have begun."""

    def __init__(self) -> None:
        self._model: Any = None
        self._identity: KVIdentity | None = None
        self._store: TieredStore | None = None
        self._prefix_cache: PrefixCache | None = None
        self._begun: dict[str, tuple[torch.Tensor, DynamicCache]] = {}

    @torch.no_grad()
    def load(self, model: str) -> dict[str, Any]:
        """Load the model and run something through it, so that nothing is measured cold."""
        start = time.perf_counter()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._model.eval()
        self._identity = identity_of(self._model, name=MODEL_NAME, block_size=BLOCK_SIZE)
        self._model(input_ids=torch.arange(1000, 1000 + _WARM_UP_TOKENS).unsqueeze(0), logits_to_keep=1)
        return {"seconds": time.perf_counter() - start}

    def open(self, host_blocks: int, disk: str, shared: str | None) -> dict[str, Any]:
        """Open a store; one that is open is closed first."""
        assert self._identity is not None
        self.close()
        self._store = TieredStore(
            StoreConfig(
                identity=self._identity,
                host=HostTierConfig(num_blocks=host_blocks),
                disk=DiskTierConfig(path=disk, capacity_nbytes=_CAPACITY_NBYTES),
                shared=SharedTierConfig(path=shared, capacity_nbytes=_CAPACITY_NBYTES) if shared else None,
            )
        )
        self._prefix_cache = PrefixCache(self._model, _ReadOnly(self._store))
        return {}

    def close(self) -> dict[str, Any]:
        if self._store is not None:
            self._store.close()
            self._store = self._prefix_cache = None
        return {}

    def fill(self, ids: list[int], durable_within_s: float) -> dict[str, Any]:
        """Prefill and store a prompt, until it is durable in every tier."""
        assert self._store is not None
        result = PrefixCache(self._model, self._store).prefill(ids)
        durable = self._store.flush(durable_within_s)
        if not durable:
            raise KVStoreError(f"what was stored is not durable after {durable_within_s} s")
        return {"stored_blocks": result.stored_blocks, "loaded_tokens": result.num_cached_tokens}

    @torch.no_grad()
    def first_token(self, name: str, ids: list[int], logits: str) -> dict[str, Any]:
        """From token ids to the logits of the first new token, measured; from the store if one is open."""
        if self._prefix_cache is None:
            start = time.perf_counter()
            cache = DynamicCache(config=self._model.config)
            output = self._model(input_ids=torch.tensor([ids]), past_key_values=cache, logits_to_keep=1)
            last, ttft_s = output.logits[:, -1], time.perf_counter() - start
            row = {"tokens": 0, "nbytes": 0, "load_s": 0.0}
        else:
            start = time.perf_counter()
            result = self._prefix_cache.prefill(ids)
            ttft_s = time.perf_counter() - start
            last, cache = result.logits, result.past_key_values
            row = {"tokens": result.num_cached_tokens, "nbytes": result.loaded_nbytes, "load_s": result.load_s}
        np.save(logits, last[0].float().numpy(), allow_pickle=False)
        self._begun[name] = (torch.cat([torch.tensor([ids]), last.argmax(-1, keepdim=True)], dim=1), cache)
        return {**row, "ttft_s": ttft_s}

    def answer(self, name: str, max_new_tokens: int, line_end: int) -> dict[str, Any]:
        """Go on from `first_token`, greedily, to the end of the line; the new tokens."""
        ids, cache = self._begun.pop(name)
        prompt_tokens = ids.shape[1] - 1
        ends = [line_end, self._model.config.eos_token_id]
        if int(ids[0, -1]) not in ends:
            ids = self._model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=cache,
                max_new_tokens=max_new_tokens - 1,
                do_sample=False,
                eos_token_id=ends,
            )
        return {"ids": ids[0, prompt_tokens:].tolist()}


def main() -> None:
    """Serve requests until stdin ends. What libraries print goes to stderr."""
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        command = getattr(worker, request.pop("command"))
        try:
            answer = command(**request)
        except (KVStoreError, OSError, RuntimeError) as e:
            answer = {"error": f"{type(e).__name__}: {e}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    worker.close()
    sys.stderr.flush()
    os._exit(0)  # taking apart an interpreter with a model in it takes a second


if __name__ == "__main__":
    main()
