"""A journal over time, drawn: how full each tier is, where blocks were found, and the hit rate."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.errors import ConfigError
from kvstore.journal_view import JournalView
from tools.figures import new_figure
from tools.journal_stats import TIERS, windows
from tools.output import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS: Final = {
    "device": "tab:purple", "host": "tab:blue", "disk": "tab:green", "shared": "tab:orange", "computed": "lightgrey"
}  # fmt: skip


def draw(view: JournalView) -> Figure:
    """Three panels over one time axis.

    Raises:
        ConfigError: the journal says nothing over time.
        MissingExtraError: matplotlib is not installed.
    """
    if not view.samples and not view.requests:
        raise ConfigError(f"PATH: the journal {view.path} has neither samples nor requests yet; try again later")
    figure = new_figure(11, 8.5)
    used, found, rate = figure.subplots(3, 1, sharex=True)
    start = view.first_ns / 1e9
    _draw_used(used, view, start)
    over_time = windows(view)
    x = (over_time.ends_s - start) / 60
    width = over_time.width_s / 60
    bottom = np.zeros(len(x))
    for name, blocks in over_time.found.items():
        found.bar(x - width, blocks, width, bottom, align="edge", label=name, color=COLORS.get(name))
        bottom += blocks
    found.set(title="where the blocks of prompts were found", ylabel=f"blocks in {_span(over_time.width_s)}")
    rate.plot(x - width / 2, 100 * over_time.hit_rate(), marker=".", color="black")
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start))
    rate.set(title="hit rate", ylabel="% of blocks asked for", ylim=(0, 102), xlabel=f"minutes since {began}")
    for axes in (used, found, rate):
        axes.grid(visible=True, alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def _draw_used(axes: Any, view: JournalView, start: float) -> None:
    """One line for each tier of each process, and a dotted one for its capacity."""
    lines: dict[tuple[int, str], list[tuple[float, float, float]]] = defaultdict(list)
    for sample in view.samples:
        at = (sample.t_ns / 1e9 - start) / 60
        numbers = sample.numbers
        lines[sample.pid, sample.tier].append(
            (at, numbers.get("used_nbytes", 0.0), numbers.get("capacity_nbytes", 0.0))
        )
    many = len({pid for pid, _ in lines}) > 1
    for (pid, tier), points in sorted(lines.items(), key=lambda item: (item[0][0], _place(item[0][1]))):
        x, used, capacity = np.array(points).T
        label = f"{tier} ({pid})" if many else tier
        (line,) = axes.plot(x, used, label=label, color=None if many else COLORS.get(tier), marker=".")
        axes.plot(x, capacity, linestyle=":", color=line.get_color())
    axes.yaxis.set_major_formatter(lambda value, _: size(max(0.0, value)))
    axes.set(title="used, and capacity (dotted)", ylim=(0, None))


def _place(tier: str) -> int:
    return TIERS.index(tier) if tier in TIERS else len(TIERS)


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
