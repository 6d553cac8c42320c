"""Every command that reads what others wrote, on every hostile case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.hostile.cases import ASKED, DUMPS, JOURNALS, KEY, STORES, TRACES
from tests.small import copy_store, small_keys
from tests.tools.test_cli import COMMANDS, kvstore, tree

ROOT = Path(__file__).resolve().parents[2]
MAX_MIB = 350  # 260 of these are torch and we
MORE_MIB = {"plot": 30, "report": 60, "plan": 30, "load": 60}  # matplotlib; a store
TIMEOUT_S = 170.0
GROUPS = {"stores": STORES, "dumps": DUMPS, "asked": ASKED, "journals": JOURNALS, "traces": TRACES}
# What is stored is as it was; what is said about it names another model, or a bound.
SOUND = {"field out of the tree", "field slots", "another's identity", "sound, of zeros"}
BATCH = 50  # commands a process
AT_ONCE = 2  # processes
# These read nothing that another wrote; `proxy` has its own tests of what comes over the network.
OTHERS = {"bench", "demo", "demo-p2p", "demo-vllm", "keygen", "proxy"}


def of_store(case: Path, *arguments: object) -> list[list[object]]:
    return [[*arguments]] if (case / "kv").exists() else []


def key_of(case: Path) -> str:
    return (case / "key").read_text() if (case / "key").exists() else KEY


def asked_of(case: Path) -> list[list[object]]:
    """Options, from the files of a case that say which blocks."""
    found: list[list[object]] = []
    if (case / "tokens.json").exists():
        found.append(["--tokens", case / "tokens.json"])
    if (case / "model").exists():
        found.append(["--text", "a b a", "--tokenizer", case / "model"])
    return found


def dump(case: Path, good: Path) -> list[list[object]]:
    out = ["--out", case / "out/dump", "--force"]
    found = of_store(case, "dump", case / "kv", "--key", key_of(case), *out)
    found += of_store(case, "dump", case / "kv", "--tokens", good / "tokens.json", *out)
    found += [["dump", good / "kv/disk", *asked, *out] for asked in asked_of(case)]
    if (case / "keys").exists():
        found.append(["dump", good / "kv/disk", "--keys", case / "keys", *out])
    return found + of_journal(case, good, "dump", good / "kv/disk", "--request", "r", *out)


def load(case: Path, good: Path) -> list[list[object]]:
    found: list[list[object]] = []
    if (case / "file").exists():
        found += [["load", case / "file", "--into", case / "out/new", *kind] for kind in ((), ("--shared",))]
    for into, kind in (("kv/disk", ()), ("kv/shared", ("--shared",))):
        if (case / into).is_dir() and not (case / into).is_symlink():
            found.append(["load", good / "file", "--into", case / into, *kind, "--capacity", "8MiB"])
    return found


def diff(case: Path, good: Path) -> list[list[object]]:
    found = of_store(case, "diff", case / "kv", good / "kv") + of_store(case, "diff", good / "file", case / "kv")
    found += [["diff", good / "kv/disk", good / "file", *asked] for asked in asked_of(case)]
    if (case / "file").exists():
        found += [["diff", case / "file", good / "file"], ["diff", good / "kv/disk", case / "file", "--key", KEY]]
        found.append(["diff", good / "file", case / "file", "--tokens", good / "tokens.json", "--by-position"])
    return found + of_journal(case, good, "diff", good / "file", good / "kv/disk", "--request", "r")


def plot(case: Path, good: Path) -> list[list[object]]:
    out = ["--out", case / "out/plot.png", "--force"]
    found = of_store(case, "plot", case / "kv", "--key", key_of(case), *out)
    found += [["plot", good / "kv/disk", *asked, *out] for asked in asked_of(case)]
    if (case / "file").exists():
        found.append(["plot", case / "file", *out])
    if (case / "journal").exists():
        found.append(["plot", case / "journal", *out])
    return found


def explain(case: Path, good: Path) -> list[list[object]]:
    found = of_store(case, "explain", case / "kv", "--key", key_of(case))
    found += of_store(case, "explain", case / "kv", "--tokens", good / "tokens.json")
    found += [["explain", good / "kv/disk", *asked] for asked in asked_of(case)]
    found += of_journal(case, good, "explain", good / "kv/disk", "--request", "r")
    found += of_journal(case, good, "explain", good / "kv/disk", "--key", KEY, "--model", "test")
    return found + of_journal(case, good, "explain", good / "kv/disk", "--tokens", good / "tokens.json")


def plan(case: Path, good: Path) -> list[list[object]]:
    chart = ["--chart", case / "out/plan.png", "--force"]
    return [["plan", case / name, *chart] for name in ("trace", "journal", "file") if (case / name).exists()]


def of_journal(case: Path, good: Path, *arguments: object) -> list[list[object]]:
    return [[*arguments, "--journal", case / "journal"]] if (case / "journal").exists() else []


Made = Callable[[Path, Path], list[list[object]]]
READERS: dict[str, Made] = {
    "ls": lambda case, good: (
        of_store(case, "ls", case / "kv")
        + of_journal(case, good, "ls", good / "kv")
        + of_journal(case, good, "ls", good / "kv", "--tree")
    ),
    "inspect": lambda case, _: (
        of_store(case, "inspect", case / "kv") + of_store(case, "inspect", case / "kv", key_of(case), "--per-head")
    ),
    "verify": lambda case, _: of_store(case, "verify", case / "kv"),
    "dump": dump,
    "load": load,
    "diff": diff,
    "plot": plot,
    "explain": explain,
    "plan": plan,
    "stat": lambda case, good: of_store(case, "stat", case / "kv") + of_journal(case, good, "stat", good / "kv"),
    "top": lambda case, _: (
        of_store(case, "top", case / "kv", "--once")
        + ([["top", case / "journal", "--once"]] if (case / "journal").exists() else [])
    ),
    "report": lambda case, good: (
        of_store(case, "report", case / "kv", "--out", case / "out/r.html", "--force")
        + of_journal(case, good, "report", good / "kv", "--out", case / "out/r.html", "--force")
    ),
    "gc": lambda case, _: of_store(case, "gc", case / "kv", "--older-than", "0s"),
    "purge": lambda case, good: (
        of_store(case, "purge", case / "kv", "--all", "--yes")
        + of_journal(case, good, "purge", good / "kv", "--request", "r", "--dry-run")
        + of_journal(case, good, "purge", good / "kv", "--all", "--dry-run")
    ),
    "repair": lambda case, _: of_store(case, "verify", case / "kv", "--repair"),
}
WRITERS = {"load", "gc", "purge", "repair"}  # to stores that they were given, and to nothing else


@pytest.fixture(scope="module")
def corpus(small_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile")
    (path / "outside").mkdir()
    (path / "outside/file").write_text("not yours")
    good = path / "good"
    good.mkdir()
    copy_store(small_store, good / "kv")
    (good / "tokens.json").write_text(json.dumps(list(range(48))))
    assert kvstore("dump", good / "kv/disk", "--tokens", good / "tokens.json", "--out", good / "file")[0] == 0
    for group, cases in GROUPS.items():
        for i, (_, make) in enumerate(sorted(cases.items())):
            case = path / f"{group}-{i}"
            case.mkdir()
            if group == "stores":
                copy_store(small_store, case / "kv")
            make(case)
            (case / "out").mkdir()
    return path


def run(command: str, corpus: Path, names: dict[str, str]) -> list[tuple[str, list[object], list[Any]]]:
    """Case, arguments and answer, of a command on all cases."""
    of_cases = [
        [(case.name, arguments) for arguments in READERS[command](case, corpus / "good")]
        for case in sorted(corpus.iterdir())
        if case.name in names
    ]
    batches: list[list[tuple[str, list[object]]]] = [[]]
    for asked in of_cases:  # two of one case would write to the same files
        if len(batches[-1]) >= BATCH:
            batches.append([])
        batches[-1] += asked
    with ThreadPoolExecutor(AT_ONCE) as threads:
        of_batches = threads.map(lambda batch: answers_to([one for _, one in batch], corpus / "home"), batches)
        answers = [answer for batch in of_batches for answer in batch]
    return [(name, arguments, answer) for (name, arguments), answer in zip(chain(*batches), answers, strict=True)]


def answers_to(commands: list[list[object]], home: Path) -> list[Any]:
    """Of a process that runs these."""
    home.mkdir(exist_ok=True)
    environ = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile.run"],
        input="".join(json.dumps([str(a) for a in arguments]) + "\n" for arguments in commands),
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"{commands[len(answers)]}: {done.stderr[-2000:]}"
    return answers


def sizes(path: Path) -> dict[str, tuple[int, int]]:
    """As `tree`, but without reading what may be a terabyte of holes."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in sorted(path.rglob("*")) if not p.is_dir()}


@pytest.mark.parametrize("command", READERS)
def test_no_case_harms(command: str, corpus: Path) -> None:
    names = {f"{group}-{i}": name for group, cases in GROUPS.items() for i, name in enumerate(sorted(cases))}
    outside, before = tree(corpus / "outside"), sizes(corpus)
    results = run(command, corpus, names)
    assert len(results) >= len(STORES)
    for case, arguments, (code, raised, stderr, mib) in results:
        name, group = names[case], case.partition("-")[0]
        what = f"{name}: {' '.join(map(str, arguments))}: {stderr}"
        assert raised == "", f"{what}: {raised}"
        assert "Traceback" not in stderr and "panicked" not in stderr, what
        must_fail = name not in SOUND and (command == "verify" or group in ("dumps", "asked"))
        allowed = {1, 2} if must_fail else {0, 1, 2}
        assert code in allowed, f"{what}: exit code {code}"
        assert mib < MAX_MIB + MORE_MIB.get(command, 0), f"{what}: {mib} MiB"
        assert not {"\x1b", "\u202e"} & set(stderr), what
    assert tree(corpus / "outside") == outside
    changed = {path for path, was in sizes(corpus).items() if before.get(path) != was}
    written = {path for path in changed if "/out/" not in path and "/home/" not in path}
    if command in WRITERS:
        written = {path for path in written if "/kv/disk/" not in path and "/kv/shared/" not in path}
    assert written == set()
    left = [path for path in changed if path.endswith(".new")]
    assert left == []


def test_every_command_is_looked_at() -> None:
    """A command that reads files gets its place in READERS."""
    assert set(READERS) - {"repair"} | OTHERS == set(COMMANDS)
    assert small_keys()[0].block_hash.hex() in KEY
