"""The commands: help, what they show of a sound store, and that they neither write nor disturb."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from typer.testing import CliRunner

from kvstore import TieredStore
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, copy_store, fill, small_blocks, small_config, small_keys
from tools.cli import app

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
KEY = str(small_keys()[3])


def kvstore(*arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command."""
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def kvstore_json(*arguments: object) -> Any:
    code, out, err = kvstore(*arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.fixture
def kv(small_store: Path, tmp_path: Path) -> Path:
    return copy_store(small_store, tmp_path / "kv")


def tree(path: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything about the files below a path but when they were read."""
    stats = {p: p.lstat() for p in sorted(path.rglob("*"))}
    return {
        str(p): (s.st_mode, s.st_mtime_ns, s.st_ino, p.read_bytes() if p.is_file() else b"") for p, s in stats.items()
    }


# -- ls --blocks


def test_a_row_for_each_block(kv: Path) -> None:
    found = kvstore_json("ls", kv / "disk", "--blocks")
    assert found["problems"] == {}
    assert {row["key"] for row in found["blocks"]} == {str(key) for key in small_keys()}
    for row in found["blocks"]:
        assert (row["tier"], row["model"], row["hits"]) == ("disk", "test-model", None)
        assert row["nbytes"] >= LAYOUT.block_nbytes
    assert len(kvstore_json("ls", kv, "--blocks", "--tier", "shared", "--model", "test")["blocks"]) == NUM_BLOCKS
    assert len(kvstore_json("ls", kv, "--blocks", "--limit", "5")["blocks"]) == 5
    ages = [row["age_s"] for row in kvstore_json("ls", kv, "--blocks", "--sort", "oldest", "--limit", "9")["blocks"]]
    assert ages == sorted(ages) and len(ages) == 9
    assert kvstore_json("ls", kv, "--blocks", "--older-than", "1d")["blocks"] == []
    _, out, _ = kvstore("ls", kv / "disk", "--blocks")
    assert len(out.splitlines()) == 1 + NUM_BLOCKS
    for wrong, said in (
        (["--sort", "bytes"], "it needs --limit"),
        (["--sort", "requests", "--limit", "1"], "requests"),
    ):
        code, _, err = kvstore("ls", kv, "--blocks", *wrong)
        assert (code, said in err) == (2, True)


# -- help


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_help_example_json_and_docs(command: str) -> None:
    code, out, _ = kvstore(command, "--help")
    assert code == 0
    assert f"Example: kvstore {command}" in out
    assert "--json" in out
    assert len(out.splitlines()) < 36
    assert re.search(rf"^## kvstore {command}$", (ROOT / "docs/cli.md").read_text(), re.MULTILINE)


def test_help_lists_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tools.cli import app; app(['--help'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(COMMANDS) == {
        "demo", "demo-vllm", "demo-p2p", "ls", "inspect", "verify", "bench", "proxy", "keygen",
        "dump", "explain", "load", "diff", "plot", "gc", "purge", "stat", "plan", "report", "top",
    }  # fmt: skip
    assert all(f"  {command} " in done.stdout for command in COMMANDS)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", ["ls", "ls --blocks", "stat", "top --once", "verify", "explain --key 0"])
def test_a_command_that_looks_does_not_import_torch(kv: Path, command: str) -> None:
    name, *options = command.split()
    code = (
        "import sys\nfrom tools.cli import app\n"
        f"app({[name, str(kv), *options]!r}, standalone_mode=False)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "torch was imported" not in done.stderr and "Traceback" not in done.stderr


def test_no_arguments_shows_help() -> None:
    _, out, err = kvstore()
    assert "Usage:" in out + err


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls",),
        ("nonsense",),
        ("ls", "/nowhere"),
        ("verify", "/proc/version"),
        ("inspect", "/nowhere", "00"),
        ("bench", "x"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    code, out, err = kvstore(*arguments)
    assert code == 2
    assert out == ""
    assert err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_folder_without_a_tier_is_wrong_usage(tmp_path: Path) -> None:
    """`verify` of a mistyped path must not say that all is well."""
    for command in ("ls", "inspect", "verify"):
        code, _, err = kvstore(command, tmp_path)
        assert code == 2
        assert "holds nothing of a tier" in err


def test_version() -> None:
    code, out, _ = kvstore("--version")
    assert code == 0
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", out)


# -- ls


def test_ls_shows_each_namespace_of_each_directory(kv: Path) -> None:
    rows = kvstore_json("ls", kv)["namespaces"]
    found = {(row["model"], row["tier"]) for row in rows}
    assert found == {("test-model", "disk"), ("test-model", "shared"), ("other-model", "shared")}
    for row in rows:
        assert row["blocks"] == NUM_BLOCKS
        assert row["chunks"] == NUM_BLOCKS // 2
        assert row["nbytes"] == row["chunks"] * (4096 if row["tier"] == "disk" else 8192)
        assert row["state"] == "served"
        assert (row["dtype"], row["block_size"]) == ("bfloat16", 4)
        assert 0 <= row["newest_s"] <= row["oldest_s"] < 3600


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_ls_of_one_directory(kv: Path, tier: str) -> None:
    rows = kvstore_json("ls", kv / tier)["namespaces"]
    assert {r["tier"] for r in rows} == {tier}


def test_ls_table(kv: Path) -> None:
    code, out, _ = kvstore("ls", kv)
    assert code == 0
    assert "test-model@rrrrrrrrrrrr" in out
    assert IDENTITY.namespace().hex()[:12] in out


def test_ls_tells_epochs_apart(tmp_path: Path) -> None:
    with TieredStore(small_config(disk=tmp_path / "disk", shared=tmp_path / "shared")) as store:
        store.put(small_keys(), small_blocks())
        assert store.flush()
        store.reset()
        store.put(small_keys()[:4], small_blocks()[:4])
        assert store.flush()
    states = {(r["tier"], r["state"]): r["blocks"] for r in kvstore_json("ls", tmp_path)["namespaces"]}
    assert states == {
        ("disk", "old epoch"): 4,
        ("shared", "served"): 12,
        ("shared", "old epoch"): 4,
    }


def test_ls_of_a_store_that_holds_nothing(tmp_path: Path) -> None:
    TieredStore(small_config(disk=tmp_path / "disk")).close()
    assert kvstore_json("ls", tmp_path)["namespaces"] == []
    assert "nothing is stored" in kvstore("ls", tmp_path)[1]


# -- inspect


def test_inspect_describes_identity_placement_and_layout(kv: Path) -> None:
    stored = kvstore_json("inspect", kv / "disk")["stored"]
    assert len(stored) == 1
    assert stored[0]["identity"] == IDENTITY.content()
    assert stored[0]["placement"] == IDENTITY.placed(2)
    assert stored[0]["layout"]["block_shape"] == list(LAYOUT.block_shape)
    assert stored[0]["layout"]["initial_namespace"] == IDENTITY.namespace().hex()
    assert stored[0]["keys"][0] == str(small_keys()[0])


@pytest.mark.parametrize("tier", ["disk", "shared"])
@pytest.mark.parametrize("number", [0, 3, 11])
def test_inspect_shows_the_numbers_of_one_block(kv: Path, tier: str, number: int) -> None:
    (found,) = kvstore_json("inspect", kv / tier, small_keys()[number])["blocks"]
    assert found["ok"]
    block = small_blocks()[number].to(torch.float64)
    assert len(found["statistics"]) == 2 * LAYOUT.num_layers
    for row in found["statistics"]:
        part = block[row["layer"], "KV".index(row["part"])]
        assert row["min"] == part.min()
        assert row["max"] == part.max()
        assert row["mean"] == pytest.approx(float(part.mean()))
        assert row["norm"] == pytest.approx(float(part.norm()))
        assert (row["zeros"], row["nan"], row["inf"]) == (0, 0, 0)


def test_inspect_counts_what_is_not_a_number(tmp_path: Path) -> None:
    blocks = small_blocks()
    blocks[0, 0, 0] = float("nan")
    blocks[0, 0, 1] = 0.0
    blocks[0, 1, 0, 0, 0, :2] = torch.tensor([float("inf"), float("-inf")])
    with TieredStore(small_config(disk=tmp_path / "disk")) as store:
        store.put(small_keys(), blocks)
        assert store.flush()
    (found,) = kvstore_json("inspect", tmp_path, small_keys()[0])["blocks"]
    k0, v0, k1, _ = found["statistics"]
    assert (k0["nan"], k0["min"], k0["norm"]) == (64, None, None)
    assert (v0["zeros"], v0["norm"]) == (64, 0.0)
    assert (k1["inf"], k1["max"]) == (2, float(blocks[0, 1, 0][blocks[0, 1, 0].isfinite()].max()))
    assert "nan" in kvstore("inspect", tmp_path, small_keys()[0])[1]


def test_inspect_takes_the_start_of_a_key(kv: Path) -> None:
    found = kvstore_json("inspect", kv, KEY[:12].upper())["blocks"]
    assert [b["tier"] for b in found] == ["disk", "shared"]
    assert {b["key"] for b in found} == {KEY}
    assert f"block {KEY}" in kvstore("inspect", kv, KEY[:12])[1]


@pytest.mark.parametrize(
    ("key", "message"),
    [("zz", "64 hex digits"), ("", "64 hex digits"), ("f" * 64, "no block"), ("0" * 65, "64 hex digits")],
)
def test_inspect_of_a_key_that_is_not_stored(kv: Path, key: str, message: str) -> None:
    code, _, err = kvstore("inspect", kv, key)
    assert code == 2
    assert message in err


def test_inspect_of_a_start_that_several_keys_have(kv: Path) -> None:
    starts = [str(key)[:1] for key in small_keys()]
    twice = next(start for start in starts if starts.count(start) > 1)
    code, _, err = kvstore("inspect", kv / "disk", twice)
    assert code == 2
    assert "give more of it" in err


# -- verify


def test_verify_of_a_sound_store(kv: Path) -> None:
    report = kvstore_json("verify", kv)
    assert report["ok"]
    assert (report["good"], report["bad"], report["problems"]) == (18, [], {})
    assert report["nbytes"] == 6 * 4096 + 12 * 8192
    assert "18 chunks are good, 0 bad" in kvstore("verify", kv)[1]


def test_verify_of_a_signed_store(tmp_path: Path) -> None:
    key, other = tmp_path / "key", tmp_path / "other"
    key.write_bytes(b"k" * 32)
    other.write_bytes(b"o" * 32)
    kv = tmp_path / "kv"
    kv.mkdir(mode=0o700)
    fill(small_config(disk=kv / "disk", shared=kv / "shared", integrity_key_file=key))
    assert kvstore_json("verify", kv, "--integrity-key-file", key)["good"] == 12
    for arguments in ([], ["--integrity-key-file", other]):
        code, out, _ = kvstore("verify", kv, *arguments)
        assert code == 1
        assert out.count("signed with another integrity key") == 12
    assert kvstore("verify", kv, "--integrity-key-file", tmp_path / "none")[0] == 2
    (found,) = kvstore_json("inspect", kv / "disk", KEY, "--integrity-key-file", key)["blocks"]
    assert found["ok"]


# -- beside others


def test_nothing_is_written(kv: Path) -> None:
    before = tree(kv)
    kvstore_json("ls", kv)
    kvstore_json("inspect", kv)
    kvstore_json("inspect", kv, KEY)
    kvstore_json("verify", kv)
    assert tree(kv) == before


def test_read_only_directory(kv: Path) -> None:
    for path in (kv, *kv.rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    assert kvstore_json("verify", kv)["good"] == 18
    for path in (kv, *kv.rglob("*")):
        path.chmod(0o700)


@pytest.mark.parametrize("io", ["thread", "process"])
def test_beside_a_running_store(tmp_path: Path, io: str) -> None:
    config = dataclasses.replace(small_config(disk=tmp_path / "disk", shared=tmp_path / "shared"), io=io)
    with TieredStore(config) as store:
        store.put(small_keys()[:6], small_blocks()[:6])
        assert store.flush()
        assert {r["blocks"] for r in kvstore_json("ls", tmp_path)["namespaces"]} == {6}
        assert kvstore_json("verify", tmp_path)["good"] == 6
        store.put(small_keys(), small_blocks())
        assert store.flush()
        assert kvstore_json("verify", tmp_path)["good"] == 12
        assert len(kvstore_json("inspect", tmp_path, small_keys()[11])["blocks"]) == 2
    with TieredStore(config) as store:
        out = torch.empty_like(small_blocks())
        assert store.get(small_keys(), out) == NUM_BLOCKS
        assert torch.equal(out, small_blocks())


def test_what_a_directory_says_is_no_markup_and_moves_no_cursor(tmp_path: Path) -> None:
    identity = dataclasses.replace(IDENTITY, model="[bold]\x1b[2Jevil\r\n\u202e")
    fill(small_config(identity, disk=tmp_path / "disk"))
    for command in ("ls", "inspect"):
        code, out, _ = kvstore(command, tmp_path)
        assert code == 0
        assert "[bold]\N{REPLACEMENT CHARACTER}[2Jevil" in out
        assert not {"\x1b", "\r", "\u202e"} & set(out)
    assert kvstore_json("ls", tmp_path)["namespaces"][0]["model"] == identity.model


def test_a_damaged_block_is_shown_and_is_exit_code_1(kv: Path) -> None:
    with (kv / "disk/data").open("r+b") as f:
        f.write(b"\xff" * 8)
    code, out, _ = kvstore("inspect", kv, small_keys()[0])
    assert code == 1
    assert "BAD: payload does not match its checksum" in out
    assert "verified" in out  # the shared path's copy
    code, out, _ = kvstore("verify", kv)
    assert code == 1
    assert f"bad disk chunk in {kv / 'disk'}: slot 0 payload does not match its checksum" in out
    assert "17 chunks are good, 1 bad" in out
    (bad,) = json.loads(kvstore("verify", kv, "--json")[1])["bad"]
    assert bad["keys"] == [str(key) for key in small_keys()[:2]]


def test_problems_of_a_directory_are_shown(kv: Path) -> None:
    (kv / "disk/store.json").write_text("{}")
    code, out, _ = kvstore("ls", kv)
    assert code == 0
    assert f"problem in disk: {kv / 'disk'}: store.json: " in out
    assert kvstore("verify", kv)[0] == 1
    assert kvstore_json("inspect", kv)["problems"]
