"""Finds the tiers' directories in a path that a person gave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kvstore.errors import ConfigError
from kvstore.slot import read_integrity_key
from kvstore.tiers.catalog import Catalog
from kvstore.tiers.disk_catalog import DiskCatalog, is_disk_directory
from kvstore.tiers.shared_catalog import SharedCatalog, is_shared_path
from kvstore.tiers.shared_tree import NAMESPACE_JSON, NAMESPACE_NAME
from tools.foreign.base import ForeignStore
from tools.foreign.vllm_example import VllmExampleStore, is_example_folder
from tools.foreign.vllm_fs import VllmFsStore, fs_bases

MAX_FOLDERS: Final = 10_000


def find_catalogs(path: Path, integrity_key_file: str | None = None) -> list[Catalog]:
    """The directory itself, or those right below it that are a tier's.

    Raises:
        ConfigError: no such directory, nothing of a tier in it, or a bad integrity key.
    """
    catalogs, foreign = find_stored(path, integrity_key_file)
    if not catalogs:
        kinds = ", ".join(sorted({store.kind for store in foreign}))
        raise ConfigError(f"PATH: {str(path)!r} holds another system's KV ({kinds}): only ls, inspect and dump read it")
    return catalogs


def find_stored(path: Path, integrity_key_file: str | None = None) -> tuple[list[Catalog], list[ForeignStore]]:
    """As `find_catalogs`, and what other systems stored.

    Raises:
        ConfigError: no such directory, nothing of either in it, or a bad integrity key.
    """
    key = read_integrity_key(integrity_key_file)
    if not path.is_dir():
        raise ConfigError(f"PATH: {str(path)!r} is no directory; give a disk tier's directory or a shared path")
    try:
        folders = [path]
        if not (is_disk_directory(path) or is_shared_path(path) or is_example_folder(path) or fs_bases(path)):
            with os.scandir(path) as entries:
                folders = sorted(Path(e.path) for e, _ in zip(entries, range(MAX_FOLDERS), strict=False) if e.is_dir())
    except OSError as e:
        raise ConfigError(f"PATH: {str(path)!r} cannot be read ({e.strerror})") from e
    catalogs, foreign = list[Catalog](), list[ForeignStore]()
    for folder in folders:
        examples = is_example_folder(folder)
        catalogs += [DiskCatalog(folder, key)] if is_disk_directory(folder) else []
        if is_shared_path(folder) and (not examples or _has_namespaces(folder)):
            catalogs.append(SharedCatalog(folder, key))
        foreign += [VllmExampleStore(folder)] if examples else []
        foreign += [VllmFsStore(base) for base in fs_bases(folder)]
    if not catalogs and not foreign:
        raise ConfigError(f"PATH: {str(path)!r} holds nothing of a tier; give a disk tier's directory or a shared path")
    return catalogs, foreign


def _has_namespaces(path: Path) -> bool:
    """Whether folders named as our namespaces, and as others' prompts, are really ours."""
    with os.scandir(path) as entries:
        names = [e.name for e, _ in zip(entries, range(MAX_FOLDERS), strict=False) if NAMESPACE_NAME.fullmatch(e.name)]
    return any(os.path.lexists(path / name / NAMESPACE_JSON) for name in names)
