"""The shape of one KV block. Knows sizes and types, never keys or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from kvstore.errors import ConfigError

# name -> (torch dtype, safetensors dtype). The names are torch's own.
DTYPES: Final[dict[str, tuple[torch.dtype, str]]] = {
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
    "float32": (torch.float32, "F32"),
    "float64": (torch.float64, "F64"),
    "float8_e4m3fn": (torch.float8_e4m3fn, "F8_E4M3"),
    "float8_e5m2": (torch.float8_e5m2, "F8_E5M2"),
    "int8": (torch.int8, "I8"),
    "uint8": (torch.uint8, "U8"),
}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a KV dtype, e.g. ``"bfloat16"``.

    Raises:
        ConfigError: a dtype KV is not stored in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"layout.dtype: {name!r} is not supported; allowed: {', '.join(DTYPES)}")
    return name


def parse_dtype(name: str) -> torch.dtype:
    """The dtype of a name; raises ConfigError for a name that is not in `DTYPES`."""
    known = DTYPES.get(name.removeprefix("torch."))
    if known is None:
        raise ConfigError(f"layout.dtype: {name!r} is not a KV dtype; allowed: {', '.join(DTYPES)}")
    return known[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """Shape of the KV of one block of ``block_size`` tokens, for one KV cache group.

    ``num_kv_heads`` and ``num_layers`` are those that this process stores.

    Args:
        kv_dim: 2 for K and V; 1 where a token has one latent vector (MLA).
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    block_size: int
    dtype: torch.dtype
    kv_dim: int = 2

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"layout.{name}: {value!r} is not allowed; give a whole number of at least 1")
        if self.kv_dim not in (1, 2):
            raise ConfigError(f"layout.kv_dim: {self.kv_dim!r} is not allowed; give 2 (K and V) or 1 (latent)")
        if not isinstance(self.dtype, torch.dtype):
            raise ConfigError(f"layout.dtype: {self.dtype!r} is not a torch dtype; allowed: {', '.join(DTYPES)}")
        dtype_name(self.dtype)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """``(num_layers, kv_dim, num_kv_heads, block_size, head_size)``; index 0 of dim 1 is K, 1 is V."""
        return (self.num_layers, self.kv_dim, self.num_kv_heads, self.block_size, self.head_size)

    @property
    def block_nbytes(self) -> int:
        """Payload bytes of one block."""
        return self.num_layers * self.layer_nbytes

    @property
    def layer_nbytes(self) -> int:
        """Payload bytes of one layer of one block."""
        return self.kv_dim * self.num_kv_heads * self.block_size * self.head_size * self.dtype.itemsize
