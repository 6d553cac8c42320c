"""Keys of a prompt are those of vLLM's own requests."""

from __future__ import annotations

import pytest

from tests.engines.engine import NEEDS_VLLM

pytestmark = NEEDS_VLLM


@pytest.mark.parametrize("salt", ["", "tenant"])
@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
@pytest.mark.parametrize("seed", [None, "42"])
def test_prompt_keys(monkeypatch: pytest.MonkeyPatch, algorithm: str, seed: str | None, salt: str) -> None:
    from vllm import SamplingParams
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    from connectors.vllm_block_hash import prompt_keys

    if seed is None:
        monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    else:
        monkeypatch.setenv("PYTHONHASHSEED", seed)
    function = get_hash_fn_by_name(algorithm)
    init_none_hash(function)
    tokens = [3, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**40, *range(100_000, 100_047)]
    hasher = get_request_block_hasher(16, function)
    request = Request("r", tokens, SamplingParams(max_tokens=1), None, cache_salt=salt or None, block_hasher=hasher)
    keys = prompt_keys(tokens, 16, algorithm=algorithm, seed=seed or "vllm-none-hash", salt=salt, group=2)
    assert [key.block_hash for key in keys] == [bytes(h) for h in request.block_hashes]
    assert len(keys) == 3
    assert {key.group for key in keys} == {2}
