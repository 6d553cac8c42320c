"""Other systems' stores: what is there is shown and dumped as it is; what lies is a problem, and never believed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.foreign import (
    BLOCK,
    FS_CONFIG,
    HEADS,
    LAYERS,
    SIZE,
    TOKENS,
    example_store,
    fs_base,
    fs_store,
    prompt_folder,
    tensors_of,
)
from tests.small import copy_store
from tests.tools.test_cli import kvstore, kvstore_json, tree


def folder_of(path: Path, num_tokens: int) -> Path:
    """Of the tokens from 0 on."""
    tokens = torch.arange(num_tokens, dtype=torch.int64).numpy().tobytes()
    return path / hashlib.md5(tokens, usedforsecurity=False).hexdigest()


# -- vLLM's ExampleConnector


def test_prompts_folders(tmp_path: Path) -> None:
    kv = example_store(tmp_path / "kv")
    before = tree(tmp_path / "kv")
    (row,) = kvstore_json("ls", tmp_path / "kv")["namespaces"]
    nbytes = sum(p.stat().st_size for p in (tmp_path / "kv").rglob("*.safetensors"))
    assert (row["tier"], row["chunks"], row["nbytes"], row["state"]) == ("vllm-example", 2, nbytes, "another system's")
    assert "vllm-example" in kvstore("ls", tmp_path)[1]  # right below
    (described,) = kvstore_json("inspect", tmp_path / "kv")["foreign"]
    assert described["description"] == {"layers": 3, "dtype": "bfloat16", "layer": LAYERS[0]}
    name = folder_of(tmp_path / "kv", TOKENS).name
    (found,) = kvstore_json("inspect", tmp_path / "kv", name[:9], "--per-head")["blocks"]
    assert found["key"] == name and found["ok"]
    assert found["layers"]["layers.2.kv"] == LAYERS[2]  # 10 comes after 1
    assert found["shapes"]["layers.0.kv"] == [TOKENS, HEADS, 2 * SIZE]
    assert len(found["statistics"]) == 3 * 2 * HEADS
    for row in found["statistics"]:
        half = 0 if row["part"] == "1st half" else 1
        values = kv[LAYERS[row["layer"]]].double()[:, row["head"], half * SIZE : (half + 1) * SIZE]
        assert row["norm"] == pytest.approx(float(values.norm()))
        assert (row["min"], row["max"]) == (values.min(), values.max())
    assert "not verified" in kvstore("inspect", tmp_path / "kv", name)[1]
    assert tree(tmp_path / "kv") == before


def test_a_prompts_folder_is_found_by_its_tokens(tmp_path: Path) -> None:
    kv = example_store(tmp_path / "kv")
    tokens = tmp_path / "tokens"
    for num_tokens, stored in ((TOKENS + 5, TOKENS), (TOKENS, TOKENS), (TOKENS - 1, BLOCK)):
        tokens.write_text(json.dumps(list(range(num_tokens))))
        report = kvstore_json("dump", tmp_path / "kv", "--tokens", tokens, "--out", tmp_path / "out", "--force")
        assert report["entry"] == folder_of(tmp_path / "kv", stored).name
        found, metadata = tensors_of(tmp_path / "out")
        for i, layer in enumerate(LAYERS):
            assert torch.equal(found[f"layers.{i}.kv"], kv[layer][:stored])
        assert metadata["system"] == "vllm-example"
    tokens.write_text("[5]")
    assert kvstore("dump", tmp_path / "kv", "--tokens", tokens, "--out", tmp_path / "none")[0] == 2


def test_older_shapes(tmp_path: Path) -> None:
    kv = torch.randn(2, 16, 4, 8)
    prompt_folder(tmp_path / "old", [1], {LAYERS[0]: kv})
    prompt_folder(tmp_path / "mla", [1], {LAYERS[0]: kv[0, :, 0].clone()})
    for name, wanted in (("old", {"key": kv[0], "value": kv[1]}), ("mla", {"latent": kv[0, :, 0]})):
        (folder,) = (tmp_path / name).iterdir()
        kvstore_json("dump", tmp_path / name, "--key", folder.name, "--out", tmp_path / "out", "--force")
        found, _ = tensors_of(tmp_path / "out")
        assert {k: v.tolist() for k, v in found.items()} == {f"layers.0.{k}": v.tolist() for k, v in wanted.items()}
        (shown,) = kvstore_json("inspect", tmp_path / name, folder.name)["blocks"]
        assert [row["part"] for row in shown["statistics"]] == list(wanted)


def test_our_shared_path_is_none_of_these(small_store: Path, tmp_path: Path) -> None:
    kv = copy_store(small_store, tmp_path / "kv")
    (namespace, *_) = (kv / "shared").iterdir()
    save_file({"kv_cache": torch.zeros(1, 1, 2)}, namespace / "layer.safetensors")
    tiers = {row["tier"] for row in kvstore_json("ls", kv)["namespaces"]}
    assert {"disk", "shared"} <= tiers
    assert kvstore_json("verify", kv / "shared")["good"] == 12


def test_commands_that_need_checksums_say_so(tmp_path: Path) -> None:
    example_store(tmp_path / "kv")
    for arguments in (("verify", tmp_path / "kv"), ("diff", tmp_path / "kv", tmp_path / "kv")):
        code, _, err = kvstore(*arguments)
        assert code == 2
        assert "another system's KV (vllm-example)" in err


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncated", "not a safetensors file"),
        ("symlink", "has no layers"),
        ("fifo", "has no layers"),
        ("other tensor", "has no tensor"),
        ("five dimensions", "of shape"),
        ("empty", "empty one"),
    ],
)
def test_a_damaged_layer_is_told(tmp_path: Path, damage: str, reason: str) -> None:
    folder = prompt_folder(tmp_path / "kv", [1], {LAYERS[0]: torch.zeros(4, 2, 2)})
    (file,) = folder.iterdir()
    if damage == "truncated":
        os.truncate(file, 40)
    elif damage == "symlink":
        file.rename(tmp_path / "aside")
        file.symlink_to(tmp_path / "aside")
    elif damage == "fifo":
        file.unlink()
        os.mkfifo(file)
    else:
        shape = {"other tensor": (1,), "five dimensions": (1, 1, 1, 1, 1), "empty": (0, 2)}[damage]
        save_file({"x" if damage == "other tensor" else "kv_cache": torch.zeros(shape)}, file)
    code, out, err = kvstore("inspect", tmp_path / "kv", folder.name, "--json")
    if damage in ("symlink", "fifo"):
        assert code == 2 and "no block" in err
    else:
        assert code == 1 and reason in json.loads(out)["blocks"][0]["reason"]
    assert kvstore("dump", tmp_path / "kv", "--key", folder.name, "--out", tmp_path / "out")[0] == 2
    assert not (tmp_path / "out").exists()
    assert kvstore("ls", tmp_path / "kv")[0] == 0


# -- vLLM's fs tier


def test_fs_files(tmp_path: Path) -> None:
    pages = fs_store(tmp_path / "kv")
    (row,) = kvstore_json("ls", tmp_path / "kv")["namespaces"]
    assert (row["tier"], row["model"], row["chunks"], row["nbytes"]) == ("vllm-fs", "org/model", 3, 3 * 8192)
    (described,) = kvstore_json("inspect", tmp_path)["foreign"]
    assert described["description"] == FS_CONFIG
    name = hashlib.sha256(bytes([1])).hexdigest()
    (found,) = kvstore_json("inspect", tmp_path / "kv", name[:10])["blocks"]
    assert [(row["layer"], row["part"]) for row in found["statistics"]] == [(i, "pages") for i in range(3)]
    for row in found["statistics"]:
        assert row["norm"] == pytest.approx(float(pages[1, row["layer"]].double().norm()))
    kvstore_json("dump", tmp_path / "kv", "--key", name, "--out", tmp_path / "out")
    dumped, metadata = tensors_of(tmp_path / "out")
    assert sorted(dumped) == [f"layers.{i}.pages" for i in range(3)]
    assert all(torch.equal(dumped[f"layers.{i}.pages"], pages[1, i]) for i in range(3))
    assert json.loads(metadata["description"]) == FS_CONFIG


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "auto"},
        {"pp_size": 2},
        {"kv_cache_groups": []},
        {"kv_cache_groups": [{"tokens_per_block": 1, "layer_names": ["a"]}]},  # any size of page would fit
        {"kv_cache_groups": [{"tokens_per_block": n, "layer_names": ["a"]} for n in (8, 16)]},
    ],
    ids=str,
)
def test_fs_files_that_cannot_be_told_apart_are_bytes(tmp_path: Path, changes: dict[str, object]) -> None:
    fs_store(tmp_path / "kv", 1, **changes)
    name = hashlib.sha256(bytes([0])).hexdigest()
    kvstore_json("dump", tmp_path / "kv", "--key", name, "--out", tmp_path / "out")
    (file,) = (tmp_path / "kv").rglob("*.bin")
    assert tensors_of(tmp_path / "out")[0]["pages"].numpy().tobytes() == file.read_bytes()
    (shown,) = kvstore_json("inspect", tmp_path / "kv", name)["blocks"]
    assert shown["statistics"] == [] and shown["shapes"] == {"pages": [8192]}


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"tp_size": true}', "\xff", None])
def test_an_fs_configuration_that_is_damaged_is_a_problem(tmp_path: Path, text: str | None) -> None:
    fs_store(tmp_path / "kv", 1)
    config = Path(fs_base(tmp_path / "kv", FS_CONFIG)) / "config.json"
    config.unlink()
    if text is None:
        config.symlink_to("/etc/passwd")
    else:
        config.write_bytes(text.encode("latin-1"))
    found = kvstore_json("ls", tmp_path / "kv")
    assert found["namespaces"][0]["chunks"] == 1
    assert len(found["problems"]) == 1


def test_fs_names_that_are_not_vllms_are_passed_over(tmp_path: Path) -> None:
    fs_store(tmp_path / "kv", 1)
    (file,) = (tmp_path / "kv").rglob("*.bin")
    (file.parent / "x.bin").touch()
    (file.parent / f"{'0' * 64}.bin_12.tmp").touch()
    (file.parent / f"{'0' * 64}.bin").symlink_to("/etc/passwd")
    shutil.copytree(file.parent, file.parent.parent / "zz_g0")
    found = kvstore_json("ls", tmp_path / "kv")
    assert found["namespaces"][0]["chunks"] == 1
    (problems,) = found["problems"].values()
    assert [p.endswith("not a regular file") for p in problems] == [True]
