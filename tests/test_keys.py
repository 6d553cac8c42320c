"""A key names one prefix of one model for one tenant, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import BlockKey, KVIdentity, KVLayout, hash_blocks
from kvstore.errors import ConfigError, KeyFormatError
from kvstore.keys import KEY_NBYTES, MAX_TOKEN_ID, array_to_keys, keys_to_array

BLOCK = 4
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_size=1, block_size=BLOCK, dtype=torch.int8)
IDENTITY = KVIdentity(model="m", revision="r", layout=LAYOUT)

tokens = st.lists(st.integers(0, MAX_TOKEN_ID), max_size=5 * BLOCK)
some_tokens = st.lists(st.integers(0, MAX_TOKEN_ID), min_size=BLOCK, max_size=5 * BLOCK)
keys = st.builds(BlockKey.of, st.binary(min_size=32, max_size=32), st.integers(0, 2**32 - 1))


def hashed(token_ids: Any, **salt: Any) -> list[BlockKey]:
    return hash_blocks(token_ids, BLOCK, salt.pop("identity", IDENTITY), **salt)


@given(tokens)
def test_full_blocks_only(token_ids: list[int]) -> None:
    assert len(hashed(token_ids)) == len(token_ids) // BLOCK


@given(prefix=tokens, one=tokens, other=tokens)
def test_equal_prefixes_and_only_they_have_equal_keys(prefix: list[int], one: list[int], other: list[int]) -> None:
    a, b = hashed(prefix + one), hashed(prefix + other)
    full = [len(t) // BLOCK * BLOCK for t in (prefix + one, prefix + other)]
    for i, (key_a, key_b) in enumerate(zip(a, b, strict=False)):
        end = (i + 1) * BLOCK
        assert end <= min(full)
        assert (key_a == key_b) == ((prefix + one)[:end] == (prefix + other)[:end])


@given(token_ids=some_tokens, at=st.integers(0), token=st.integers(0, MAX_TOKEN_ID))
def test_one_other_token_changes_its_block_and_all_behind_it(token_ids: list[int], at: int, token: int) -> None:
    token_ids = token_ids[: len(token_ids) // BLOCK * BLOCK]
    at %= len(token_ids)
    changed = [*token_ids[:at], token, *token_ids[at + 1 :]]
    same = [a == b for a, b in zip(hashed(token_ids), hashed(changed), strict=True)]
    first = at // BLOCK if token != token_ids[at] else len(same)
    assert same == [i < first for i in range(len(same))]


@given(some_tokens)
def test_no_key_is_shared_between_models_tenants_and_adapters(token_ids: list[int]) -> None:
    salts: list[dict[str, Any]] = [
        {},
        {"tenant": "a"},
        {"tenant": "b"},
        {"adapter_digest": b"a"},
        {"adapter_digest": b"b"},
        {"tenant": "a", "adapter_digest": b"a"},
        {"group": 1},
        {"identity": dataclasses.replace(IDENTITY, model="other")},
        {"identity": dataclasses.replace(IDENTITY, revision="other")},
        {"identity": dataclasses.replace(IDENTITY, hash_seed="1")},
    ]
    all_keys = [key for salt in salts for key in hashed(token_ids, **salt)]
    assert len(set(all_keys)) == len(all_keys)


@given(some_tokens, st.text(max_size=4), st.text(max_size=4))
def test_tenant_and_adapter_do_not_run_into_each_other(token_ids: list[int], a: str, b: str) -> None:
    together = hashed(token_ids, tenant=a + b)
    apart = hashed(token_ids, tenant=a, adapter_digest=b.encode())
    assert (together[0] == apart[0]) == (b == "")


@given(some_tokens)
def test_keys_repeat_in_any_container_and_integer_type(token_ids: list[int]) -> None:
    small = [t % 50_000 for t in token_ids]
    expected = hashed(small)
    for same in (
        tuple(small),
        np.array(small, dtype=np.int32),
        np.array(small, dtype=">i8"),
        np.array(small, dtype=np.uint64),
        np.repeat(np.array(small), 2)[::2],
        torch.tensor(small),
        torch.tensor(small, dtype=torch.int32),
    ):
        assert hashed(same) == expected


def test_keys_never_change() -> None:
    """Keys written today are looked up tomorrow; and the chain is what the module says it is."""
    root = hashlib.sha256(b"kvstore block hash 1\0" + IDENTITY.digest() + (2).to_bytes(8, "little") + b"t1" + b"ad")
    first = hashlib.sha256(root.digest() + np.arange(4, dtype="<i8").tobytes()).digest()
    second = hashlib.sha256(first + np.arange(4, 8, dtype="<i8").tobytes()).digest()
    found = hashed(range(8), tenant="t1", adapter_digest=b"ad", group=3)
    assert found == [first + b"\3\0\0\0", second + b"\3\0\0\0"]


@pytest.mark.parametrize(
    "token_ids",
    [[-1, 0, 1, 2], [2**63, 0, 1, 2], [0.5] * 4, [[0, 1], [2, 3]], ["a"] * 4, [None] * 4, [True, False] * 2],
)
def test_what_are_no_tokens_is_refused(token_ids: Any) -> None:
    with pytest.raises(ConfigError, match="token_ids: "):
        hashed(token_ids)


def test_another_block_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="block_size: 16 is not the identity's 4"):
        hash_blocks([0] * 16, 16, IDENTITY)


@given(keys)
def test_text_round_trip(key: BlockKey) -> None:
    assert BlockKey.parse(str(key)) == key
    assert BlockKey.of(key.block_hash, key.group) == key
    assert repr(key).startswith("BlockKey(")


@given(keys)
def test_text_without_a_group_means_group_0(key: BlockKey) -> None:
    assert BlockKey.parse(key.block_hash.hex()) == BlockKey.of(key.block_hash, 0)


@pytest.mark.parametrize(
    "text", ["", "00", "g" * 64, "0" * 62, "0" * 66, "0" * 64 + ".x", "0" * 64 + ".-1", "0" * 64 + f".{2**32}", "é"]
)
def test_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(KeyFormatError, match="64 hex digits"):
        BlockKey.parse(text)


@given(st.text(max_size=80))
def test_any_text_is_a_key_or_refused(text: str) -> None:
    try:
        key = BlockKey.parse(text)
    except KeyFormatError:
        return
    assert len(key) == KEY_NBYTES


@pytest.mark.parametrize("nbytes", [0, KEY_NBYTES - 1, KEY_NBYTES + 1])
def test_bytes_of_another_length_are_no_key(nbytes: int) -> None:
    with pytest.raises(KeyFormatError):
        BlockKey(bytes(nbytes))


@given(st.lists(keys, max_size=6))
def test_array_round_trip(some: list[BlockKey]) -> None:
    array = keys_to_array(some)
    assert array.shape == (len(some), KEY_NBYTES)
    assert array_to_keys(array) == some


@pytest.mark.parametrize("lengths", [[35], [35, 37], [0, 36]])
def test_array_of_what_are_no_keys_is_refused(lengths: list[int]) -> None:
    with pytest.raises(KeyFormatError):
        keys_to_array([bytes(n) for n in lengths])
