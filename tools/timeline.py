"""A journal over time, drawn: how full each tier is, where blocks were found, and the hit rate.

A journal's numbers are anyone's: what cannot be is left out, and said.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from kvstore.errors import ConfigError
from kvstore.journal_entries import Request, TierSample
from kvstore.journal_view import JournalView
from tools.figures import label, legend_beside, new_figure
from tools.journal_stats import TIERS, Windows, windows
from tools.output import size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS: Final = {
    "device": "tab:purple", "host": "tab:blue", "disk": "tab:green", "shared": "tab:orange", "computed": "lightgrey"
}  # fmt: skip
_MOST_LINES: Final = 12
_UNITS: Final = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))  # three of them are worth an axis
_FIRST_NS: Final = 1_600_000_000 * 10**9  # before there was such a journal
_SKEW_NS: Final = 86400 * 10**9  # clocks of hosts may differ so much
_MOST_NBYTES: Final = 1 << 60
_MOST_BLOCKS: Final = 1 << 24  # of a prompt


@dataclass(frozen=True, slots=True)
class Timeline:
    """What can be drawn of a journal.

    Attributes:
        fill: (process, tier) -> samples with a capacity, by time; of the processes that wrote last.
        start_s, end_s: seconds since 1970.
        notes: what was left out, for people.
    """

    fill: dict[tuple[int, str], list[TierSample]]
    windows: Windows
    start_s: float
    end_s: float
    notes: list[str]


def timeline(view: JournalView) -> Timeline:
    """Look at a journal.

    Raises:
        ConfigError: it says nothing over time.
    """
    most_ns = time.time_ns() + _SKEW_NS
    samples = [sample for sample in view.samples if _can_be(sample, most_ns)]
    requests = [r for r in view.requests if _FIRST_NS <= r.t_ns <= most_ns and r.num_blocks <= _MOST_BLOCKS]
    times = [sample.t_ns / 1e9 for sample in samples] + [request.t_ns / 1e9 for request in requests]
    if not times:
        raise ConfigError(
            f"PATH: the journal {view.path} has no samples and no requests yet, or none that can be; try again later"
        )
    fill: dict[tuple[int, str], list[TierSample]] = {}
    for sample in samples:
        if sample.numbers["capacity_nbytes"]:
            fill.setdefault((sample.pid, sample.tier), []).append(sample)
    newest = sorted(fill, key=lambda at: fill[at][-1].t_ns)[-_MOST_LINES:]
    start, end = min(times), max(times)
    notes = _notes(view, len(samples), requests, len(fill) - len(newest))
    drawn = {at: fill[at] for at in sorted(newest, key=lambda at: (at[0], TIERS.index(at[1])))}
    return Timeline(drawn, windows(requests, start, end), start, end, notes)


def _can_be(sample: TierSample, most_ns: int) -> bool:
    """Whether these are a tier's numbers."""
    sizes = [sample.numbers.get(name, math.nan) for name in ("used_nbytes", "capacity_nbytes")]
    return sample.tier in TIERS and _FIRST_NS <= sample.t_ns <= most_ns and all(0 <= n <= _MOST_NBYTES for n in sizes)


def _notes(view: JournalView, num_samples: int, requests: list[Request], num_more: int) -> list[str]:
    notes = []
    if left := len(view.samples) - num_samples:
        notes.append(f"{left} samples are left out: their tier, time or sizes cannot be")
    if left := len(view.requests) - len(requests):
        notes.append(f"{left} requests are left out: their time or length cannot be")
    if num_more:
        notes.append(f"tiers of {num_more} more are not drawn, of processes that wrote before these")
    return notes


def draw(found: Timeline) -> Figure:
    """Three panels over one time axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = new_figure(11, 8.5)
    full, where, rate = figure.subplots(3, 1, sharex=True)
    unit, unit_s = _unit(found.end_s - found.start_s)
    _draw_fill(full, found, unit_s)
    over_time, width = found.windows, found.windows.width_s / unit_s
    x = (over_time.ends_s - found.start_s) / unit_s
    bottom = np.zeros(len(x))
    for name, blocks in over_time.found.items():
        where.bar(x - width, blocks, width, bottom, align="edge", label=name, color=COLORS[name])
        bottom += blocks
    where.set(title="where the blocks of prompts were found", ylabel=f"blocks in {span(over_time.width_s)}")
    rate.plot(x - width / 2, 100 * over_time.hit_rate(), marker="o", markersize=4, color="black")
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.start_s))
    rate.set(title="hit rate", ylabel="% of blocks asked for", ylim=(0, 102), xlabel=f"{unit} since {began}",
             xlim=(0, float(x[-1])))  # fmt: skip
    for axes in (full, where, rate):
        axes.grid(visible=True, alpha=0.3)
        axes.set_axisbelow(True)
        legend_beside(axes)
    if found.notes:
        figure.supxlabel(label("; ".join(found.notes)), fontsize=9, color="tab:red")
    return figure


def _draw_fill(axes: Any, found: Timeline, unit_s: float) -> None:
    """One line for each tier of each process, as a share of its capacity: tiers are of very different sizes."""
    many = len({pid for pid, _ in found.fill}) > 1
    for (pid, tier), samples in found.fill.items():
        x = [(sample.t_ns / 1e9 - found.start_s) / unit_s for sample in samples]
        shares = [100 * min(1.0, s.numbers["used_nbytes"] / s.numbers["capacity_nbytes"]) for s in samples]
        name = f"{tier} ({pid})" if many else tier
        color = None if many else COLORS[tier]
        axes.plot(x, shares, label=f"{name}, of {size(samples[-1].numbers['capacity_nbytes'])}", color=color,
                  marker="o", markersize=3)  # fmt: skip
    axes.set(title="how full", ylabel="% of capacity", ylim=(0, 104))


def _unit(seconds: float) -> tuple[str, int]:
    """Of an axis so long."""
    return next((unit for unit in _UNITS if seconds >= 3 * unit[1]), _UNITS[-1])


def span(seconds: float) -> str:
    """``90.0`` -> ``1.5 minutes``."""
    name, unit_s = next((unit for unit in _UNITS if seconds >= unit[1]), _UNITS[-1])
    n = seconds / unit_s
    return f"{n:g} {name[:-1] if n == 1 else name}"
