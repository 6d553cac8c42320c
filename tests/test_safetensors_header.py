"""Headers that lie are refused before anything is allocated; those that the library writes are read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from kvstore.errors import DamagedFileError
from kvstore.safetensors_header import MAX_HEADER_NBYTES, Header, parse_header, read_header


def tensor(start: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


def read(path: Path) -> Header:
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_header(fd)
    finally:
        os.close(fd)


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


BAD = {
    "no mapping": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "deep mapping": b'{"a":' * 50_000,
    "NaN": b'{"a": NaN}',
    "twice": b'{"a": {"dtype":"U8","shape":[8],"data_offsets":[0,8]}, "a": 1}',
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    **{
        name: json.dumps(fields).encode()
        for name, fields in {
            "negative": {"a": tensor(-8, 0)},
            "backwards": {"a": tensor(8, 0, shape=[8])},
            "behind the end": {"a": tensor(0, 9)},
            "hole": {"a": tensor(0, 3), "b": tensor(4, 8)},
            "overlap": {"a": tensor(0, 5), "b": tensor(4, 8)},
            "same place": {"a": tensor(0, 8), "b": tensor(0, 8)},
            "trailing": {"a": tensor(0, 4)},
            "nothing": {},
            "bomb": {"a": tensor(0, 8, shape=[1 << 40, 1 << 40, 1 << 40])},
            "huge and empty": {"a": tensor(0, 8), "b": tensor(8, 8, shape=[1 << 60, 0])},
            "dimensions": {"a": tensor(0, 8, shape=[1] * 1000 + [8])},
            "dtype": {"a": tensor(0, 8, dtype="F3")},
            "no dtype": {"a": {"shape": [8], "data_offsets": [0, 8]}},
            "true": {"a": tensor(0, 8, shape=[8, True])},
            "float": {"a": tensor(0, 8, shape=[8.0])},
            "three offsets": {"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 4, 8]}},
            "control name": {"\x1b[2J": tensor(0, 8)},
            "half a character": {"\ud800": tensor(0, 8)},
            "no name": {"": tensor(0, 8)},
            "metadata": {"__metadata__": {"a": 1}, "a": tensor(0, 8)},
            "metadata list": {"__metadata__": [], "a": tensor(0, 8)},
        }.items()
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(file_of(BAD[name], bytes(8)))
    with pytest.raises(DamagedFileError, match=r"header: "):
        read(tmp_path / "file")


@pytest.mark.parametrize(
    "data", [b"", b"1234567", (1 << 63).to_bytes(8, "little"), (MAX_HEADER_NBYTES + 1).to_bytes(8, "little")]
)
def test_a_length_that_lies_is_refused(data: bytes, tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as f:
        f.write(data)
        if len(data) == 8:
            f.truncate(1 << 40)
    with pytest.raises(DamagedFileError, match="not a safetensors file"):
        read(tmp_path / "file")


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "bf": torch.randn(3, 5).to(torch.bfloat16),
        "f8": torch.randn(7).to(torch.float8_e5m2),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3, dtype=torch.int64),
    }
    (tmp_path / "file").write_bytes(save(tensors, metadata={"who": "me"}))
    header = read(tmp_path / "file")
    assert header.metadata == {"who": "me"}
    assert {n: (p.dtype.of_torch, p.shape) for n, p in header.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()
    }
    data = (tmp_path / "file").read_bytes()
    for name, place in header.tensors.items():
        raw = torch.frombuffer(bytearray(data[place.offset : place.offset + place.nbytes] or b"\0"), dtype=torch.uint8)
        assert torch.equal(raw[: place.nbytes], tensors[name].reshape(-1).view(torch.uint8))


@given(st.binary(max_size=200), st.integers(0, 64))
def test_any_bytes_are_read_or_refused(text: bytes, nbytes: int) -> None:
    try:
        header = parse_header(text, nbytes)
    except DamagedFileError as e:
        assert str(e)
    else:
        assert sum(place.nbytes for place in header.tensors.values()) == nbytes
