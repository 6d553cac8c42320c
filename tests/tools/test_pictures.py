"""What commands draw: files are never overwritten unasked, and no journal, however hostile, ends in a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.journals import SYSTEM, serve
from tests.tools.test_cli import kvstore, kvstore_json


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``kv`` and ``journal`` of a store, a trace, and a dump."""
    path = tmp_path_factory.mktemp("served")
    serve(path / "kv", path / "journal", 20)
    (path / "trace").write_text(json.dumps({"hash_ids": [1, 2, 3]}) + "\n" + json.dumps({"hash_ids": [1, 2, 4]}))
    (path / "prompt.json").write_text(json.dumps(SYSTEM))
    kvstore_json("dump", path / "kv", "--tokens", path / "prompt.json", "--out", path / "block.safetensors")
    return path


WRITERS = {
    "plot of a dump": ("plot", "block.safetensors", "--out"),
    "plot of a journal": ("plot", "journal", "--out"),
    "report": ("report", "kv", "--out"),
    "chart": ("plan", "trace", "--chart"),
}


@pytest.mark.parametrize("arguments", WRITERS.values(), ids=WRITERS)
def test_no_file_is_overwritten_unasked(served: Path, tmp_path: Path, arguments: tuple[str, str, str]) -> None:
    command, what, option = arguments
    out, link, dangling, target = (tmp_path / name for name in ("out", "link", "dangling", "target"))
    for path in (out, target):
        path.write_text("precious")
    link.symlink_to(target)
    dangling.symlink_to(tmp_path / "nowhere")
    for path in (out, link, dangling):
        code, _, err = kvstore(command, served / what, option, path)
        assert code == 2 and f"{option}: " in err and "--force" in err
    assert out.read_text() == target.read_text() == "precious" and not (tmp_path / "nowhere").exists()
    for path in (out, link):
        kvstore_json(command, served / what, option, path, "--force")
        assert path.stat().st_size > 1000 and not path.is_symlink()
    assert target.read_text() == "precious"  # what a link leads to is not written
    code, _, err = kvstore(command, served / what, option, tmp_path / "no" / "folder")
    assert code == 2 and f"{option}: " in err and "cannot be written" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "link", "out", "target"]
