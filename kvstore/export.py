"""Writes stored blocks to one safetensors file, without holding an event loop up; see `kvstore.prefix_file`."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import aiofiles
import torch

from kvstore.keys import BlockKey
from kvstore.prefix_file import PrefixHeader, pieces_of
from kvstore.store import TieredStore

_PIECE_NBYTES: Final = 32 << 20


async def export_prefix(
    store: TieredStore, keys: Sequence[BlockKey], path: str | Path, progress: Callable[[int, int], None] | None = None
) -> int:
    """Export the leading stored blocks of ``keys``; written beside ``path``, then renamed.

    Args:
        progress: called with (blocks written, blocks in all).
    Returns:
        How many blocks the file has.
    Raises:
        OSError: the file can't be written; ``path`` is as it was.
    """
    num_blocks = await asyncio.to_thread(store.prefix_hit, keys)
    temporary = Path(f"{path}.{os.getpid()}.new")
    try:
        while True:
            written = await _write(store, keys[:num_blocks], temporary, progress)
            if written == num_blocks:
                break
            num_blocks = written  # blocks were evicted meanwhile: the header must say fewer
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return num_blocks


async def _write(
    store: TieredStore, keys: Sequence[BlockKey], path: Path, progress: Callable[[int, int], None] | None
) -> int:
    """Write a file for all of ``keys``; returns how many leading blocks could be loaded."""
    step = max(1, _PIECE_NBYTES // store.layout.block_nbytes)
    out = torch.empty((min(step, len(keys)), *store.layout.block_shape), dtype=store.layout.dtype)
    header = PrefixHeader.of(store.identity, len(keys))
    start = header.pack()
    async with aiofiles.open(path, "wb") as file:
        await file.write(start)
        for first in range(0, len(keys), step):
            n = min(step, len(keys) - first)
            loaded = await asyncio.to_thread(store.get, keys[: first + n], out[:n], first_block=first)
            if loaded < n:
                return first + loaded
            for (at, _), piece in zip(header.pieces(first, n), pieces_of(out[:n]), strict=True):
                await file.seek(len(start) + at)
                await file.write(piece.view(torch.uint8).numpy().data.cast("B"))
            if progress is not None:
                progress(first + n, len(keys))
        await file.seek(len(start) + header.keys_at)
        await file.write(b"".join(keys))
        await file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return len(keys)
