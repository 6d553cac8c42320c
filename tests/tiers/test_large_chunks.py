"""Who describes chunks of gigabytes, with files that are nothing but holes, has no memory taken by it."""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
from pathlib import Path

import pytest

from kvstore import KVIdentity, KVLayout
from kvstore.slot import SlotFormat
from kvstore.tiers.catalog import TRAILER_IS_DAMAGED
from kvstore.tiers.chunk_file import file_format
from kvstore.tiers.disk_catalog import DiskCatalog
from kvstore.tiers.disk_header import DirectoryHeader, read_header, write_header
from kvstore.tiers.shared_catalog import SharedCatalog
from kvstore.tiers.shared_tree import canonical_json
from tests.small import IDENTITY, LAYOUT, copy_store, small_keys

HUGE = dataclasses.replace(LAYOUT, num_layers=4096, num_kv_heads=32, head_size=512)  # a GiB a block
PER_CHUNK = 2


def huge_identity(layout: KVLayout = HUGE) -> KVIdentity:
    return dataclasses.replace(IDENTITY, layout=layout)


def describe_huge_slots(disk: Path) -> SlotFormat:
    """Say of a small directory that its slots are huge, and make its data file as long as that."""
    identity, fmt = huge_identity(), SlotFormat.of(huge_identity(), PER_CHUNK)
    header = read_header(disk)
    assert header is not None
    write_header(
        disk,
        DirectoryHeader(
            content=dict(identity.content()),
            placement=dict(identity.placed(PER_CHUNK)),
            slot_nbytes=fmt.slot_nbytes,
            num_slots=header.num_slots,
        ),
    )
    os.truncate(disk / "data", 8 * fmt.slot_nbytes)
    return fmt


def make_huge_file(shared: Path) -> Path:
    """A namespace of huge chunks, with one file of the right size and header, and nothing else in it."""
    identity, fmt = huge_identity(), SlotFormat.of(huge_identity(), PER_CHUNK)
    files = file_format(HUGE, fmt, identity.namespace())
    folder = shared / identity.namespace().hex() / fmt.placement.hex()[:16]
    key = small_keys()[0]
    (folder / key[:1].hex()).mkdir(parents=True)
    (folder.parent / "namespace.json").write_bytes(canonical_json(identity.content()))
    (folder / "placement.json").write_bytes(canonical_json(identity.placed(PER_CHUNK)))
    file = folder / key[:1].hex() / f"{key}.safetensors"
    file.write_bytes(files.header.tobytes())
    os.truncate(file, files.file_nbytes)
    return file


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_the_trailer_is_looked_at_first(small_store: Path, tmp_path: Path, tier: str) -> None:
    path = copy_store(small_store / tier, tmp_path / tier)
    if tier == "disk":
        fmt = describe_huge_slots(path)
        assert 1 << 30 < fmt.slot_nbytes <= 4 << 30
        catalog: DiskCatalog | SharedCatalog = DiskCatalog(path)
    else:
        shutil.rmtree(path)
        make_huge_file(path)
        catalog = SharedCatalog(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    chunk = next(catalog.chunks())
    assert catalog.read(chunk).reason == TRAILER_IS_DAMAGED
    assert TRAILER_IS_DAMAGED in {verdict.reason for verdict in catalog.check()}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB
