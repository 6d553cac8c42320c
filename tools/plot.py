"""`kvstore plot`: norms of K and V as a picture: layers over heads, and layers over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kvstore.errors import ConfigError, NotStoredError
from tools.choice import Choice
from tools.figures import label, new_figure
from tools.held import held
from tools.output import progress
from tools.places import find_catalogs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TOKENS: Final = 1 << 20
_MOST_COLUMNS: Final = 640  # pixels are hardly more
_BAD: Final = "red"  # is not in the scale


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms of vectors: by layer, by K and V, over heads or over tokens.

    Attributes:
        of_heads: (num_layers, kv_dim, num_kv_heads), over all tokens: root of the mean square of vectors' norms.
        of_tokens: (num_layers, kv_dim, num_tokens), over all heads. NaN or infinite where a number of it is.
        num_bad: vectors with such a number in them.
    """

    title: str
    num_blocks: int
    of_heads: torch.Tensor
    of_tokens: torch.Tensor
    num_bad: int

    def to_dict(self) -> dict[str, Any]:
        return {"blocks": self.num_blocks, "tokens": self.of_tokens.shape[-1], "bad_vectors": self.num_bad,
                "norm_by_head": self.of_heads.tolist()}  # fmt: skip

    def said(self) -> str:
        """That not all is finite; nothing where it is."""
        return f"{self.num_bad} vectors have NaN or infinite numbers: red" if self.num_bad else ""


def norms(path: Path, choice: Choice | None, integrity_key_file: str | None) -> Norms:
    """Read blocks of a store, in the order of the choice, or all of a file.

    Raises:
        ConfigError, NotStoredError: see `tools.held`; a block is damaged, or K and V cannot be told apart.
    """
    if choice is None and not path.is_file():
        find_catalogs(path, integrity_key_file)  # what is wrong with the path is said first
        raise ConfigError("give one of --key, --keys, --tokens, --text and --request, or a dumped file as PATH")
    with held(path, choice, integrity_key_file) as blocks:
        if not blocks:
            raise NotStoredError(f"{path} holds no block")
        where = path.name if path.is_file() else f"from block {str(blocks[0].key)[:12]}"
        return _norms(f"{blocks[0].model}, {where}", [block.read for block in blocks])


def _norms(title: str, blocks: Sequence[Callable[[], torch.Tensor | None]]) -> Norms:
    squares_of_heads: torch.Tensor | None = None
    of_tokens: list[torch.Tensor] = []
    num_bad = 0
    with progress("reading", len(blocks)) as advance:
        for read in blocks:
            kv = read()
            if kv is None:
                raise NotStoredError("a block is damaged, or what K and V are in it cannot be told")
            squares_LPHT = kv.to(torch.float64).square().sum(-1)  # of all that is finite, finite
            if not of_tokens and squares_LPHT.shape[-1] * len(blocks) > _MOST_TOKENS:
                raise ConfigError(
                    f"{len(blocks)} blocks are too many for a picture; give at most {_MOST_TOKENS} tokens"
                )
            sums = squares_LPHT.sum(-1)
            squares_of_heads = sums if squares_of_heads is None else squares_of_heads + sums
            num_bad += int((~squares_LPHT.isfinite()).sum())
            of_tokens.append(squares_LPHT.mean(2).sqrt())
            advance(1)
    assert squares_of_heads is not None
    tokens = torch.cat(of_tokens, dim=-1)
    return Norms(title, len(blocks), (squares_of_heads / tokens.shape[-1]).sqrt(), tokens, num_bad)


def draw(found: Norms) -> Figure:
    """The picture; see `tools.figures` for writing it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = ("K", "V") if found.of_heads.shape[1] == 2 else ("latent",)
    figure = new_figure(12, 3.8 * len(names))
    figure.suptitle(label(f"{found.title}: {found.num_blocks} blocks, {found.of_tokens.shape[-1]} tokens"))
    if found.num_bad:
        figure.supxlabel(found.said(), color=_BAD, fontsize=11)
    grid = figure.add_gridspec(len(names), 2, width_ratios=(1, 2))
    for row, name in enumerate(names):
        _map(figure, grid[row, 0], found.of_heads[:, row], f"{name}: norm by head", "KV head", whole=True)
        _map(figure, grid[row, 1], _thinned(found.of_tokens[:, row]), f"{name}: norm by token", "token",
             extent=found.of_tokens.shape[-1])  # fmt: skip
    return figure


def _map(
    figure: Any,
    place: Any,
    values: torch.Tensor,
    title: str,
    across: str,
    *,
    extent: int | None = None,
    whole: bool = False,
) -> None:
    axes = figure.add_subplot(place)
    num_layers, width = values.shape[0], values.shape[1] if extent is None else extent
    is_bad = ~values.isfinite().numpy()
    shown: Any = np.ma.MaskedArray(values.numpy(), mask=is_bad)  # type: ignore[no-untyped-call]
    low, high = (shown.min(), shown.max()) if shown.count() else (0.0, 1.0)
    image = axes.imshow(shown, aspect="auto", cmap=_colors(), interpolation="nearest", vmin=low, vmax=high,
                        origin="lower", extent=(-0.5, width - 0.5, -0.5, num_layers - 0.5))  # fmt: skip
    axes.set(title=title, xlabel=across, ylabel="layer")
    for axis, n in ((axes.yaxis, num_layers), *(((axes.xaxis, width),) if whole else ())):
        axis.get_major_locator().set_params(integer=True)
        if n <= 8:
            axis.set_ticks(range(n))
    figure.colorbar(image, ax=axes, label="norm of a vector")


def _colors() -> Any:
    import matplotlib

    return matplotlib.colormaps["viridis"].with_extremes(bad=_BAD)


def _thinned(values: torch.Tensor) -> torch.Tensor:
    """At most as many columns as can be seen: the greatest of neighbours, so that no peak is lost."""
    n = values.shape[-1]
    step = -(-n // _MOST_COLUMNS)
    if step == 1:
        return values
    padded = torch.nn.functional.pad(values, (0, -n % step), value=0.0)
    thinned: torch.Tensor = padded.view(values.shape[0], -1, step).amax(-1)
    return thinned
