"""`kvstore plot`: norms of K and V as a picture: layers over heads, and layers over tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from kvstore.errors import ConfigError, NotStoredError
from tools.choice import Choice
from tools.figures import new_figure
from tools.held import held
from tools.output import printable, progress
from tools.places import find_catalogs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_TOKENS: Final = 1 << 20
_MOST_COLUMNS: Final = 2048


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms of vectors: by layer, by K and V, over heads or over tokens.

    Attributes:
        of_heads: (num_layers, kv_dim, num_kv_heads), over all tokens: root of the mean square of vectors' norms.
        of_tokens: (num_layers, kv_dim, num_tokens), over all heads.
    """

    title: str
    num_blocks: int
    of_heads: torch.Tensor
    of_tokens: torch.Tensor


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
    with progress("reading", len(blocks)) as advance:
        for read in blocks:
            kv = read()
            if kv is None:
                raise NotStoredError("a block is damaged, or what K and V are in it cannot be told")
            squares_LPHT = kv.to(torch.float32).square().sum(-1)
            if not of_tokens and squares_LPHT.shape[-1] * len(blocks) > _MOST_TOKENS:
                raise ConfigError(
                    f"{len(blocks)} blocks are too many for a picture; give at most {_MOST_TOKENS} tokens"
                )
            sums = squares_LPHT.sum(-1)
            squares_of_heads = sums if squares_of_heads is None else squares_of_heads + sums
            of_tokens.append(squares_LPHT.mean(2).sqrt())
            advance(1)
    assert squares_of_heads is not None
    tokens = torch.cat(of_tokens, dim=-1)
    return Norms(title, len(blocks), (squares_of_heads / tokens.shape[-1]).sqrt(), tokens)


def draw(found: Norms) -> Figure:
    """The picture; see `tools.figures` for writing it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = ("K", "V") if found.of_heads.shape[1] == 2 else ("latent",)
    figure = new_figure(12, 3.8 * len(names))
    title = f"{printable(found.title)}: {found.num_blocks} blocks, {found.of_tokens.shape[-1]} tokens"
    figure.suptitle(title.replace("$", " "))
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
    image = axes.imshow(values.nan_to_num().numpy(), aspect="auto", cmap="viridis", interpolation="nearest",
                        origin="lower", extent=(-0.5, width - 0.5, -0.5, num_layers - 0.5))  # fmt: skip
    axes.set(title=title, xlabel=across, ylabel="layer")
    for axis, n in ((axes.yaxis, num_layers), *(((axes.xaxis, width),) if whole else ())):
        axis.get_major_locator().set_params(integer=True)
        if n <= 8:
            axis.set_ticks(range(n))
    figure.colorbar(image, ax=axes, label="norm of a vector")


def _thinned(values: torch.Tensor) -> torch.Tensor:
    """At most as many columns as can be seen: the greatest of neighbours, so that no peak is lost."""
    n = values.shape[-1]
    step = -(-n // _MOST_COLUMNS)
    if step == 1:
        return values
    padded = torch.nn.functional.pad(values, (0, -n % step), value=0.0)
    thinned: torch.Tensor = padded.view(values.shape[0], -1, step).amax(-1)
    return thinned
