"""Frames: a header of one size, then the bytes of what it describes."""

from __future__ import annotations

import enum
import math
import struct
from dataclasses import dataclass
from typing import Final

import torch

from connectors.pipe import MAX_DIMS, PipeProtocolError

HEADER: Final = struct.Struct(f"<4sBBBxQ{MAX_DIMS}Q")  # magic, kind, dtype, dimensions, bytes, sizes
MAGIC: Final = b"KVP1"
DTYPES: Final = (  # a dtype's code is its place in here, from 1: only ever append
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2,
)
_CODES: Final = {dtype: code for code, dtype in enumerate(DTYPES, 1)}
_MAX_EXTENT: Final = 1 << 62  # of strides too, where a tensor is empty


class Kind(enum.IntEnum):
    TENSOR = 1
    NONE = 2
    SLOTS = 3
    ACK = 4  # of slots: the peer has them
    GO = 5  # of `connectors.nixl`


@dataclass(frozen=True, slots=True)
class Frame:
    """What follows a header: bytes of a tensor; slots are a uint8 tensor of shape (n, slot_nbytes)."""

    kind: Kind
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()

    @classmethod
    def of(cls, tensor: torch.Tensor | None, max_nbytes: int) -> Frame:
        """Raises PipeProtocolError where that cannot be sent."""
        if tensor is None:
            return cls(Kind.NONE)
        if tensor.layout is not torch.strided or tensor.dtype not in _CODES:
            raise PipeProtocolError(f"a tensor of {tensor.dtype} and {tensor.layout} cannot be sent")
        frame = cls(Kind.TENSOR, tensor.dtype, tuple(tensor.shape))
        frame.check(max_nbytes)
        return frame

    @classmethod
    def of_slots(cls, num_slots: int, slot_nbytes: int) -> Frame:
        return cls(Kind.SLOTS, torch.uint8, (num_slots, slot_nbytes))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize if self.dtype is not None else 0

    def check(self, max_nbytes: int) -> None:
        """Raises PipeProtocolError where it is too large for a pipe, or for a tensor."""
        if len(self.shape) > MAX_DIMS:
            raise PipeProtocolError(f"a tensor has {len(self.shape)} dimensions; at most {MAX_DIMS} are taken")
        if self.kind is Kind.TENSOR and self.nbytes > max_nbytes:
            raise PipeProtocolError(f"a tensor has {self.nbytes} bytes; at most {max_nbytes} are taken")
        if math.prod(max(size, 1) for size in self.shape) > _MAX_EXTENT // 16:
            raise PipeProtocolError(f"no tensor has the shape {self.shape}")

    def pack(self) -> bytes:
        sizes = (*self.shape, *[0] * (MAX_DIMS - len(self.shape)))
        code = 0 if self.dtype is None else _CODES[self.dtype]
        return HEADER.pack(MAGIC, self.kind, code, len(self.shape), self.nbytes, *sizes)

    @classmethod
    def parse(cls, header: bytes | memoryview, max_nbytes: int) -> Frame:
        """Of any bytes; raises PipeProtocolError where `pack` gives no such header, or too much follows it."""
        if len(header) != HEADER.size:
            raise PipeProtocolError(f"a header has {HEADER.size} bytes, not {len(header)}")
        _, kind, code, ndim, _, *sizes = HEADER.unpack(header)
        if kind not in Kind._value2member_map_ or code > len(DTYPES) or ndim > MAX_DIMS:
            raise PipeProtocolError("that is no frame")
        dtype = DTYPES[code - 1] if code else None
        frame = cls(Kind(kind), dtype, tuple(sizes[:ndim]))
        has_payload = frame.kind in (Kind.TENSOR, Kind.SLOTS)
        if has_payload != (dtype is not None) or (ndim and not has_payload):
            raise PipeProtocolError("that is no frame")
        frame.check(max_nbytes)
        if frame.pack() != header:
            raise PipeProtocolError("that is no frame")
        return frame

    def expect(self, kind: Kind, shape: tuple[int, ...] = ()) -> None:
        """Raises PipeProtocolError unless it is of this kind and shape."""
        if self.kind is not kind or self.shape != shape:
            raise PipeProtocolError(f"{self.kind.name} of shape {self.shape} came, not {kind.name} of {shape}")

    def place(self, out: torch.Tensor | None, device: torch.device | None = None) -> torch.Tensor:
        """Contiguous memory for this tensor: ``out`` where given, which must fit, else on a device."""
        if out is None:
            return torch.empty(self.shape, dtype=self.dtype, device=device)
        if out.dtype != self.dtype or tuple(out.shape) != self.shape or not out.is_contiguous():
            raise PipeProtocolError(
                f"a tensor of {self.dtype} and shape {self.shape} came, which does not fit where it goes: "
                f"{out.dtype}, shape {tuple(out.shape)}, {'' if out.is_contiguous() else 'not '}contiguous"
            )
        return out.detach()


def to_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor on its device, uint8 and flat; a view where it is contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8)
