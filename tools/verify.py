"""`kvstore verify`: reads everything that is stored and names whatever is not what it should be."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from kvstore.slot import read_integrity_key
from kvstore.tiers.catalog import Catalog, Verdict
from kvstore.tiers.removal import RemovalError, repair
from tools.ls import problem_lines, problems_of
from tools.output import lines, progress, size
from tools.places import find_catalogs


@dataclass(frozen=True, slots=True)
class BadChunk:
    """A chunk that would be a miss; ``keys`` are those that it is found by."""

    tier: str
    path: str
    place: str
    namespace: str
    reason: str
    keys: list[str]


@dataclass(slots=True)
class Report:
    """What became of reading everything.

    Attributes:
        gone: chunks evicted while this ran; neither good nor bad.
        problems: directory -> what is wrong with it as a whole.
    """

    good: int = 0
    gone: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    repaired: int = 0
    bad: list[BadChunk] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.bad and not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def parts(self) -> Iterator[RenderableType]:
        """For people."""
        for bad in self.bad:
            yield from lines(f"bad {bad.tier} chunk in {bad.path}: {bad.place} {bad.reason}")
        yield from problem_lines(self.problems)
        if self.repaired:
            yield from lines(f"{self.repaired} damaged chunks were removed")
        speed = f"{self.nbytes / self.seconds / 1e9:.2f} GB/s" if self.seconds else ""
        counts = f"{self.good} chunks are good, {len(self.bad)} bad"
        gone = f", {self.gone} were evicted meanwhile" if self.gone else ""
        yield from lines(f"{counts}{gone}; read {size(self.nbytes)} in {self.seconds:.1f} s, {speed}")


def verify(path: Path, integrity_key_file: str | None = None) -> Report:
    """Read every chunk in a directory, or in those right below it.

    Raises:
        ConfigError: there is nothing of a tier there, or the integrity key is no good.
    """
    report, start = Report(), time.monotonic()
    catalogs = find_catalogs(path, integrity_key_file)
    for catalog in catalogs:
        total = sum(1 for _ in catalog.chunks())
        with progress(f"{catalog.tier} {catalog.path}", total) as advance:
            for verdict in catalog.check():
                _count(report, catalog, verdict)
                advance(1)
    report.problems = problems_of(catalogs)
    report.seconds = round(time.monotonic() - start, 3)
    return report


def verify_and_repair(path: Path, integrity_key_file: str | None = None) -> Report:
    """Remove what is damaged and have indexes rebuilt, then read everything again.

    Raises:
        ConfigError: as `verify`. RemovalError: as `kvstore.tiers.removal.repair`.
    """
    key, repaired = read_integrity_key(integrity_key_file), 0
    for catalog in find_catalogs(path, integrity_key_file):
        with progress(f"{catalog.tier} {catalog.path}", None) as advance:
            bad, num_good = [], 0
            for verdict in catalog.check():
                advance(1)
                if verdict.is_bad:
                    bad.append(verdict.chunk)
                num_good += not verdict.reason
        if len(bad) > num_good:  # as all are to who lacks the key that they were signed with
            raise RemovalError(
                f"{catalog.path}: {len(bad)} chunks do not verify and {num_good} do; nothing was removed. Give "
                "--integrity-key-file if they were signed, or delete them with kvstore purge"
            )
        if bad or catalog.problems:
            repaired += repair(catalog, bad, key)
    report = verify(path, integrity_key_file)
    report.repaired = repaired
    return report


def _count(report: Report, catalog: Catalog, verdict: Verdict) -> None:
    chunk = verdict.chunk
    if verdict.is_gone:
        report.gone += 1
        return
    report.nbytes += chunk.nbytes
    if verdict.is_bad:
        keys, namespace = [str(key) for key in chunk.keys], chunk.space.namespace.hex()
        report.bad.append(BadChunk(catalog.tier, str(catalog.path), chunk.name, namespace, verdict.reason, keys))
    else:
        report.good += 1
