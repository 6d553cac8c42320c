"""Whatever changes the meaning of KV bytes changes the identity; digests stay what they are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
import torch

from kvstore import KVIdentity, KVLayout, Placement
from kvstore.errors import ConfigError
from kvstore.identity import NAMESPACE_NBYTES
from kvstore.layout import DTYPES, dtype_name, parse_dtype

OTHER_CONTENT: list[dict[str, Any]] = [
    {"model": "other"},
    {"revision": "other"},
    {"draft_model": "draft@1"},
    {"kv_scales": "abc"},
    {"rope": "theta=10000"},
    {"group_kind": "mla"},
    {"hash_algorithm": "sha256_cbor"},
    {"hash_seed": "1"},
]
OTHER_LAYOUT_CONTENT: list[dict[str, Any]] = [
    {"kv_dim": 1},
    {"head_size": 16},
    {"block_size": 8},
    {"dtype": torch.float16},
]
OTHER_PLACEMENT: list[dict[str, Any]] = [
    {"byte_layout": "LBHNC"},
    {"tp_size": 2},
    {"pp_size": 2},
    {"first_layer": 1},
    {"first_kv_head": 1},
]


@pytest.mark.parametrize("change", OTHER_CONTENT)
def test_other_content_is_another_namespace(identity: KVIdentity, change: dict[str, Any]) -> None:
    other = dataclasses.replace(identity, **change)
    assert other.digest() != identity.digest()
    assert other.namespace() != identity.namespace()
    assert other.placement_digest(1) == identity.placement_digest(1)


@pytest.mark.parametrize("change", OTHER_LAYOUT_CONTENT)
def test_other_block_content_is_another_namespace(identity: KVIdentity, change: dict[str, Any]) -> None:
    other = dataclasses.replace(identity, layout=dataclasses.replace(identity.layout, **change))
    assert other.digest() != identity.digest()


@pytest.mark.parametrize("change", OTHER_PLACEMENT)
def test_other_placement_is_the_same_content(identity: KVIdentity, change: dict[str, Any]) -> None:
    other = dataclasses.replace(identity, placement=Placement(**change))
    assert other.digest() == identity.digest()
    assert other.placement_digest(1) != identity.placement_digest(1)


@pytest.mark.parametrize("change", [{"num_layers": 4}, {"num_kv_heads": 1}])
def test_another_part_of_the_model_is_another_placement(identity: KVIdentity, change: dict[str, Any]) -> None:
    other = dataclasses.replace(identity, layout=dataclasses.replace(identity.layout, **change))
    assert other.digest() == identity.digest()
    assert other.placement_digest(1) != identity.placement_digest(1)


def test_other_chunks_are_another_placement(identity: KVIdentity) -> None:
    assert identity.placement_digest(1) != identity.placement_digest(2)


def test_every_field_counts(identity: KVIdentity) -> None:
    """A field that is added later must go into one of the two digests, and into this test."""
    tested = {name for change in OTHER_CONTENT for name in change} | {"layout", "placement"}
    assert {f.name for f in dataclasses.fields(KVIdentity)} == tested
    assert {f.name for f in dataclasses.fields(Placement)} == {name for change in OTHER_PLACEMENT for name in change}


def test_epochs_are_namespaces_of_one_content(identity: KVIdentity) -> None:
    namespaces = {identity.namespace(), identity.namespace(b"1" * 16), identity.namespace(b"2" * 16)}
    assert len(namespaces) == 3
    assert {len(n) for n in namespaces} == {NAMESPACE_NBYTES}
    assert identity.namespace(bytes(16)) == identity.namespace()


def test_digest_is_sha256_of_canonical_json(identity: KVIdentity) -> None:
    text = json.dumps(identity.content(), sort_keys=True, separators=(",", ":"))
    assert identity.digest() == hashlib.sha256(text.encode()).digest()


def test_digests_never_change() -> None:
    """What is stored today is found tomorrow; a new FORMAT_VERSION is what changes these."""
    layout = KVLayout(num_layers=30, num_kv_heads=3, head_size=64, block_size=16, dtype=torch.bfloat16)
    identity = KVIdentity(model="SmolLM2-135M", revision="é" * 4, layout=layout)
    assert identity.digest().hex() == "26dd01a0ea1df2b6238a4732abeca95b85aa83b3edcb976c545b9d1c3b2f7509"
    assert identity.placement_digest(4).hex() == "321e711d61394facd0b00f307502b7127251a3b443cec917d5e757425b13a94f"
    assert identity.namespace().hex() == "5788538d9bba4212822c16d643ad9647"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", ""),
        ("model", " "),
        ("model", None),
        ("revision", ""),
        ("revision", "main"),
        ("revision", "Latest"),
        ("revision", "auto"),
        ("layout", {"num_layers": 1}),
        ("rope", "auto"),
        ("kv_scales", "auto"),
        ("hash_seed", 0),
        ("group_kind", None),
    ],
)
def test_wrong_field_is_refused_by_name(identity: KVIdentity, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"identity\.{field}: ") as caught:
        dataclasses.replace(identity, **{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [("tp_size", 0), ("pp_size", "1"), ("first_layer", -1), ("tp_size", True)])
def test_wrong_placement_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"identity\.placement\.{field}: "):
        Placement(**{field: value})


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_size", "block_size"])
@pytest.mark.parametrize("value", [0, -1, 1.0, "1", None, True])
def test_wrong_layout_is_refused_by_name(layout: KVLayout, field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"layout\.{field}: .*at least 1"):
        dataclasses.replace(layout, **{field: value})


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, "bfloat16", None])
def test_dtype_that_is_none_of_kv_is_refused(layout: KVLayout, dtype: Any) -> None:
    with pytest.raises(ConfigError, match=r"layout\.dtype: .*bfloat16"):
        dataclasses.replace(layout, dtype=dtype)


def test_block_shape_and_size(layout: KVLayout) -> None:
    assert layout.block_shape == (2, 2, 2, 4, 8)
    assert layout.block_nbytes == torch.empty(layout.block_shape, dtype=layout.dtype).nbytes
    assert layout.layer_nbytes * layout.num_layers == layout.block_nbytes


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_names_round_trip(name: str) -> None:
    dtype = parse_dtype(name)
    assert dtype_name(dtype.of_torch) == name == dtype.name
    assert parse_dtype(f"torch.{name}") == dtype
    assert torch.empty(1, dtype=dtype.of_torch).nbytes == dtype.itemsize


def test_a_layout_takes_a_dtype_without_torch(layout: KVLayout) -> None:
    same = dataclasses.replace(layout, dtype=parse_dtype(dtype_name(layout.dtype)))
    assert same == layout and hash(same) == hash(layout) and same.dtype is layout.dtype
    assert repr(same) == repr(layout) and str(layout.dtype) in repr(layout)
