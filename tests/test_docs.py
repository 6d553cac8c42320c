"""What README and docs say works: commands and examples are run, links lead somewhere, all settings are named.

A ```bash block is a script, run in a folder that holds a small store at ./kv and a small
model at ./my-model; ```console blocks are scripts with their output, told by "$ ". `make`
and `pip` only say whether they could. A ```python block is run too. A block is not run only
if its first line is "# not run: " and why.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvstore import StoreConfig
from kvstore.config_source import _leaves
from tests.journals import serve
from tests.small import LAYOUT, NUM_BLOCKS, copy_store
from tools.choice import Choice
from tools.dump import dump_blocks

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SLOW = re.compile(r"^kvstore (demo|bench)\b(?!.*--help)", re.MULTILINE)
NOT_RUN = "# not run: "
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PRELUDE = f"""
set -euo pipefail
export PATH={Path(sys.executable).parent}:$PATH
make() {{ command make --dry-run --no-print-directory -C {ROOT} "$@" > /dev/null; }}
pip() {{ [ "$1" = install ]; for word; do case $word in *.txt) [ -f {ROOT}/"$word" ] ;; esac; done; }}
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    name: str
    language: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in FENCE.finditer(text):
            language, body = found.groups()
            line = text.count("\n", 0, found.start()) + 1
            if language in languages and not body.startswith(NOT_RUN):
                yield Block(f"{page.relative_to(ROOT)}:{line}", language, body)


def script_of(block: Block) -> str:
    if block.language == "bash":
        return block.text
    return "\n".join(line[2:] for line in block.text.splitlines() if line.startswith("$ "))


SCRIPTS = [
    pytest.param(script_of(block), id=block.name, marks=[pytest.mark.slow] if SLOW.search(script_of(block)) else [])
    for block in blocks("bash", "console")
]
EXAMPLES = [pytest.param(block.text, id=block.name) for block in blocks("python")]


@pytest.fixture
def folder(small_store: Path, small_model: Path, tmp_path: Path) -> Path:
    """Where readers are: in a folder with ./kv, ./my-model, ./prompt.json and what was dumped of it, ./trace.jsonl, and
    ./journal of a store that has served some requests."""
    serve(tmp_path / "served", tmp_path / "journal")
    requests = [[i % 7, 100 + i % 5, 200 + i] for i in range(50)]
    (tmp_path / "trace.jsonl").write_text("\n".join(json.dumps({"hash_ids": ids}) for ids in requests))
    copy_store(small_store, tmp_path / "kv")
    (tmp_path / "prompt.json").write_text(json.dumps(list(range(NUM_BLOCKS * LAYOUT.block_size))))
    choice = Choice(tokens_file=tmp_path / "prompt.json")
    dump_blocks(tmp_path / "kv" / "disk", tmp_path / "prompt.safetensors", choice, None, force=False)
    copy_store(small_model, tmp_path / "my-model")
    return tmp_path


@pytest.mark.parametrize("script", SCRIPTS)
def test_commands_work(script: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", PRELUDE + script],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("source", EXAMPLES)
def test_examples_work(source: str, folder: Path) -> None:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=folder, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{source}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_are_closed_and_python_parses(page: Path) -> None:
    text = page.read_text()
    assert text.count("\n```") == 2 * len(FENCE.findall(text))
    for language, body in FENCE.findall(text):
        if language == "python":
            ast.parse(body)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, target


def test_every_page_is_listed_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in readme] == []


def test_extras_that_are_named_exist() -> None:
    for page in PAGES:
        for found in re.findall(r"(?:kvstore|\.)\[([\w,]+)\]'", page.read_text()):
            assert set(found.split(",")) <= set(EXTRAS), f"{page.name}: {found}"


def test_every_setting_has_a_row_with_its_default() -> None:
    rows = dict(
        re.findall(r"^\| `([\w.]+)` \| *([^|]*?) *\|", (ROOT / "docs/configuration.md").read_text(), re.MULTILINE)
    )
    assert set(rows) == {".".join(path) for path, _ in _leaves(StoreConfig)}
    defaults = {"io": "`thread`", "put_timeout_s": "10", "disk.num_threads": "8", "shared.fsync": "`flush`"}
    assert defaults.items() <= rows.items()
