"""Headers of safetensors files that anyone may have written: checked before anything is allocated by them.

    [0, 8)          length of the header, little-endian
    [8, 8 + n)      JSON: name -> {dtype, shape, data_offsets}; ``__metadata__`` -> texts
    [8 + n, end)    the tensors' bytes, without holes, none overlapping

Format: https://huggingface.co/docs/safetensors. Its library reads what has passed here too, and
what it refuses is refused.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from typing import Any, Final

import safetensors

from kvstore.errors import DamagedFileError
from kvstore.layout import DTYPES, Dtype
from kvstore.strict_json import parse_json

MAX_HEADER_NBYTES: Final = 1 << 20
_MAX_TENSORS: Final = 1 << 14
_MAX_DIMENSIONS: Final = 8
_MAX_NAME: Final = 256
_PREFIX_NBYTES: Final = 8
_TYPES: Final[dict[str, Dtype]] = {
    dtype.safetensors: dtype
    for dtype in (*DTYPES.values(), Dtype("int16", "I16", 2), Dtype("int32", "I32", 4), Dtype("int64", "I64", 8))
}


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """A tensor and where in the file its bytes lie."""

    dtype: Dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says it holds; it has all of these bytes."""

    tensors: dict[str, TensorPlace]
    metadata: dict[str, str]


def read_header(fd: int) -> Header:
    """Read and check the header of an open file.

    Raises:
        DamagedFileError: says what is wrong with it.
        OSError: it cannot be read.
    """
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedFileError("not a regular file")
    nbytes = int.from_bytes(os.pread(fd, _PREFIX_NBYTES, 0), "little")
    if status.st_size < _PREFIX_NBYTES or nbytes > min(MAX_HEADER_NBYTES, status.st_size - _PREFIX_NBYTES):
        raise DamagedFileError(
            f"not a safetensors file: a header of {nbytes} bytes in a file of {status.st_size} "
            f"(at most {MAX_HEADER_NBYTES} are read)"
        )
    header = parse_header(os.pread(fd, nbytes, _PREFIX_NBYTES), status.st_size - _PREFIX_NBYTES - nbytes)
    try:
        with safetensors.safe_open(f"/proc/self/fd/{fd}", framework="numpy"):
            pass
    except (OSError, safetensors.SafetensorError) as e:
        raise DamagedFileError(f"not a safetensors file: {e}") from e
    return header


def parse_header(text: bytes, data_nbytes: int) -> Header:
    """Check a header's JSON against the bytes that follow it.

    Raises:
        DamagedFileError: says what is wrong with it.
    """
    try:
        found = parse_json(text)
    except ValueError as e:
        raise DamagedFileError(f"header: {type(e).__name__}: {str(e)[:200]}") from e
    if not isinstance(found, dict) or len(found) > _MAX_TENSORS:
        raise DamagedFileError(f"header: not a mapping of at most {_MAX_TENSORS} tensors")
    metadata = found.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DamagedFileError("header: __metadata__ is not a mapping of texts")
    start = _PREFIX_NBYTES + len(text)
    tensors = {name: _place(name, value, start) for name, value in found.items()}
    end = start
    for name, place in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if place.offset != end:
            raise DamagedFileError(f"header: {name!r} begins at {place.offset - start} and not at {end - start}")
        end += place.nbytes
    if end - start != data_nbytes:
        raise DamagedFileError(f"header: tensors of {end - start} bytes, where {data_nbytes} follow")
    return Header(tensors, metadata)


def _place(name: str, value: Any, start: int) -> TensorPlace:
    if not 0 < len(name) <= _MAX_NAME or not name.isprintable():
        raise DamagedFileError(f"header: name {name[:_MAX_NAME]!r}")
    fields = value if isinstance(value, dict) else {}
    kind = str(fields.get("dtype"))[:40]
    dtype, shape, offsets = _TYPES.get(kind), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if dtype is None:
        raise DamagedFileError(f"header: dtype {kind!r} of {name!r}; known: {', '.join(_TYPES)}")
    if shape is None or offsets is None or len(offsets) != 2:
        raise DamagedFileError(f"header: shape or data_offsets of {name!r}")
    place = TensorPlace(dtype, shape, start + offsets[0])
    if place.nbytes != offsets[1] - offsets[0]:
        raise DamagedFileError(f"header: {name!r} of {place.nbytes} bytes lies in {offsets[1] - offsets[0]}")
    return place


def _sizes(value: Any) -> tuple[int, ...] | None:
    """Of what is a short list of whole numbers."""
    if not isinstance(value, list) or len(value) > _MAX_DIMENSIONS:
        return None
    return tuple(value) if all(type(n) is int and 0 <= n < 1 << 48 for n in value) else None
