"""What other systems' stores are to commands: entries with names, each with parts by layer.

A sibling of `kvstore.tiers.catalog.Catalog`: nothing here has our keys, footers or checksums, so
nothing can be verified. Whatever a directory says is checked before memory is allocated by it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.direct_io import preadv_full
from kvstore.errors import DamagedFileError
from kvstore.layout import Dtype

if TYPE_CHECKING:
    import torch

PIECE_NBYTES: Final = 4 << 20
MAX_ENTRIES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class ForeignEntry:
    """What the other system stores and finds as one: the KV of a prompt, or of some blocks.

    Attributes:
        name: what it is found by, in hex.
    """

    name: str
    place: Path
    nbytes: int
    time_ns: int


@dataclass(frozen=True, slots=True)
class ForeignPart:
    """One tensor of an entry.

    Attributes:
        layer: its number; None where the entry cannot be told apart by layer.
        layer_name: what the other system calls the layer.
        part: "key", "value", "kv" (both, in one row), "latent" or "pages" (as it lies).
        shape: of tokens, heads and elements, where these are known.
        offset: of its bytes in the file.
    """

    layer: int | None
    layer_name: str
    part: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def name(self) -> str:
        """As in a dump."""
        return self.part if self.layer is None else f"layers.{self.layer}.{self.part}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ForeignStore(ABC):
    """One directory of another system. For one thread.

    Attributes:
        problems: what is wrong with it; complete once it has been read.
    """

    kind: str

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []

    @abstractmethod
    def description(self) -> dict[str, Any]:
        """What the directory says of itself: JSON."""

    @abstractmethod
    def entries(self) -> Iterator[ForeignEntry]:
        """Everything that is stored, payload unread; at most `MAX_ENTRIES`."""

    @abstractmethod
    def parts(self, entry: ForeignEntry) -> list[ForeignPart]:
        """An entry's tensors, payload unread.

        Raises:
            DamagedFileError: it is not what it should be.
        """

    def entry_of(self, tokens: Sequence[int]) -> ForeignEntry | None:
        """The entry of most of a prompt's leading tokens, where that can be told; else None."""
        return None

    def model(self) -> str | None:
        """Whose KV it is, where the directory says so."""
        return None

    def problem(self, text: str) -> None:
        """Note what is wrong, once."""
        if text not in self.problems and len(self.problems) < 100:
            self.problems.append(text)


def pieces_of(fd: int, part: ForeignPart) -> Iterator[torch.Tensor]:
    """A part's bytes from an open file, some MiB at a time, in whole rows of its last dimensions.

    Raises:
        DamagedFileError: the file is shorter than that.
    """
    import torch

    row_nbytes = part.nbytes // part.shape[0] if part.shape[0] else 0
    rows = max(1, PIECE_NBYTES // max(1, row_nbytes))
    for first in range(0, part.shape[0], rows):
        n = min(rows, part.shape[0] - first)
        data = torch.empty(n * row_nbytes, dtype=torch.uint8)
        if preadv_full(fd, [data.numpy()], part.offset + first * row_nbytes) != len(data):
            raise DamagedFileError(f"{part.file}: cut short")
        yield data.view(part.dtype.of_torch).reshape(n, *part.shape[1:])
