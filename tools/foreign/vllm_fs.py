"""vLLM's own fs tier: a file for each chunk of blocks, its bytes those of the engine's pages.

    <path>/<model>_<12 hex>/config.json                             what follows from the engine's configuration
    <path>/<model>_<12 hex>_r<rank>/<3 hex>/<2 hex>_g<group>/<block hash>.bin

A file is, for each worker and then each layer, ``blocks_per_file`` pages, and padding up to
4096 bytes. How large a page is, how many heads it has and how attention packs it is not said.
The size of a page follows where just one fits the file, if it is a whole number of 16 elements a token; else a
file cannot be told apart by layer. As of vLLM 0.32, ``vllm/v1/kv_offload/tiering/fs``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from kvstore.errors import ConfigError
from kvstore.layout import DTYPES, Dtype, parse_dtype
from kvstore.strict_json import parse_json
from tools.foreign.base import MAX_ENTRIES, ForeignEntry, ForeignPart, ForeignStore

_CONFIG: Final = "config.json"
_BASE: Final = re.compile(r".*_[0-9a-f]{12}")
_RANK: Final = re.compile(r"_r[0-9]{1,6}")
_FIRST: Final = re.compile(r"[0-9a-f]{3}")
_SECOND: Final = re.compile(r"[0-9a-f]{2}_g([0-9]{1,6})")
_FILE: Final = re.compile(r"([0-9a-f]{32}|[0-9a-f]{64})\.bin")
_MAX_CONFIG_NBYTES: Final = 1 << 20
_MAX_LAYERS: Final = 4096
_MAX_FOLDERS: Final = 10_000
_PAD: Final = 4096
_LEAST_ELEMENTS: Final = 16
_SIZES: Final = ("tokens_per_hash", "blocks_per_file", "tp_size", "pp_size", "pcp_size", "dcp_size")


def fs_bases(path: Path) -> list[Path]:
    """The folders of configurations right below a path."""
    try:
        with os.scandir(path) as entries:
            some = [e for e, _ in zip(entries, range(_MAX_FOLDERS), strict=False)]
    except OSError:
        return []
    names = sorted(e.name for e in some if _BASE.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
    return [path / name for name in names if os.path.lexists(path / name / _CONFIG)]


class VllmFsStore(ForeignStore):
    """See `ForeignStore`. An entry is a chunk.

    Args:
        path: the folder that has the configuration.
    """

    kind = "vllm-fs"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._config = self._read_config()

    def description(self) -> dict[str, Any]:
        return self._config

    def model(self) -> str | None:
        name = self._config.get("model_name")
        return name if isinstance(name, str) else None

    def entries(self) -> Iterator[ForeignEntry]:
        left = MAX_ENTRIES
        for rank in self._folders(self.path.parent, re.compile(re.escape(self.path.name) + _RANK.pattern)):
            for first in self._folders(rank, _FIRST):
                for second in self._folders(first, _SECOND):
                    for entry in self._files(second):
                        left -= 1
                        if left < 0:
                            self.problem(f"{self.path}: more than {MAX_ENTRIES} files; the rest is left out")
                            return
                        yield entry

    def parts(self, entry: ForeignEntry) -> list[ForeignPart]:
        names, dtype = self._layer_names(entry), self._dtype()
        page = self._page_elements(entry.nbytes, len(names), dtype) if names and dtype is not None else None
        if page is None or dtype is None:
            return [ForeignPart(None, "", "pages", DTYPES["uint8"], (entry.nbytes,), entry.place, 0)]
        blocks, ranks = self._size("blocks_per_file"), self._size("tp_size")
        found = []
        for i in range(ranks * len(names)):
            rank, layer = divmod(i, len(names))
            part = "pages" if ranks == 1 else f"pages.rank.{rank}"
            offset = i * blocks * page * dtype.itemsize
            found.append(ForeignPart(layer, names[layer], part, dtype, (blocks, page), entry.place, offset))
        return found

    # -- inside

    def _read_config(self) -> dict[str, Any]:
        try:
            fd = os.open(self.path / _CONFIG, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as f:
                found = parse_json(f.read(_MAX_CONFIG_NBYTES))
            if not isinstance(found, dict) or not all(self._is_size(found.get(name)) for name in _SIZES):
                raise ValueError("not a configuration of vLLM's fs tier")
        except (OSError, ValueError) as e:
            self.problem(f"{self.path / _CONFIG}: {e.strerror if isinstance(e, OSError) else str(e)[:200]}")
            return {}
        return found

    @staticmethod
    def _is_size(value: object) -> bool:
        return type(value) is int and 1 <= value <= 1 << 20

    def _size(self, name: str) -> int:
        value = self._config.get(name)
        return value if isinstance(value, int) else 1

    def _dtype(self) -> Dtype | None:
        try:
            return parse_dtype(str(self._config.get("dtype"))[:40])
        except ConfigError:
            return None

    def _layer_names(self, entry: ForeignEntry) -> list[str]:
        """Of the pages in a file: one group's layers where there is one; else each page belongs to one of several."""
        groups = self._config.get("kv_cache_groups")
        if not isinstance(groups, list) or not groups or len(groups) > _MAX_LAYERS:
            return []
        lists = [group.get("layer_names") if isinstance(group, dict) else None for group in groups]
        if not all(isinstance(names, list) and 0 < len(names) <= _MAX_LAYERS for names in lists):
            return []
        mine = lists[min(int(entry.place.parent.name.rpartition("_g")[2]), len(lists) - 1)] or []
        longest = max(len(names or ()) for names in lists)
        return [str(mine[i])[:200] if i < len(mine) else "" for i in range(longest)]

    def _page_elements(self, nbytes: int, num_layers: int, dtype: Dtype) -> int | None:
        """Elements of one page, where just one number fits the file."""
        if self._size("pp_size") * self._size("pcp_size") * self._size("dcp_size") > 1:
            return None
        groups = self._config["kv_cache_groups"]
        tokens = {group.get("tokens_per_block") for group in groups}
        (per_block,) = tokens if len(tokens) == 1 else (None,)
        if not self._is_size(per_block) or not isinstance(per_block, int):
            return None
        unit = per_block * _LEAST_ELEMENTS
        pages_nbytes = self._size("tp_size") * num_layers * self._size("blocks_per_file") * unit * dtype.itemsize
        most = nbytes // pages_nbytes
        fits = [n for n in (most, most - 1) if n > 0 and 0 <= nbytes - n * pages_nbytes < _PAD]
        return fits[0] * unit if len(fits) == 1 else None

    def _folders(self, folder: Path, pattern: re.Pattern[str]) -> list[Path]:
        try:
            with os.scandir(folder) as entries:
                some = (e for e, _ in zip(entries, range(_MAX_FOLDERS), strict=False))
                names = sorted(e.name for e in some if pattern.fullmatch(e.name) and e.is_dir(follow_symlinks=False))
        except OSError as e:
            self.problem(f"{folder}: {e.strerror}")
            return []
        return [folder / name for name in names]

    def _files(self, folder: Path) -> Iterator[ForeignEntry]:
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    found = _FILE.fullmatch(entry.name)
                    if not found:
                        continue
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        yield ForeignEntry(found[1], folder / entry.name, status.st_size, status.st_mtime_ns)
                    else:
                        self.problem(f"{folder / entry.name}: not a regular file")
        except OSError as e:
            self.problem(f"{folder}: {e.strerror}")
