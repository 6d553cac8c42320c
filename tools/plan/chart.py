"""Draws a plan: hit rate over capacity, one line a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from tools.figures import byte_ticks, label, legend_beside, new_figure, round_size
from tools.plan.plan import Plan
from tools.plan.rates import BEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLES: Final = (("o", "-"), ("s", "--"), ("^", "-."), ("D", ":"))  # so that lines upon each other can be told apart


def draw(plan: Plan) -> Figure:
    """The figure; see `tools.figures` for writing it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(11, 5.6)
    axes = figure.add_subplot()
    for i, (name, rates) in enumerate(plan.hit_rates.items()):
        marker, line = _STYLES[i % len(_STYLES)]
        style: dict[str, Any] = {"marker": marker, "linestyle": line, "alpha": 0.85}
        style = {"linestyle": "--", "color": "black"} if name == BEST else style
        axes.plot(plan.capacities, [100 * rate for rate in rates], label=label(name), **style)
    _mark(axes, plan)
    title = f"{plan.requests:,} requests, {plan.distinct_blocks:,} distinct blocks"
    axes.set(xscale="log", ylim=(0, min(102.0, 115 * max(plan.most, plan.target or 0.0) + 2)), title=title,
             xlabel="capacity of a tier, blocks", ylabel="prefix hits, % of blocks asked for")  # fmt: skip
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(visible=True, which="major", alpha=0.3)
    legend_beside(axes)
    if plan.block_nbytes is not None:
        _draw_bytes(axes, plan.block_nbytes)
    return figure


def _mark(axes: Any, plan: Plan) -> None:
    """What bounds it, what is wished for, and what is proposed."""
    axes.axhline(100 * plan.most, color="grey", linewidth=1, linestyle=":")
    _note(axes, "no bound", (plan.capacities[0], 100 * plan.most), "grey")
    if plan.target is not None:
        axes.axhline(100 * plan.target, color="tab:red", linewidth=1)
        _note(axes, "target", (plan.capacities[0], 100 * plan.target), "tab:red")
    for tier, n in plan.budget_blocks.items():
        axes.axvline(n, color="tab:purple", linewidth=1)
        _note(axes, f"{tier} budget", (n, 0), "tab:purple")
    if (setting := plan.setting) is not None:
        n = max(setting.host_blocks or 0, setting.disk_blocks or 0)
        axes.plot([n], [100 * setting.hit_rate], marker="*", markersize=17, color="gold", markeredgecolor="black",
                  linestyle="none", zorder=5, label=f"setting: {label(setting.eviction_policy)}")  # fmt: skip


def _note(axes: Any, text: str, at: tuple[float, float], color: str) -> None:
    axes.annotate(text, at, textcoords="offset points", xytext=(4, 4), color=color, fontsize=9)


def _draw_bytes(axes: Any, block_nbytes: int) -> None:
    above = axes.secondary_xaxis("top", functions=(_times(block_nbytes), _times(1 / block_nbytes)))
    low, high = axes.get_xlim()
    above.set_ticks(byte_ticks(low * block_nbytes, high * block_nbytes))
    above.xaxis.set_major_formatter(lambda value, _: round_size(value))
    above.xaxis.set_minor_locator(_no_ticks())
    above.set_xlabel("bytes")


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _times(factor: float) -> Any:
    return lambda value: value * factor
