"""`kvstore dump` and `kvstore load`: a prompt's KV to a safetensors file, and from one into a store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from rich.console import RenderableType

from kvstore.byte_layout import parts_of
from kvstore.config import DiskTierConfig, HostTierConfig, SharedTierConfig, StoreConfig
from kvstore.errors import ConfigError, IdentityMismatchError, KVStoreError, NotStoredError
from kvstore.keys import keys_to_array
from kvstore.planes import Planes
from kvstore.prefix_file import PrefixFile, PrefixHeader, pieces_of
from kvstore.stored_format import StoredFormat
from tools.blocks import Place, find, read_any, same_content
from tools.choice import Choice
from tools.foreign.dump import DumpedEntry, dump_entry
from tools.new_file import check_free, new_file
from tools.output import lines, progress, size
from tools.places import find_stored

_BATCH_NBYTES: Final = 32 << 20
_ROOM_S: Final = 60.0
_FLUSH_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class Dumped:
    """What went into a file."""

    file: str
    blocks: int
    tokens: int
    nbytes: int
    is_raw: bool

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        what = "their bytes as the engine has them" if self.is_raw else "keys and values by layer"
        yield from lines(f"{self.blocks} blocks ({self.tokens} tokens, {size(self.nbytes)}): {what}, in {self.file}")


def dump_blocks(
    path: Path, out: Path, choice: Choice, integrity_key_file: str | None, *, force: bool
) -> Dumped | DumpedEntry:
    """Write what is chosen; of a prompt, the leading blocks that are stored. Of another system's store, one entry.

    Raises:
        DamagedError, ConfigError: see `write`; the file is there already.
        NotStoredError: see `tools.blocks.find`.
    """
    check_free(out, force=force)
    catalogs, stores = find_stored(path, integrity_key_file)
    if not catalogs:
        return dump_entry(stores, out, choice)
    found = find(catalogs, choice)
    return write(found if choice.starts() else _leading(found, choice), out)


class DamagedError(KVStoreError):
    """A block does not verify anywhere; nothing was written."""


def write(found: Sequence[Sequence[Place]], out: Path) -> Dumped:
    """Write blocks, each from where it is sound; beside ``out``, then renamed.

    Raises:
        DamagedError, ConfigError: blocks of several identities; the file cannot be written.
    """
    formats = [place.fmt for there in found for place in there if place.fmt is not None]
    if len(formats) < sum(map(len, found)):
        raise DamagedError("a directory's description is damaged; kvstore verify says which")
    if differs := same_content(formats):
        raise ConfigError(f"blocks of several identities: {differs}; name those of one, or a PATH that holds one")
    first = read_any(found[0])
    if first.reason:
        raise DamagedError(f"block {found[0][0].key}: {first.reason}; nothing was written")
    is_raw = first.kv is None
    header = _header(formats[0], len(found), is_raw=is_raw)
    start = header.pack()
    with new_file(out) as file, progress(f"to {out}", len(found)) as advance:
        file.write(start)
        for i, there in enumerate(found):
            for (at, _), piece in zip(header.pieces(i), _pieces(there, is_raw=is_raw), strict=True):
                file.seek(len(start) + at)
                file.write(piece.view(torch.uint8).numpy().data.cast("B"))
            advance(1)
        file.seek(len(start) + header.keys_at)
        file.write(b"".join(there[0].key for there in found))
    layout = header.layout
    return Dumped(str(out), len(found), len(found) * layout.block_size, len(start) + header.data_nbytes, is_raw)


def _leading(found: list[list[Place]], choice: Choice) -> list[list[Place]]:
    """Those blocks of a prompt before which none is missing."""
    fmt = found[0][0].fmt
    assert fmt is not None
    wanted = choice.of_prompt(fmt)
    n = next((i for i, (key, there) in enumerate(zip(wanted, found, strict=False)) if there[0].key != key), len(found))
    if not n:
        raise NotStoredError("the first block of this prompt is not stored here")
    return found[:n]


def _header(fmt: StoredFormat, num_blocks: int, *, is_raw: bool) -> PrefixHeader:
    if is_raw and fmt.slot.blocks_per_chunk > 1:
        raise ConfigError(
            f"byte layout {fmt.byte_layout!r} is not known here, and its chunks hold {fmt.slot.blocks_per_chunk} "
            "blocks: one block's bytes cannot be told from another's"
        )
    placed = {**fmt.placed, "blocks_per_chunk": 1}
    return PrefixHeader(fmt.content, placed, fmt.layout, num_blocks, is_raw)


def _pieces(there: Sequence[Place], *, is_raw: bool) -> list[torch.Tensor]:
    block = read_any(there)
    whole = block.payload if is_raw else block.kv
    if whole is None:
        raise DamagedError(f"block {there[0].key}: {block.reason}; nothing was written")
    return [whole] if is_raw else pieces_of(whole[None])


# -- load


@dataclass(frozen=True, slots=True)
class Loaded:
    """What came out of a file."""

    into: str
    blocks: int
    left_out: int

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        left = f"; {self.left_out} at the end fill no whole chunk" if self.left_out else ""
        yield from lines(f"{self.blocks} blocks are in {self.into} now{left}")


def put(
    prefix: PrefixFile, into: Path, capacity_nbytes: int, *, is_shared: bool, per_chunk: int, key_file: str | None
) -> Loaded:
    """Raises ConfigError: the store is of another identity; KVStoreError: there is no room, or it does not answer."""
    header = prefix.header
    fmt = StoredFormat.of(header.content, {**header.placed, "blocks_per_chunk": per_chunk})
    if header.is_raw and per_chunk > 1:
        raise ConfigError(f"--blocks-per-chunk: {per_chunk}; blocks whose K and V cannot be told apart go one a chunk")
    tier: dict[str, Any] = (
        {"shared": SharedTierConfig(path=str(into), capacity_nbytes=capacity_nbytes)}
        if is_shared
        else {"disk": DiskTierConfig(path=str(into), capacity_nbytes=capacity_nbytes)}
    )
    num_blocks = max(1, _BATCH_NBYTES // fmt.slot.slot_nbytes) * per_chunk
    config = StoreConfig(identity=fmt.identity(), host=HostTierConfig(num_blocks=num_blocks),
                         blocks_per_chunk=per_chunk, integrity_key_file=key_file, **tier)  # fmt: skip
    try:
        planes = Planes(config)
    except IdentityMismatchError as e:
        raise _other_identity(into, e) from e
    try:
        total = len(prefix.keys) // per_chunk * per_chunk
        with progress(f"into {into}", total) as advance:
            for n in _fill(prefix, planes, fmt, total):
                advance(n)
        if planes.io is None or not planes.io.flush(time.monotonic() + _FLUSH_S):
            raise KVStoreError(f"{into} does not take what it was given; its log says why")
    finally:
        planes.close()
    return Loaded(str(into), total, len(prefix.keys) - total)


def _other_identity(into: Path, mismatch: IdentityMismatchError) -> ConfigError:
    """What a person can do about it here: no command changes whose a directory is."""
    differences = mismatch.differences
    fields = [f"  {name}: {has!r} there, {asked!r} here" for name, (has, asked) in differences.items()]
    remedy = "give another directory, or a new one"
    if "blocks_per_chunk" in differences and differences.keys() <= {"blocks_per_chunk", "slot_nbytes"}:
        remedy = f"give --blocks-per-chunk {differences['blocks_per_chunk'][0]}"
    return ConfigError(
        "\n".join([f"--into: {str(into)!r} holds KV of another identity than the file:", *fields, remedy])
    )


def _fill(prefix: PrefixFile, planes: Planes, fmt: StoredFormat, total: int) -> Iterator[int]:
    """Fill slots chunk by chunk, and have them written."""
    per_chunk, rows = fmt.slot.blocks_per_chunk, planes.arena.rows
    for first in range(0, total, per_chunk):
        slots = planes.manager.reserve(1, time.monotonic() + _ROOM_S)
        if not len(slots):
            raise KVStoreError("no memory came free: the store does not take what it was given")
        payload = torch.from_numpy(rows[slots[0], : fmt.slot.payload_nbytes])
        for i in range(per_chunk):
            block = prefix.block(first + i)
            if prefix.header.is_raw:
                payload.copy_(block)
                continue
            for k, part in enumerate(parts_of(payload, fmt.layout, per_chunk, fmt.byte_layout, fmt.tp_size)):
                ranks = (fmt.layout.num_layers, fmt.tp_size, -1, *block.shape[3:])
                part[i].copy_(block[:, k].reshape(ranks))
        keys = keys_to_array(prefix.keys[first : first + per_chunk])[None]
        planes.publish(slots, np.ascontiguousarray(keys), planes.current())
        yield per_chunk
