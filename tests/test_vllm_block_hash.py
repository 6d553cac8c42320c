"""Our writers of pickle and CBOR against those that vLLM uses; `tests/engines/test_prompt_keys.py` has vLLM itself."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from connectors.vllm_block_hash import cbor, pickled, prompt_keys
from kvstore.errors import ConfigError

tokens = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 2**63 - 1)), max_size=40).map(tuple)
salts = st.one_of(st.none(), st.text(min_size=1, max_size=300).map(lambda salt: (("cache_salt", salt),)))


@given(st.binary(min_size=32, max_size=32), tokens, salts)
def test_pickle(parent: bytes, ids: tuple[int, ...], extra: tuple[tuple[str, str]] | None) -> None:
    assert pickled((parent, ids, extra)) == pickle.dumps((parent, ids, extra), protocol=5)


@given(st.text(max_size=300))
def test_a_pickled_seed(seed: str) -> None:
    assert pickled(seed) == pickle.dumps(seed, protocol=5)


def test_cbor() -> None:
    """The examples of RFC 8949, appendix A."""
    for value, wanted in (
        ((1, (2, 3), (4, 5)), "8301820203820405"),
        (tuple(range(1, 26)), "98190102030405060708090a0b0c0d0e0f101112131415161718181819"),
        (1000000000000, "1b000000e8d4a51000"),
        (1000000, "1a000f4240"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ("\u6c34", "63e6b0b4"),
        (None, "f6"),
        (100, "1864"),
        (1000, "1903e8"),
    ):
        assert cbor(value).hex() == wanted


def test_what_is_not_known() -> None:
    with pytest.raises(ConfigError, match="xxhash"):
        prompt_keys(range(16), 16, algorithm="xxhash", seed="")
    with pytest.raises(ConfigError, match="not known here"):
        prompt_keys(range(1 << 16), 1 << 16, algorithm="sha256", seed="")
