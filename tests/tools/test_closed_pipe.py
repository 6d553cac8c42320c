"""A reader that goes away, as head does, is no error of the store: exit code 141, and not a word."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import NUM_BLOCKS, small_keys
from tests.tools.test_cli import kvstore_json

KVSTORE = str(Path(sys.executable).parent / "kvstore")


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "--blocks"), ("ls", "--blocks", "--json"), ("ls",), ("inspect", str(small_keys()[0]), "--per-head"),
        ("inspect", str(small_keys()[0]), "--json"), ("stat", "--json"), ("purge", "--all", "--dry-run"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_reader_that_is_gone(small_store: Path, arguments: tuple[str, ...]) -> None:
    command, *options = arguments
    with subprocess.Popen(
        [KVSTORE, command, str(small_store), *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait(60) == 141


def test_in_a_shell(small_store: Path) -> None:
    """A pipe that holds all of it is no closed pipe; with pipefail the other is told from damage."""
    script = f"set -o pipefail; {KVSTORE} ls --blocks {small_store} | head -1; echo $?"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[0].startswith("key")
    assert said.stdout.splitlines()[-1] in ("0", "141")
    assert said.stderr == ""
    whole = subprocess.run([KVSTORE, "ls", small_store, "--blocks", "--json"], capture_output=True, check=True)
    assert len(json.loads(whole.stdout)["blocks"]) == 3 * NUM_BLOCKS


def test_without_stdout(small_store: Path) -> None:
    said = subprocess.run(["bash", "-c", f"{KVSTORE} ls {small_store} >&-"], capture_output=True, text=True, check=True)
    assert said.stderr == ""


def test_a_purge_ends_whatever_becomes_of_its_output(small_store: Path, tmp_path: Path) -> None:
    kv = tmp_path / "kv"
    subprocess.run(["cp", "-a", str(small_store), str(kv)], check=True)
    with subprocess.Popen([KVSTORE, "purge", str(kv), "--all", "--yes"], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.wait(60) == 141
    assert kvstore_json("ls", kv)["namespaces"] == []
