"""Draws a plan: hit rate over capacity, one line a policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tools.figures import new_figure
from tools.output import size
from tools.plan.plan import Plan
from tools.plan.rates import BEST

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _times(factor: float) -> Any:
    return lambda value: value * factor


def draw(plan: Plan) -> Figure:
    """The figure; see `tools.figures` for writing it.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(10, 5.6)
    axes = figure.add_subplot()
    for name, rates in plan.hit_rates.items():
        style: dict[str, Any] = {"linestyle": "--", "color": "black"} if name == BEST else {"marker": "o"}
        axes.plot(plan.capacities, [100 * rate for rate in rates], label=name, **style)
    axes.axhline(100 * plan.most, color="grey", linewidth=1, linestyle=":")
    axes.annotate("no bound", (plan.capacities[0], 100 * plan.most), textcoords="offset points", xytext=(0, 4),
                  color="grey", fontsize=9)  # fmt: skip
    if plan.target is not None:
        axes.axhline(100 * plan.target, color="tab:red", linewidth=1)
        axes.annotate("target", (plan.capacities[-1], 100 * plan.target), textcoords="offset points", xytext=(-4, 4),
                      ha="right", color="tab:red", fontsize=9)  # fmt: skip
    for tier, n in plan.budget_blocks.items():
        axes.axvline(n, color="tab:purple", linewidth=1)
        axes.annotate(
            f"{tier} budget", (n, 0), textcoords="offset points", xytext=(4, 6), color="tab:purple", fontsize=9
        )
    title = f"{plan.requests:,} requests, {plan.distinct_blocks:,} distinct blocks"
    axes.set(xscale="log", ylim=(0, min(100.0, 125 * max(plan.most, plan.target or 0.0) + 1)), title=title,
             xlabel="capacity of a tier, blocks", ylabel="prefix hits, % of blocks asked for")  # fmt: skip
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(loc="upper left")
    if plan.block_nbytes is not None:
        nbytes = plan.block_nbytes
        above = axes.secondary_xaxis("top", functions=(_times(nbytes), _times(1 / nbytes)))
        above.xaxis.set_major_formatter(lambda value, _: size(value))
        above.set_xlabel("bytes")
    return figure
