"""Whatever byte of a slot changes is noticed; nothing a parser is fed makes it raise."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import KVIdentity, KVLayout
from kvstore.errors import ConfigError
from kvstore.keys import KEY_NBYTES
from kvstore.slot import ALIGNMENT, FOOTER, KeyArray, Rows, SlotCodec, SlotFormat, read_integrity_key

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_size=8, block_size=4, dtype=torch.bfloat16)
IDENTITY = KVIdentity(model="m", revision="r", layout=LAYOUT)
NAMESPACE = IDENTITY.namespace()
SECRET = b"0123456789abcdef"


def sealed(
    codec: SlotCodec, num_slots: int = 3, seed: int = 0, namespace: bytes = NAMESPACE
) -> tuple[Rows, KeyArray, np.ndarray]:
    """Rows of random payload, their keys and generations; every slot of them is sealed."""
    rng, fmt = np.random.default_rng(seed), codec.fmt
    rows = np.zeros((num_slots, fmt.slot_nbytes), dtype=np.uint8)
    rows[:, : fmt.payload_nbytes] = rng.integers(0, 256, (num_slots, fmt.payload_nbytes), dtype=np.uint8)
    keys = rng.integers(0, 256, (num_slots, fmt.blocks_per_chunk, KEY_NBYTES), dtype=np.uint8)
    generations = np.arange(1, num_slots + 1, dtype=np.uint64)
    codec.seal(rows, np.arange(num_slots), keys, namespace, generations)
    return rows, keys, generations


def is_valid(codec: SlotCodec, rows: Rows, namespace: bytes = NAMESPACE) -> list[bool]:
    return codec.verify(rows, np.arange(len(rows)), namespace).valid.tolist()


@pytest.fixture(params=[1, 4], ids=["1 block", "4 blocks"])
def fmt(request: pytest.FixtureRequest) -> SlotFormat:
    return SlotFormat.of(IDENTITY, request.param)


@pytest.fixture(params=[None, SECRET], ids=["xxh3", "keyed"])
def codec(request: pytest.FixtureRequest, fmt: SlotFormat) -> SlotCodec:
    return SlotCodec(fmt, request.param)


@given(payload=st.integers(1, 1 << 24), blocks=st.integers(1, 64))
def test_parts_fill_the_slot(payload: int, blocks: int) -> None:
    fmt = SlotFormat(payload, blocks, bytes(16))
    assert fmt.slot_nbytes % ALIGNMENT == 0
    assert fmt.payload_nbytes <= fmt.body_nbytes == fmt.slot_nbytes - fmt.trailer_nbytes
    assert fmt.slot_nbytes - ALIGNMENT < fmt.payload_nbytes + fmt.trailer_nbytes


def test_what_was_sealed_verifies_and_parses(codec: SlotCodec) -> None:
    rows, keys, generations = sealed(codec)
    found = codec.verify(rows, np.arange(3), NAMESPACE)
    assert found.valid.all()
    assert np.array_equal(found.keys, keys)
    assert np.array_equal(found.generations, generations)
    assert [n.tobytes() for n in found.namespaces] == [NAMESPACE] * 3
    parsed = codec.parse(rows[:, codec.fmt.body_nbytes :])
    assert parsed.valid.all()
    assert np.array_equal(parsed.keys, keys)


def test_sealing_leaves_payload_padding_and_other_slots_alone(codec: SlotCodec) -> None:
    rng = np.random.default_rng(1)
    rows = rng.integers(0, 256, (4, codec.fmt.slot_nbytes), dtype=np.uint8)
    before = rows.copy()
    keys = np.zeros((2, codec.fmt.blocks_per_chunk, KEY_NBYTES), dtype=np.uint8)
    codec.seal(rows, np.array([2, 0]), keys, NAMESPACE, np.array([1, 2], dtype=np.uint64))
    body = codec.fmt.body_nbytes
    assert np.array_equal(rows[:, :body], before[:, :body])
    assert np.array_equal(rows[[1, 3]], before[[1, 3]])
    assert is_valid(codec, rows) == [True, False, True, False]


def test_slots_may_be_in_any_order(codec: SlotCodec) -> None:
    rows, keys, _ = sealed(codec)
    found = codec.verify(rows, np.array([2, 0]), NAMESPACE)
    assert found.valid.all()
    assert np.array_equal(found.keys, keys[[2, 0]])


@pytest.mark.parametrize("secret", [None, SECRET], ids=["xxh3", "keyed"])
def test_any_flipped_byte_is_found(secret: bytes | None) -> None:
    codec = SlotCodec(SlotFormat.of(IDENTITY, 2), secret)
    rows, _, _ = sealed(codec, 1)
    for at in range(codec.fmt.slot_nbytes):
        rows[0, at] ^= 1 << (at % 8)
        assert is_valid(codec, rows) == [False], f"byte {at}"
        rows[0, at] ^= 1 << (at % 8)
    assert is_valid(codec, rows) == [True]


@given(data=st.data(), length=st.integers(1, 4096), fill=st.integers(0, 255))
def test_any_overwritten_range_is_found(data: st.DataObject, length: int, fill: int) -> None:
    codec = SlotCodec(SlotFormat.of(IDENTITY, 1))
    rows, _, _ = sealed(codec, 1)
    before = rows.copy()
    start = data.draw(st.integers(0, codec.fmt.slot_nbytes - 1))
    rows[0, start : start + length] = fill
    assert is_valid(codec, rows) == [bool(np.array_equal(rows, before))]


def test_truncated_and_shifted_slots_are_found(codec: SlotCodec) -> None:
    rows, _, _ = sealed(codec)
    torn = rows.copy()
    torn[:, torn.shape[1] // 2 :] = 0
    assert is_valid(codec, torn) == [False] * 3
    assert is_valid(codec, np.roll(rows, ALIGNMENT // 2, axis=1)) == [False] * 3


def test_body_of_one_slot_with_the_trailer_of_another_is_found(codec: SlotCodec) -> None:
    rows, _, _ = sealed(codec)
    mixed = rows.copy()
    mixed[0, codec.fmt.body_nbytes :] = rows[1, codec.fmt.body_nbytes :]
    assert is_valid(codec, mixed) == [False, True, True]


def test_another_namespace_is_no_hit(codec: SlotCodec) -> None:
    rows, _, _ = sealed(codec, namespace=IDENTITY.namespace(b"e" * 16))
    assert is_valid(codec, rows) == [False] * 3
    assert is_valid(codec, rows, IDENTITY.namespace(b"e" * 16)) == [True] * 3


def test_another_placement_is_no_hit() -> None:
    """Heads and layers swapped: the same number of bytes, laid out differently."""
    layout = dataclasses.replace(LAYOUT, num_layers=2, num_kv_heads=3)
    other = SlotFormat.of(dataclasses.replace(IDENTITY, layout=layout), 1)
    mine = SlotFormat.of(IDENTITY, 1)
    assert other.slot_nbytes == mine.slot_nbytes
    rows, _, _ = sealed(SlotCodec(mine))
    assert is_valid(SlotCodec(other), rows) == [False] * 3


def test_another_format_version_is_no_hit(codec: SlotCodec, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _, _ = sealed(codec)
    monkeypatch.setattr("kvstore.slot.FORMAT_VERSION", 2)
    assert is_valid(codec.for_format(codec.fmt), rows) == [False] * 3


def test_who_lacks_the_key_cannot_sign(fmt: SlotFormat) -> None:
    keyed = SlotCodec(fmt, SECRET)
    for forger in (SlotCodec(fmt, b"x" * 16), SlotCodec(fmt)):
        rows, _, _ = sealed(forger)
        assert is_valid(keyed, rows) == [False] * 3
        assert not keyed.parse(rows[:, fmt.body_nbytes :]).valid.any()
    rows, _, _ = sealed(keyed)
    assert is_valid(SlotCodec(fmt), rows) == [False] * 3


def test_who_lacks_the_key_cannot_move_a_signed_slot_to_another_key(fmt: SlotFormat) -> None:
    codec = SlotCodec(fmt, SECRET)
    rows, _, _ = sealed(codec)
    rows[0, fmt.body_nbytes : fmt.body_nbytes + KEY_NBYTES] = rows[1, fmt.body_nbytes : fmt.body_nbytes + KEY_NBYTES]
    assert is_valid(codec, rows) == [False, True, True]


@given(data=st.binary(max_size=1024), magic=st.booleans())
def test_any_bytes_can_be_parsed(data: bytes, magic: bool) -> None:
    codec = SlotCodec(SlotFormat.of(IDENTITY, 2))
    trailer = np.zeros((1, codec.fmt.trailer_nbytes), dtype=np.uint8)
    trailer[0, : len(data)] = np.frombuffer(data[: codec.fmt.trailer_nbytes], dtype=np.uint8)
    if magic:
        trailer[0, -FOOTER.itemsize :][:8] = np.frombuffer(b"KVSLOT\r\n", dtype=np.uint8)
    assert not codec.parse(trailer).valid.any()


def test_empty_slots_are_invalid(codec: SlotCodec) -> None:
    for fill in (0, 255):
        assert is_valid(codec, np.full((2, codec.fmt.slot_nbytes), fill, dtype=np.uint8)) == [False] * 2
    assert is_valid(codec, np.empty((0, codec.fmt.slot_nbytes), dtype=np.uint8)) == []


def test_namespace_of_another_length_is_refused(codec: SlotCodec) -> None:
    with pytest.raises(ValueError, match="namespace has 3 bytes"):
        sealed(codec, namespace=b"abc")


@pytest.mark.parametrize("nbytes", [0, 1, 15, 65])
def test_integrity_key_of_a_wrong_length_is_refused(fmt: SlotFormat, nbytes: int) -> None:
    with pytest.raises(ConfigError, match=f"{nbytes} bytes; give 16 to 64"):
        SlotCodec(fmt, bytes(nbytes))


def test_integrity_key_file(tmp_path: Path, fmt: SlotFormat) -> None:
    path = tmp_path / "key"
    path.write_bytes(b"  " + SECRET + b"\n")
    assert read_integrity_key(str(path)) == SECRET
    assert read_integrity_key(None) is None
    with pytest.raises(ConfigError, match="integrity_key_file: .*cannot be read"):
        read_integrity_key(str(tmp_path / "none"))
    path.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="5 bytes; give 16 to 64"):
        SlotCodec(fmt, read_integrity_key(str(path)))
