"""The shape of one KV block. Knows sizes and types, never keys or files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvstore.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype as it is written in files; torch, which takes seconds to import, is not needed to know it.

    Attributes:
        name: torch's own.
        safetensors: what safetensors calls it.
    """

    name: str
    safetensors: str
    itemsize: int

    @property
    def of_torch(self) -> torch.dtype:
        import torch

        found: torch.dtype = getattr(torch, self.name)
        return found


DTYPES: Final[dict[str, Dtype]] = {
    dtype.name: dtype
    for dtype in (
        Dtype("bfloat16", "BF16", 2),
        Dtype("float16", "F16", 2),
        Dtype("float32", "F32", 4),
        Dtype("float64", "F64", 8),
        Dtype("float8_e4m3fn", "F8_E4M3", 1),
        Dtype("float8_e5m2", "F8_E5M2", 1),
        Dtype("int8", "I8", 1),
        Dtype("uint8", "U8", 1),
    )
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


def parse_dtype(name: str) -> Dtype:
    """The dtype of a name; raises ConfigError for a name that is not in `DTYPES`."""
    known = DTYPES.get(name.removeprefix("torch."))
    if known is None:
        raise ConfigError(f"layout.dtype: {name!r} is not a KV dtype; allowed: {', '.join(DTYPES)}")
    return known


class DtypeField:
    """`KVLayout.dtype`: takes torch's dtypes and ours, and gives torch's to who asks for it."""

    def __get__(self, layout: KVLayout | None, owner: type[KVLayout]) -> torch.dtype:
        if layout is None:
            raise AttributeError("dtype")  # there is no default
        return layout.stored_dtype.of_torch

    def __set__(self, layout: KVLayout, value: torch.dtype | Dtype) -> None:
        if not isinstance(value, Dtype):
            import torch

            if not isinstance(value, torch.dtype):
                raise ConfigError(f"layout.dtype: {value!r} is not a torch dtype; allowed: {', '.join(DTYPES)}")
            value = DTYPES[dtype_name(value)]
        layout.__dict__["dtype"] = value


@dataclass(frozen=True, kw_only=True)
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
    dtype: DtypeField = DtypeField()
    kv_dim: int = 2

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_size", "block_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"layout.{name}: {value!r} is not allowed; give a whole number of at least 1")
        if self.kv_dim not in (1, 2):
            raise ConfigError(f"layout.kv_dim: {self.kv_dim!r} is not allowed; give 2 (K and V) or 1 (latent)")

    @property
    def stored_dtype(self) -> Dtype:
        """Of ``dtype``, without torch."""
        stored: Dtype = self.__dict__["dtype"]
        return stored

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
        return self.kv_dim * self.num_kv_heads * self.block_size * self.head_size * self.stored_dtype.itemsize
