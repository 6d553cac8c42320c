"""A digest of a model's weights, for models without an immutable revision.

SHA-256 over the state dict in name order: names, dtypes, shapes, bytes. Where the weights
came from files, the digest is kept under the cache folder by path, inode, size and mtime of
the files, together with a sample of every tensor as it is in memory: weights that were
changed after loading are digested anew. Knows no engine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import torch

from kvstore.errors import ConfigError

logger = logging.getLogger(__name__)

_SAMPLE: Final = 256  # elements of a tensor
_PIECE_NBYTES: Final = 64 << 20
_WEIGHTS: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".npz")


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/kvstore``, by default ``~/.cache/kvstore``; made if missing (0700)."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "kvstore"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return root


def weights_digest(state: Mapping[str, torch.Tensor], files: Sequence[Path] = ()) -> str:
    """SHA-256 of the weights as they are in memory, as hex.

    Args:
        state: the model's state dict.
        files: where it was loaded from; empty if from nowhere.
    Raises:
        ConfigError: a tensor's bytes can't be read (meta device, offloaded).
    """
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ConfigError(f"the weight {name} is not in memory, so it has no digest; give revision=")
    entry = _cache_entry(files, _digest(state, _sample)) if files else None
    if entry is not None and (known := _read(entry)):
        return known
    digest = _digest(state, _all)
    if entry is not None:
        _write(entry, digest)
    return digest


def folder_digest(folder: Path) -> str:
    """SHA-256 over the weight files of a folder and their names, as hex.

    Raises:
        ConfigError: there are none, or one cannot be read.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS) if folder.is_dir() else [folder]
    if not files:
        raise ConfigError(f"{folder}: no weight files ({', '.join(_WEIGHTS)}); give model_revision")
    entry = _cache_entry(files, "files")
    if entry is not None and (known := _read(entry)):
        return known
    digest = _digest_files(files)
    if entry is not None:
        _write(entry, digest)
    return digest


def _cache_entry(files: Sequence[Path], what: str) -> Path | None:
    """Where the digest of ``what`` of these files is kept, as long as they stay what they are; None: nowhere."""
    try:
        stats = [(str(file.resolve()), file.stat()) for file in sorted(files)]
        folder = cache_root() / "digests"
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as e:
        logger.info("weights digests are not kept: %s", e)
        return None
    known = [(path, stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]
    key = json.dumps([known, what])
    return folder / hashlib.sha256(key.encode()).hexdigest()


def _read(entry: Path) -> str:
    """The digest that is kept there; "" for none."""
    try:
        text = entry.read_text()
    except (OSError, ValueError):
        return ""
    return text if len(text) == 64 and set(text) <= set("0123456789abcdef") else ""


def _write(entry: Path, digest: str) -> None:
    """Atomic; a folder that can't be written costs time on the next start and nothing else."""
    try:
        fd, temporary = tempfile.mkstemp(dir=entry.parent)
        with os.fdopen(fd, "w") as f:
            f.write(digest)
        os.replace(temporary, entry)
    except OSError as e:
        logger.info("the weights digest was not kept: %s", e)


def _digest(state: Mapping[str, torch.Tensor], pieces: Callable[[torch.Tensor], Iterable[torch.Tensor]]) -> str:
    h = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        h.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        for piece in pieces(tensor.reshape(-1)):
            h.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _digest_files(files: Sequence[Path]) -> str:
    h = hashlib.sha256()
    try:
        for file in files:
            h.update(json.dumps([file.name, file.stat().st_size]).encode())
            with file.open("rb") as f:
                while piece := f.read(_PIECE_NBYTES):
                    h.update(piece)
    except OSError as e:
        raise ConfigError(f"{e.filename}: cannot be read for its digest ({e.strerror})") from e
    return h.hexdigest()


def _all(flat: torch.Tensor) -> Iterable[torch.Tensor]:
    return torch.split(flat, max(1, _PIECE_NBYTES // flat.element_size())) if len(flat) else []


def _sample(flat: torch.Tensor) -> Iterable[torch.Tensor]:
    return [flat[:: max(1, len(flat) // _SAMPLE)]]
