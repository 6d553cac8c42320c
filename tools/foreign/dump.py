"""Writes one entry of another system's store to a safetensors file, a tensor a layer."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import RenderableType

from kvstore.errors import ConfigError, DamagedFileError, NotStoredError
from kvstore.safetensors_header import MAX_HEADER_NBYTES
from tools.choice import Choice
from tools.foreign.base import ForeignEntry, ForeignPart, ForeignStore, pieces_of
from tools.foreign.look import entries_that_begin
from tools.new_file import new_file
from tools.output import lines, size


@dataclass(frozen=True, slots=True, kw_only=True)
class DumpedEntry:
    """What was written."""

    file: str
    tier: str
    entry: str
    tensors: int
    nbytes: int

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        yield from lines(f"{self.file}: {self.tensors} tensors of {self.tier} {self.entry}, {size(self.nbytes)}")


def dump_entry(stores: Sequence[ForeignStore], out: Path, choice: Choice) -> DumpedEntry:
    """Write the entry that was asked for.

    Raises:
        NotStoredError: there is none, or there are several.
        ConfigError: the file cannot be written.
    """
    store, entry = _find(stores, choice)
    try:
        parts = store.parts(entry)
        header = _header(store, entry, parts)
        with new_file(out) as file:
            file.write(header)
            for part in parts:
                _copy(file, part)
            nbytes = file.tell()
    except DamagedFileError as e:
        raise NotStoredError(f"{entry.name} is not stored soundly: {e}") from e
    return DumpedEntry(file=str(out), tier=store.kind, entry=entry.name, tensors=len(parts), nbytes=nbytes)


def _find(stores: Sequence[ForeignStore], choice: Choice) -> tuple[ForeignStore, ForeignEntry]:
    starts = choice.starts()
    if choice.request is not None:
        raise ConfigError("--request: of another system's store no journal knows; give --key or --tokens")
    if len(starts) > 1:
        raise ConfigError(f"--key: {len(starts)} of them; of another system's store give one")
    if starts:
        found = [(store, entry) for store in stores for entry in entries_that_begin(store, starts[0])]
    else:
        tokens = choice.tokens()
        found = [(store, entry) for store in stores if (entry := store.entry_of(tokens)) is not None]
    if not found:
        raise NotStoredError("nothing that was asked for is stored there")
    if len(found) > 1:
        raise NotStoredError(f"stored in {len(found)} places, as {found[0][1].place}; give the path of one")
    return found[0]


def _header(store: ForeignStore, entry: ForeignEntry, parts: Sequence[ForeignPart]) -> bytes:
    metadata = {
        "format": "kvstore foreign dump 1",
        "system": store.kind,
        "entry": entry.name,
        "layers": json.dumps({part.name: part.layer_name for part in parts}),
        "description": json.dumps(store.description()),
    }
    fields: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for part in parts:
        end = offset + part.nbytes
        fields[part.name] = {"dtype": part.dtype.safetensors, "shape": list(part.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_NBYTES:
        raise DamagedFileError(f"its description makes a header of {len(text)} bytes")
    return len(text).to_bytes(8, "little") + text


def _copy(to: BinaryIO, part: ForeignPart) -> None:
    try:
        fd = os.open(part.file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise DamagedFileError(f"{part.file}: {e.strerror}") from e
    try:
        for piece in pieces_of(fd, part):
            to.write(piece.reshape(-1).view(torch.uint8).numpy().data)
    finally:
        os.close(fd)
