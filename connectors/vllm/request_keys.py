"""A request's block keys: the engine's own hashes, or for an adapter a chain over its content.

vLLM's hash of a request with a LoRA adapter has the adapter's name and path in it. Other
servers keep the same adapter elsewhere, so there the chain begins with a digest of its files.
"""

from __future__ import annotations

import hashlib
import logging
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from cachetools import LRUCache

from connectors.weights_digest import folder_digest
from kvstore.errors import ConfigError
from kvstore.keys import BlockKey

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_ROOT: Final = b"kvstore adapter 1\0"
_MAX_CONFIG_NBYTES: Final = 1 << 20
_MOST_ADAPTERS: Final = 4096
_FIRST_ANSWER_S: Final = 0.005


class AdapterDigests:
    """Digests of the LoRA adapters that an engine serves; each is taken once, when it is first named.

    vLLM goes on with what it has loaded, so what its files become later does not count. A thread
    reads them: the scheduler waits no longer than it takes for small files.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="kvstore-adapters")
        self._known: LRUCache[tuple[int, str], Future[bytes | None]] = LRUCache(_MOST_ADAPTERS)

    def of(self, lora: LoRARequest | None) -> bytes | None:
        """Of weights and configuration; empty without an adapter, None where it is not known (yet)."""
        if lora is None:
            return b""
        if lora.load_inplace:  # one number for what changes
            return None
        key = (lora.lora_int_id, lora.lora_path)
        if key not in self._known:
            self._known[key] = self._pool.submit(_digest_of_adapter, lora.lora_name, Path(lora.lora_path))
        try:
            return self._known[key].result(_FIRST_ANSWER_S)
        except TimeoutError:
            return None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class RequestKeys:
    """Keys of a request's full blocks whose tokens are known, by KV cache group; grows with the request.

    Args:
        adapter: `AdapterDigests.of` its adapter. With None there are no keys at all: what cannot
            be named is neither stored nor loaded.

    Attributes:
        adapter: as given.
    """

    def __init__(self, request: Request, block_size: int, num_groups: int, adapter: bytes | None) -> None:
        self._request, self._block_size = request, block_size
        self._keys: list[list[BlockKey]] = [[] for _ in range(num_groups)]
        self.adapter = adapter
        salt = (request.cache_salt or "").encode()
        self._parent = hashlib.sha256(_ROOT + (self.adapter or b"") + salt).digest()

    def __len__(self) -> int:
        """Blocks."""
        if self.adapter is None:
            return 0
        for i in range(len(self._keys[0]), len(self._request.block_hashes)):
            block_hash = self._hash(i)
            for group, keys in enumerate(self._keys):
                keys.append(BlockKey.of(block_hash, group))
        return len(self._keys[0])

    def of_blocks(self, first: int, end: int) -> list[list[BlockKey]]:
        """Those of blocks ``first`` to ``end``, by KV cache group."""
        return [keys[first : min(end, len(self))] for keys in self._keys]

    def loadable(self, first: int) -> list[list[BlockKey]]:
        """From a block on; at least one token is left to compute."""
        return self.of_blocks(first, (self._request.num_tokens - 1) // self._block_size)

    def _hash(self, i: int) -> bytes:
        block_hash = bytes(self._request.block_hashes[i])
        if not self.adapter:
            return block_hash
        if self._request.mm_features or self._request.prompt_embeds is not None:  # a session may get them later
            return hashlib.sha256(block_hash + self.adapter).digest()
        tokens = self._request.all_token_ids[i * self._block_size : (i + 1) * self._block_size]
        self._parent = hashlib.sha256(self._parent + np.asarray(tokens, dtype="<i8").tobytes()).digest()
        return self._parent


def _digest_of_adapter(name: str, folder: Path) -> bytes | None:
    try:
        with (folder / "adapter_config.json").open("rb") as f:
            config = f.read(_MAX_CONFIG_NBYTES)
        return hashlib.sha256(bytes.fromhex(folder_digest(folder)) + config).digest()
    except (ConfigError, OSError) as e:
        logger.warning("KV of adapter %s is neither stored nor loaded: %s", name, e)
        return None
