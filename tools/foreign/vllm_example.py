"""Folders of vLLM's ExampleConnector, SharedStorageConnector in older versions: a prompt's KV, a file a layer.

    <path>/<hash of the prompt's token ids>/<layer name>.safetensors

Each file has one tensor, ``kv_cache``: (tokens, heads, K then V), for MLA (tokens, latent), and in
versions up to 0.10 (2, tokens, heads, head size). With vLLM's CPU attention a row is not a token: it packs K
and V by block, and the folder does not say how large a block is. So both halves of a row are one
part here, "kv". As of vLLM 0.32, ``vllm/distributed/kv_transfer/kv_connector/v1/example_connector.py``.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.errors import DamagedFileError
from kvstore.safetensors_header import read_header
from tools.foreign.base import MAX_ENTRIES, ForeignEntry, ForeignPart, ForeignStore

_FOLDER: Final = re.compile(r"[0-9a-f]{32}|[0-9a-f]{64}")  # MD5, or SHA-256 where that is not allowed
_SUFFIX: Final = ".safetensors"
_NUMBER: Final = re.compile(r"\d+")
_MAX_LAYERS: Final = 4096
_TENSOR: Final = "kv_cache"


def is_example_folder(path: Path) -> bool:
    """Whether a prompt's folder is right below."""
    try:
        with os.scandir(path) as entries:
            return any(_FOLDER.fullmatch(e.name) and _has_layers(e) for e in entries)
    except OSError:
        return False


class VllmExampleStore(ForeignStore):
    """See `ForeignStore`. An entry is a prompt."""

    kind = "vllm-example"

    def description(self) -> dict[str, Any]:
        for entry in self.entries():
            try:
                parts = self.parts(entry)
            except DamagedFileError as e:
                self.problem(f"{entry.place}: {e}")
                continue
            first = parts[0]
            return {"layers": len({p.layer_name for p in parts}), "dtype": first.dtype.name, "layer": first.layer_name}
        return {}

    def entries(self) -> Iterator[ForeignEntry]:
        try:
            with os.scandir(self.path) as found:
                names = sorted(e.name for e, _ in zip(found, range(MAX_ENTRIES), strict=False) if _is_entry(e))
        except OSError as e:
            self.problem(f"{self.path}: {e.strerror}")
            return
        for name in names:
            files = self._files(self.path / name)
            stats = [status for _, status in files]
            if stats:
                nbytes, time_ns = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
                yield ForeignEntry(name, self.path / name, nbytes, time_ns)

    def parts(self, entry: ForeignEntry) -> list[ForeignPart]:
        found: list[ForeignPart] = []
        for number, (file, _) in enumerate(self._files(entry.place)):
            try:
                fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                try:
                    tensors = read_header(fd).tensors
                finally:
                    os.close(fd)
            except OSError as e:
                raise DamagedFileError(f"{file.name}: {e.strerror}") from e
            place = tensors.get(_TENSOR)
            if place is None or not place.nbytes:
                raise DamagedFileError(f"{file.name}: has no tensor {_TENSOR!r}, or an empty one")
            name, shape, at = file.name.removesuffix(_SUFFIX), place.shape, place.offset
            if len(shape) == 4 and shape[0] == 2:
                half = ForeignPart(number, name, "key", place.dtype, shape[1:], file, at)
                found += [half, ForeignPart(number, name, "value", place.dtype, shape[1:], file, at + half.nbytes)]
            elif len(shape) in (2, 3):
                part = "latent" if len(shape) == 2 else "kv"
                found.append(ForeignPart(number, name, part, place.dtype, shape, file, at))
            else:
                raise DamagedFileError(f"{file.name}: {_TENSOR} of shape {shape}")
        if not found:
            raise DamagedFileError("has no layers")
        return found

    def entry_of(self, tokens: Sequence[int]) -> ForeignEntry | None:
        """vLLM names a folder by whole blocks of a prompt, of a size that it does not say: each length is tried."""
        known, best = {entry.name: entry for entry in self.entries()}, None
        for algorithm in ("md5", "sha256"):
            chain = hashlib.new(algorithm, usedforsecurity=False)
            for token in np.asarray(tokens, dtype="<i8"):
                chain.update(token.tobytes())
                best = known.get(chain.hexdigest(), best)
        return best

    def _files(self, folder: Path) -> list[tuple[Path, os.stat_result]]:
        """Of the layers, in their order."""
        try:
            with os.scandir(folder) as found:
                files = [
                    (folder / e.name, e.stat(follow_symlinks=False))
                    for e, _ in zip(found, range(_MAX_LAYERS), strict=False)
                    if e.name.endswith(_SUFFIX)
                ]
        except OSError as e:
            self.problem(f"{folder}: {e.strerror}")
            return []
        for file, status in files:
            if not stat.S_ISREG(status.st_mode):
                self.problem(f"{file}: not a regular file")
        regular = [(file, status) for file, status in files if stat.S_ISREG(status.st_mode)]
        return sorted(regular, key=lambda one: ([int(n[:18]) for n in _NUMBER.findall(one[0].name)], one[0].name))


def _is_entry(entry: os.DirEntry[str]) -> bool:
    return bool(_FOLDER.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)


def _has_layers(entry: os.DirEntry[str]) -> bool:
    try:
        if not entry.is_dir(follow_symlinks=False):
            return False
        with os.scandir(entry.path) as files:
            return any(e.name.endswith(_SUFFIX) for e, _ in zip(files, range(_MAX_LAYERS), strict=False))
    except OSError:
        return False
