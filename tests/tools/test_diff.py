"""diff says what differs, and where: numbers that are none, blocks that are missing, keys that are mistyped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import KVIdentity, SharedTierConfig, StoreConfig, TieredStore
from kvstore.config import HostTierConfig
from kvstore.identity import Placement
from kvstore.keys import BlockKey
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, small_blocks, small_config, small_keys
from tests.tools.test_blocks import store_of
from tests.tools.test_cli import kvstore, kvstore_json

SIZE = LAYOUT.block_size


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.json"
    path.write_text(json.dumps(list(range(NUM_BLOCKS * SIZE))))
    return path


def put(path: Path, blocks: torch.Tensor, which: Sequence[int] = range(NUM_BLOCKS)) -> Path:
    """A disk directory with these blocks of the prompt."""
    with store_of(IDENTITY, path) as store:
        for i in which:
            assert store.put(small_keys()[i : i + 1], blocks[i : i + 1]) == 1
        assert store.flush()
    return path


def diff(*arguments: object) -> tuple[int, Any]:
    code, out, err = kvstore("diff", *arguments, "--json")
    assert out, err
    return code, json.loads(out)


def layer(found: Any, number: int, part: str) -> Any:
    return next(one for one in found["layers"] if (one["layer"], one["part"]) == (number, part))


# -- numbers that are none


def test_nan_is_no_number_that_is_equal(tmp_path: Path, prompt: Path) -> None:
    changed = small_blocks()
    changed[5, 1, 0, 1, 2, 3] = float("nan")
    a, b = put(tmp_path / "a", small_blocks()), put(tmp_path / "b", changed)
    code, found = diff(a, b, "--tokens", prompt)
    one = layer(found, 1, "K")
    assert code == 1
    assert (one["cosine"], one["relative"], one["max_abs"]) == (None, None, None)
    assert (one["nan_a"], one["nan_b"], one["apart"], one["token"]) == (0, 1, 1, 22)
    others = [row for row in found["layers"] if row is not one]
    assert all(row["cosine"] == pytest.approx(1) and row["relative"] == 0 == row["apart"] for row in others)
    assert found["summary"] == "in b, K of layer 1 has 1 NaN from token 22 on; 1 layer is equal"
    code, out, _ = kvstore("diff", a, b, "--tokens", prompt)
    assert out.splitlines()[0] == found["summary"]
    assert " nan " in out
    code, found = diff(b, b, "--tokens", prompt)  # both have it there
    assert code == 0 and found["equal"]
    assert layer(found, 1, "K")["nan_a"] == layer(found, 1, "K")["nan_b"] == 1
    assert layer(found, 1, "K")["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("zero", ["a", "b", "both"])
def test_what_is_zero_points_nowhere(tmp_path: Path, prompt: Path, zero: str) -> None:
    changed = small_blocks()
    changed[:, 0, 1] = 0
    a = put(tmp_path / "a", small_blocks() if zero == "b" else changed)
    b = put(tmp_path / "b", small_blocks() if zero == "a" else changed)
    code, found = diff(a, b, "--tokens", prompt)
    one = layer(found, 0, "V")
    if zero == "both":
        assert (code, one["cosine"], one["relative"]) == (0, 1, 0)
    else:
        assert (code, one["cosine"], one["relative"]) == (1, 0, 1 if zero == "b" else None)
        assert found["summary"] == f"in {zero}, V of layer 0 is all zero; 1 layer is equal"


def test_infinities(tmp_path: Path, prompt: Path) -> None:
    same, other = small_blocks(), small_blocks()
    same[3, 0, 0, 0, 1, 0] = other[3, 0, 0, 0, 1, 0] = float("inf")
    other[3, 1, 0, 0, 1, 0] = float("-inf")
    a, b = put(tmp_path / "a", same), put(tmp_path / "b", other)
    code, found = diff(a, b, "--tokens", prompt, "--rtol", 0.5)
    assert code == 1
    assert (layer(found, 0, "K")["inf_a"], layer(found, 0, "K")["apart"]) == (1, 0)
    assert (layer(found, 1, "K")["inf_b"], layer(found, 1, "K")["apart"]) == (1, 1)
    assert found["summary"] == "in b, K of layer 1 has 1 infinite from token 13 on; 1 layer is equal"


# -- where


def test_a_position_is_that_in_the_prompt(tmp_path: Path, prompt: Path) -> None:
    """Also where blocks before it are missing."""
    changed = small_blocks()
    changed[9, 1, 1, 0, 3] += 1
    some = [i for i in range(NUM_BLOCKS) if i not in (0, 2)]
    a, b = put(tmp_path / "a", small_blocks(), some), put(tmp_path / "b", changed, reversed(range(NUM_BLOCKS)))
    code, found = diff(a, b, "--tokens", prompt)
    assert code == 1
    assert (found["first"]["position"], found["first"]["token"]) == (39, 3)
    assert layer(found, 1, "V")["token"] == 39
    assert found["only_b"] == [{"key": str(small_keys()[i]), "token": i * SIZE} for i in (0, 2)]
    assert "only b has 2 blocks" in found["summary"]


def test_by_position_pairs_what_is_at_the_same_place(tmp_path: Path, prompt: Path) -> None:
    a = put(tmp_path / "a", small_blocks(), [i for i in range(NUM_BLOCKS) if i != 2])
    b = put(tmp_path / "b", small_blocks(), [i for i in range(NUM_BLOCKS) if i != 4])
    code, found = diff(a, b, "--tokens", prompt, "--by-position")
    assert (code, found["common"], found["first"]) == (1, NUM_BLOCKS - 2, None)
    assert [one["token"] for one in found["only_a"]] == [16]
    assert [one["token"] for one in found["only_b"]] == [8]
    _, out, _ = kvstore("diff", a, b, "--tokens", prompt, "--by-position")
    assert out.splitlines()[0] == "10 blocks are equal; only a has 1 block; only b has 1 block"
    assert f"only a has: {str(small_keys()[4])[:16]} (from token 16)" in out


def test_whole_stores_have_no_order(tmp_path: Path) -> None:
    changed = small_blocks()
    changed[5, 0, 0] += 1
    a, b = put(tmp_path / "a", small_blocks()), put(tmp_path / "b", changed)
    code, found = diff(a, b)
    assert (code, found["first"]["position"], found["first"]["token"]) == (1, None, 0)
    assert layer(found, 0, "K")["token"] is None
    _, out, _ = kvstore("diff", a, b)
    assert "1 of 12 blocks apart, such as token 0 of block" in out
    code, _, err = kvstore("diff", a, b, "--by-position")
    assert (code, "have no order" in err) == (2, True)


def test_a_files_order_is_a_position(tmp_path: Path, prompt: Path) -> None:
    changed = small_blocks()
    changed[5, 0, 0, 0, 1] += 1
    a, b = put(tmp_path / "a", small_blocks()), put(tmp_path / "b", changed)
    options = [part for i in (7, 5, 1) for part in ("--key", small_keys()[i])]
    kvstore_json("dump", a, *options, "--out", tmp_path / "file")
    _, found = diff(tmp_path / "file", b, "--key", small_keys()[5])
    assert found["first"]["position"] == SIZE + 1  # the second of the file
    _, found = diff(tmp_path / "file", b, "--tokens", prompt)  # a prompt is looked for in a file too
    assert found["first"]["position"] == 5 * SIZE + 1
    assert found["common"] == 3


def test_only_layers_that_differ_are_shown(tmp_path: Path, prompt: Path) -> None:
    changed = small_blocks()
    changed[:, 1, 1] *= 2
    a, b = put(tmp_path / "a", small_blocks()), put(tmp_path / "b", changed)
    rows = {option: kvstore("diff", a, b, "--tokens", prompt, *option)[1].count("│ V ") for option in ((), ("--all",))}
    assert rows == {(): 1, ("--all",): 2}
    assert len(diff(a, b, "--tokens", prompt)[1]["layers"]) == 4
    _, found = diff(a, put(tmp_path / "c", small_blocks() + 1), "--tokens", prompt)
    assert "2 of 2 layers are apart; no layer is equal" in found["summary"]


# -- in parts


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_parts_together_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: str) -> None:
    """Two stores of chunks of two blocks, of which each lacks some, and a few numbers are apart."""
    changed, keys = small_blocks(), small_keys()
    changed[5, 0, 0] += 1
    for name, blocks, which in (("a", small_blocks(), range(8)), ("b", changed, range(2, NUM_BLOCKS))):
        with TieredStore(small_config(**{tier: tmp_path / name})) as store:
            assert store.put(keys[which.start : which.stop], blocks[which.start : which.stop]) == len(which)
            assert store.flush()
    code, whole = diff(tmp_path / "a", tmp_path / "b")
    assert (code, whole["common"], whole["blocks_apart"]) == (1, 6, 1)
    assert {one["key"] for one in whole["only_a"]} == set(map(str, keys[:2]))
    assert {one["key"] for one in whole["only_b"]} == set(map(str, keys[8:]))
    assert (whole["only_a_blocks"], whole["only_b_blocks"], whole["unreadable_blocks"]) == (2, 4, 0)
    monkeypatch.setattr("tools.diff.MOST_BLOCKS", 1)  # a part for each first byte that there is
    _, found = diff(tmp_path / "a", tmp_path / "b")
    for one in (whole, found):
        one["only_a"].sort(key=str)
        one["only_b"].sort(key=str)
    layers, other_layers = found.pop("layers"), whole.pop("layers")
    assert found == whole
    assert [row["apart"] for row in layers] == [row["apart"] for row in other_layers]


def test_a_file_and_a_whole_store(tmp_path: Path, prompt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = put(tmp_path / "a", small_blocks())
    options = [part for i in (7, 5, 1) for part in ("--key", small_keys()[i])]
    kvstore_json("dump", store, *options, "--out", tmp_path / "file")
    less = put(tmp_path / "b", small_blocks(), range(6))
    monkeypatch.setattr("tools.diff.MOST_BLOCKS", 4)
    code, found = diff(tmp_path / "file", less)
    assert (code, found["common"], found["only_b_blocks"]) == (1, 2, 4)
    assert found["only_a"] == [{"key": str(small_keys()[7]), "token": 0}]
    _, other = diff(less, tmp_path / "file")
    assert (other["only_a"], other["only_b"]) == (found["only_b"], found["only_a"])


def test_places_of_one_block_are_told_apart(tmp_path: Path) -> None:
    """A path with both tiers: a block counts once, and is read where it is sound."""
    path, keys = tmp_path / "kv", small_keys()
    for tier in ("disk", "shared"):
        with TieredStore(small_config(**{tier: path / tier})) as store:
            assert store.put(keys, small_blocks()) == NUM_BLOCKS
            assert store.flush()
    with (path / "disk" / "data").open("r+b") as f:
        f.write(bytes(1 << 20))
    code, found = diff(path, put(tmp_path / "b", small_blocks()))
    assert (code, found["equal"], found["common"]) == (0, True, NUM_BLOCKS)


def test_what_is_listed_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.difference.MOST_LISTED", 3)
    a, b = put(tmp_path / "a", small_blocks()), put(tmp_path / "b", small_blocks(), [0])
    _, found = diff(a, b)
    assert (len(found["only_a"]), found["only_a_blocks"]) == (3, NUM_BLOCKS - 1)
    assert "only a has 11 blocks" in found["summary"]
    assert " and 8 more" in kvstore("diff", a, b)[1]


# -- what is not there


def test_a_mistyped_key_is_not_equal(tmp_path: Path, prompt: Path) -> None:
    a = put(tmp_path / "a", small_blocks())
    file = tmp_path / "file"
    kvstore_json("dump", a, "--tokens", prompt, "--out", file)
    for path in (a, file):
        code, _, err = kvstore("diff", path, path, "--key", "ffffffff")
        assert (code, "no block whose key begins with 'ffffffff'" in err) == (2, True), err
        keys = sorted(map(str, small_keys()))
        start = next(k[:1] for k, other in zip(keys, keys[1:], strict=False) if k[0] == other[0])
        code, _, err = kvstore("diff", path, path, "--key", start)
        assert (code, f"keys begin with {start!r}" in err) == (2, True), err
    other = tmp_path / "other.json"
    other.write_text(json.dumps(list(range(100, 120))))
    assert kvstore("diff", file, file, "--tokens", other)[0] == 2


def test_nothing_is_compared_with_nothing(tmp_path: Path) -> None:
    a, b = put(tmp_path / "a", small_blocks(), []), put(tmp_path / "b", small_blocks(), [])
    code, _, err = kvstore("diff", a, b)
    assert (code, "nothing was compared" in err) == (2, True)
    code, found = diff(put(tmp_path / "c", small_blocks(), [0]), put(tmp_path / "d", small_blocks(), [1]))
    assert (code, found["equal"], found["common"]) == (1, False, 0)
    assert found["summary"] == "nothing was compared; only a has 1 block; only b has 1 block"


def test_what_was_signed_needs_its_key(tmp_path: Path, prompt: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"a secret of the tests")
    config = small_config(disk=tmp_path / "disk", integrity_key_file=key)
    with TieredStore(config) as store:
        store.put(small_keys(), small_blocks())
        assert store.flush()
    code, found = diff(tmp_path / "disk", tmp_path / "disk", "--tokens", prompt, "--integrity-key-file", key)
    assert (code, found["equal"]) == (0, True)
    code, found = diff(tmp_path / "disk", tmp_path / "disk", "--tokens", prompt)
    assert (code, len(found["unreadable"])) == (1, NUM_BLOCKS)


def two_models(path: Path) -> list[BlockKey]:
    """Two models' KV under the same keys in a shared path, as vLLM makes them of one tokenizer."""
    keys = small_keys()
    for i, model in enumerate(("model-A", "model-B")):
        identity = KVIdentity(model=model, revision="r", layout=LAYOUT,
                              placement=Placement(byte_layout="vllm 0.32 cuda LBNHC X 9.0"))  # fmt: skip
        shared = SharedTierConfig(path=str(path), capacity_nbytes=8 << 20)
        config = StoreConfig(identity=identity, host=HostTierConfig(num_blocks=32), shared=shared)
        with TieredStore(config) as store:
            assert store.put(keys, small_blocks() + i) == NUM_BLOCKS
            assert store.flush()
    return keys


def test_one_models_numbers_are_not_taken_for_anothers(tmp_path: Path) -> None:
    keys = two_models(tmp_path / "shared")
    code, _, err = kvstore("diff", tmp_path / "shared", tmp_path / "shared", "--key", keys[0])
    assert (code, "several identities" in err and "model-A" in err) == (2, True)


def test_quantised_kv_by_key(tmp_path: Path) -> None:
    """The same keys, other numbers: within a tolerance or not."""
    a = put(tmp_path / "a", small_blocks())
    b = put(tmp_path / "b", small_blocks().to(torch.float8_e4m3fn).to(LAYOUT.dtype))
    code, found = diff(a, b)
    assert code == 1 and found["blocks_apart"] == NUM_BLOCKS
    assert all(0.01 < row["relative"] < 0.1 and row["cosine"] > 0.99 for row in found["layers"])
    code, out, _ = kvstore("diff", a, b, "--rtol", 0.2, "--atol", 0.01)
    assert (code, out.splitlines()[0]) == (0, "12 blocks are equal, within the tolerance")
