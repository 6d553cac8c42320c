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

MAX_FOLDERS: Final = 10_000


def find_catalogs(path: Path, integrity_key_file: str | None = None) -> list[Catalog]:
    """The directory itself, or those right below it that are a tier's.

    Raises:
        ConfigError: no such directory, nothing of a tier in it, or a bad integrity key.
    """
    key = read_integrity_key(integrity_key_file)
    if not path.is_dir():
        raise ConfigError(f"PATH: {str(path)!r} is no directory; give a disk tier's directory or a shared path")
    try:
        folders = [path]
        if not (is_disk_directory(path) or is_shared_path(path)):
            with os.scandir(path) as entries:
                folders = sorted(Path(e.path) for e, _ in zip(entries, range(MAX_FOLDERS), strict=False) if e.is_dir())
    except OSError as e:
        raise ConfigError(f"PATH: {str(path)!r} cannot be read ({e.strerror})") from e
    found: list[Catalog] = []
    for folder in folders:
        found += [DiskCatalog(folder, key)] if is_disk_directory(folder) else []
        found += [SharedCatalog(folder, key)] if is_shared_path(folder) else []
    if not found:
        raise ConfigError(f"PATH: {str(path)!r} holds nothing of a tier; give a disk tier's directory or a shared path")
    return found
