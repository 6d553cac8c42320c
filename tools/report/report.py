"""Gathers what `stat`, `ls`, `plot` and `plan` say, and writes it as one HTML page that needs nothing else.

Everything on it was written by anyone: the template escapes it, and the page's own policy lets
nothing be loaded or run.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvstore.errors import ConfigError, KVStoreError, MissingExtraError
from kvstore.journal_view import JournalView
from tools import journal_stats, ls, stat
from tools.blocks import places
from tools.choice import Choice
from tools.figures import png
from tools.journal_stats import tier_uses
from tools.new_file import check_free, new_file
from tools.output import printable, progress, size
from tools.places import find_catalogs
from tools.plan import chart
from tools.plan.plan import Plan, Question, of_journal, plan_of
from tools.plan.trace import read_source, trace_of
from tools.plot import draw as draw_norms
from tools.plot import norms
from tools.prefix_tree import Branch, prefix_tree
from tools.timeline import draw as draw_timeline
from tools.timeline import timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_ROWS: Final = 200
_MOST_BRANCHES: Final = 25
_SAMPLE_BLOCKS: Final = 16


@dataclass(frozen=True, slots=True)
class Section:
    """One part of the page.

    Attributes:
        left: so many columns are texts.
        picture: a PNG, in base64.
        items: (depth, text), a list with levels.
    """

    title: str
    about: str
    columns: Sequence[str] = ()
    rows: list[list[str]] = field(default_factory=list)
    left: int = 1
    picture: str = ""
    notes: list[str] = field(default_factory=list)
    items: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    path: str
    made_at: str
    tiles: list[tuple[str, str]]
    sections: list[Section]
    problems: list[str]


def make(path: Path, journal: Path | None, trace: Path | None, integrity_key_file: str | None) -> Report:
    """Gather everything.

    Raises:
        ConfigError: there is nothing of a tier at the path, or no journal, or no trace.
        MissingExtraError: what draws is not installed.
    """
    steps = 5
    with progress("gathering", steps) as advance:
        listed, told = ls.list_stored(path), stat.stat(path, journal)
        advance(1)
        view = JournalView.of(journal) if journal is not None else None
        sections = [_tiers(told), _stored(listed)]
        if view is not None:
            sections += _of_journal(path, view)
        advance(1)
        sections += _norms(path, integrity_key_file)
        advance(1)
        sections += _plans(view, trace)
        advance(2)
    problems = [f"{where}: {text}" for where, texts in {**listed.problems, **told.problems}.items() for text in texts]
    made_at = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return Report(printable(str(path)), made_at, _tiles(listed, view), sections, [printable(p) for p in problems])


def write(report: Report, out: Path, *, force: bool = False) -> int:
    """Write the page; returns its size in bytes.

    Raises:
        MissingExtraError: jinja2 is not installed.
        ConfigError: the file cannot be written.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as e:
        raise MissingExtraError("jinja2", "plot") from e
    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    data = made.get_template("page.html").render(report=report).encode()
    check_free(out, force=force)
    with new_file(out) as file:
        file.write(data)
    return len(data)


def _tiles(listed: ls.Listing, view: JournalView | None) -> list[tuple[str, str]]:
    rows = listed.rows
    tiles = [
        *(
            (f"blocks, {tier}", f"{sum(row.blocks for row in rows if row.tier == tier):,}")
            for tier in dict.fromkeys(row.tier for row in rows)
        ),  # a block may lie in several
        ("bytes", size(sum(row.nbytes for row in rows))),
        ("models", str(len({(row.model, row.revision) for row in rows}))),
    ]
    if view is not None:
        asked, hits = (sum(getattr(r, name) for r in view.requests) for name in ("num_blocks", "num_hits"))
        tenants = {request.tenant for request in view.requests} - {""}
        tiles += [
            ("requests", f"{len(view.requests):,}"),
            ("hit rate", f"{hits / asked:.1%}" if asked else "-"),
            ("tenants", str(len(tenants))),
        ]
    return tiles


def _tiers(told: stat.Stat) -> Section:
    return Section(
        "Tiers", "How full each directory is.", stat.COLUMNS, _texts(line.cells() for line in told.lines), left=3
    )


def _stored(listed: ls.Listing) -> Section:
    rows = sorted(listed.rows, key=lambda row: -row.nbytes)
    notes = [f"and {len(rows) - _MOST_ROWS} more"] if len(rows) > _MOST_ROWS else []
    cells = _texts(row.cells() for row in rows[:_MOST_ROWS])
    return Section("What is stored", "By namespace, the largest first.", ls.COLUMNS, cells, left=4, notes=notes)


def _of_journal(path: Path, view: JournalView) -> list[Section]:
    uses = _texts(use.cells() for use in tier_uses(view))
    servers = Section("Servers", "Their tiers, as the journal knows them.", journal_stats.COLUMNS, uses, left=4)
    sections = [servers]
    about = "How full each tier was, where blocks were found, and the hit rate."
    try:
        over_time = timeline(view)
    except ConfigError:  # nothing yet
        pass
    else:
        sections.append(Section("Over time", about, picture=_picture(draw_timeline(over_time)), notes=over_time.notes))
    tree = prefix_tree(path, view.path, _MOST_BRANCHES)
    items: list[tuple[int, str]] = []

    def add(branch: Branch, depth: int) -> None:
        items.append((depth, branch.text(tree.block_size).plain))
        for below in branch.branches:
            add(below, depth + 1)

    for root in tree.roots:
        add(root, 0)
    sections.append(Section("Prompts", "Which share which heads; what most ask for comes first.", items=items))
    return sections


def _norms(path: Path, integrity_key_file: str | None) -> list[Section]:
    """A look at the numbers of some blocks of each model."""
    sections = []
    for fmt_name, keys in _some_keys(path, integrity_key_file).items():
        title = f"K and V of {fmt_name}"
        try:
            found = norms(path, Choice(keys=tuple(keys)), integrity_key_file)
        except KVStoreError as e:
            sections.append(Section(title, "", notes=[f"not drawn: {e}"]))
        else:
            about = f"Norms of vectors in {found.num_blocks} blocks of those that are stored."
            notes = [found.said()] if found.num_bad else []
            sections.append(Section(title, about, picture=_picture(draw_norms(found)), notes=notes))
    return sections


def _some_keys(path: Path, integrity_key_file: str | None) -> dict[str, list[str]]:
    """Of each model some blocks' keys, the first that are found."""
    found: dict[str, list[str]] = {}
    for place in places(find_catalogs(path, integrity_key_file)):
        if place.fmt is None:
            continue
        content = place.fmt.content
        keys = found.setdefault(printable(f"{content.get('model')}@{str(content.get('revision'))[:12]}"), [])
        if len(keys) < _SAMPLE_BLOCKS and str(place.key) not in keys:
            keys.append(str(place.key))
    return found


def _plans(view: JournalView | None, trace: Path | None) -> list[Section]:
    sections = []
    if trace is not None:
        whole, told = read_source(trace)
        question = Question() if told is None else of_journal(Question(), told)
        sections.append(_plan(plan_of(whole, question), f"Plan, from {trace.name}"))
    elif view is not None and any(request.num_blocks for request in view.requests):
        sections.append(_plan(plan_of(trace_of(view), of_journal(Question(), view)), "Plan, from the journal"))
    return sections


def _plan(made: Plan, title: str) -> Section:
    about = (
        f"{made.requests:,} requests asked for {made.blocks_asked:,} blocks, {made.distinct_blocks:,} distinct ones; "
        f"at most {made.most:.1%} can be hits."
    )
    notes = list(made.notes())
    picture = _picture(chart.draw(made))
    return Section(title, about, made.columns(), _texts(made.rows()), left=0, picture=picture, notes=notes)


def _texts(rows: Iterable[Sequence[object]]) -> list[list[str]]:
    return [[printable(str(cell)) for cell in row] for row in rows]


def _picture(figure: Figure) -> str:
    return base64.b64encode(png(figure)).decode()


def summary(report: Report, nbytes: int, out: Path) -> dict[str, Any]:
    """What the command says of the page, as data."""
    return {
        "file": str(out), "nbytes": nbytes, "sections": [section.title for section in report.sections],
        "problems": report.problems, **{name.replace(" ", "_"): value for name, value in report.tiles},
    }  # fmt: skip
