"""What comes into our tiers and leaves them, as vLLM's KV events."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import attrgetter
from typing import Final

from vllm.distributed.kv_events import MEDIUM_CPU, MEDIUM_STORAGE, BlockRemoved, BlockStored, KVCacheEvent
from vllm.v1.core.kv_cache_utils import BlockHash, maybe_convert_block_hash

from kvstore.events import TierEvent

EVENT_LOG_BLOCKS: Final = 1 << 16
_MEDIUM: Final = {"host": MEDIUM_CPU, "disk": MEDIUM_STORAGE, "shared": MEDIUM_STORAGE}
_LOCALITY: Final = {"host": "LOCAL", "disk": "LOCAL", "shared": "REMOTE"}


def kv_events(events: Iterable[TierEvent], block_size: int) -> Iterator[KVCacheEvent]:
    """One event for each KV cache group; ``ownership`` names the tier. Tokens and parents are not known there."""
    for event in events:
        medium, locality, owner = _MEDIUM.get(event.tier), _LOCALITY.get(event.tier), f"kvstore.{event.tier}"
        for group, keys in groupby(sorted(event.keys, key=attrgetter("group")), key=attrgetter("group")):
            hashes = [maybe_convert_block_hash(BlockHash(key.block_hash)) for key in keys]
            if event.kind == "stored":
                yield BlockStored(
                    block_hashes=hashes, parent_block_hash=None, token_ids=[], block_size=block_size, lora_id=None,
                    medium=medium, lora_name=None, group_idx=group, locality=locality, ownership=owner,
                )  # fmt: skip
            else:
                yield BlockRemoved(
                    block_hashes=hashes, medium=medium, group_idx=group, locality=locality, ownership=owner
                )
