"""The demo: a real model skips its prefill because the KV was stored by another process.

    writer   prefills a guide of some 2,600 tokens, stores its KV on disk and on a shared path

    cold     answers questions about the guide without a store
    host     ... with the KV in its host memory (brought up from the disk before)

    disk     ... with the KV on disk, as after a restart
    shared   ... with the KV on the shared path, its own disk tier empty

Three processes. What is measured runs while the others wait.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from connectors.weights_digest import cache_root
from kvstore.errors import ConfigError
from tools.demo_model import MODEL_NAME, prepare_model
from tools.demo_process import Child
from tools.demo_report import DemoResult, Measured, SourceRow
from tools.ls import list_stored

GUIDE: Final = Path(__file__).parent / "data" / "kv_caching_guide.md"
QUESTIONS: Final = (
    "What is the simplest eviction policy?",
    "What does a footer contain?",
    "How are the files of the shared tier named?",
)
SOURCES: Final = ("cold", "host", "disk", "shared")
_PROCESS_OF: Final = {
    "cold": "first reader",
    "host": "first reader",
    "disk": "second reader",
    "shared": "second reader",
}
BLOCK_TOKENS: Final = 16
_TAIL: Final = "\n## Questions and answers\n\nQ: {question}\nA:"
_START_TIMEOUT_S: Final = 180.0
_STEP_TIMEOUT_S: Final = 120.0
_SPARE_BLOCKS: Final = 32
# Large tensors then come from memory that is mapped already, as in a process that has served for
# a while; otherwise what is measured, in cold as in the others, is page faults.
_WORKER_ENVIRON: Final = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """Settings of a run.

    Args:
        keep: where the stored KV goes and stays; by default a fresh folder, removed at the end.
        max_new_tokens: length of an answer at most; it ends with its line.
    """

    keep: Path | None = None
    max_new_tokens: int = 32

    def __post_init__(self) -> None:
        if self.keep is not None and self.keep.exists() and (not self.keep.is_dir() or any(self.keep.iterdir())):
            raise ConfigError(f"keep: {str(self.keep)!r} is not empty; give an empty or a new directory")
        if self.max_new_tokens < 2:
            raise ConfigError(f"max_new_tokens: {self.max_new_tokens} is not allowed; give at least 2")


@dataclass(frozen=True, slots=True)
class _Prompts:
    """The questions' prompts as token ids; all begin with the guide's."""

    guide: list[int]
    full: list[list[int]]
    tokenizer: Any

    @classmethod
    def of(cls, model: Path) -> _Prompts:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        guide = tokenizer.encode(GUIDE.read_text()).ids
        tails = [tokenizer.encode(_TAIL.format(question=question)).ids for question in QUESTIONS]
        return cls(guide, [guide + tail for tail in tails], tokenizer)

    @property
    def line_end(self) -> int:
        return int(self.tokenizer.token_to_id("Ċ"))  # the byte-level name of a newline

    @property
    def host_blocks(self) -> int:
        return max(map(len, self.full)) // BLOCK_TOKENS + _SPARE_BLOCKS


@dataclass(slots=True)
class _Run:
    """One run on its way."""

    config: DemoConfig
    data: Path
    scratch: Path
    model: Path
    prompts: _Prompts
    progress: Progress
    task: TaskID
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {source: [] for source in SOURCES})

    def step(self, description: str) -> None:
        """Say what comes next; what was said before is done."""
        self.progress.update(self.task, description=description, advance=1)

    def tiers(self, source: str, question: int = 0) -> dict[str, Any]:
        """Arguments that open the tiers of a source. ``shared`` gets a new, empty disk tier each time."""
        own = self.scratch / f"{source}-{question}"
        return {
            "host_blocks": self.prompts.host_blocks,
            "disk": str(own if source == "shared" else self.data / "disk"),
            "shared": str(self.data / "shared") if source in ("writer", "shared") else None,
        }


def run(config: DemoConfig | None = None, console: Console | None = None) -> DemoResult:
    """Run the demo; progress goes to ``console`` (stderr by default).

    Raises:
        ConfigError, MissingExtraError: the model can't be had, or ``keep`` is in use.
        ChildError: one of the processes failed; the message says which, and why.
    """
    config, start = config or DemoConfig(), time.monotonic()
    steps = 3 + len(QUESTIONS) * len(SOURCES) * 2
    with _progress(console) as progress, _folders(config.keep) as (data, scratch):
        task = progress.add_task("preparing the model", total=steps)
        model = prepare_model(lambda message: progress.update(task, description=f"preparing the model: {message}"))
        state = _Run(config, data, scratch, model, _Prompts.of(model), progress, task)
        with ExitStack() as stack:
            children = {
                name: stack.enter_context(Child(name, "tools.demo_worker", scratch, _WORKER_ENVIRON))
                for name in ("writer", *dict.fromkeys(_PROCESS_OF.values()))
            }
            _answer_all(state, children)
        return _result(state, start)


def _answer_all(state: _Run, children: dict[str, Child]) -> None:
    state.step(f"starting {len(children)} processes, each loads the model")
    for child in children.values():
        child.send("load", model=str(state.model))
    for child in children.values():
        child.receive(_START_TIMEOUT_S)
    _write(state, children["writer"])
    for source in SOURCES:
        for question in range(len(QUESTIONS)):
            state.step(f"{source}: time to first token, question {question + 1}")
            state.rows[source].append(_first_token(state, children[_PROCESS_OF[source]], source, question))
        children[_PROCESS_OF[source]].ask("close", timeout_s=_STEP_TIMEOUT_S)
    for source in SOURCES:
        for question, row in enumerate(state.rows[source]):
            state.step(f"{source}: answering question {question + 1}")
            row |= children[_PROCESS_OF[source]].ask(
                "answer",
                name=f"{source}-{question}",
                max_new_tokens=state.config.max_new_tokens,
                line_end=state.prompts.line_end,
                timeout_s=_STEP_TIMEOUT_S,
            )


def _write(state: _Run, writer: Child) -> None:
    """Store the guide's KV and let the process end, so that nothing of it is left but files."""
    state.step(f"writer: prefilling and storing {len(state.prompts.guide)} tokens")
    writer.ask("open", **state.tiers("writer"), timeout_s=_STEP_TIMEOUT_S)
    writer.ask("fill", ids=state.prompts.guide, durable_within_s=_STEP_TIMEOUT_S, timeout_s=2 * _STEP_TIMEOUT_S)
    writer.close()


def _first_token(state: _Run, child: Child, source: str, question: int) -> dict[str, Any]:
    if source in ("disk", "shared") or (source == "host" and question == 0):
        child.ask("open", **state.tiers(source, question), timeout_s=_STEP_TIMEOUT_S)
    if source == "host" and question == 0:
        child.ask("fill", ids=state.prompts.guide, durable_within_s=_STEP_TIMEOUT_S, timeout_s=2 * _STEP_TIMEOUT_S)
    name = f"{source}-{question}"
    path = state.scratch / f"{name}.npy"
    ids = state.prompts.full[question]
    row = child.ask("first_token", name=name, ids=ids, logits=str(path), timeout_s=_STEP_TIMEOUT_S)
    row["logits"] = np.load(path, allow_pickle=False)
    path.unlink()
    return row


def _result(state: _Run, start: float) -> DemoResult:
    measured: dict[str, list[Measured]] = {}
    for source, rows in state.rows.items():
        texts = [state.prompts.tokenizer.decode(row.pop("ids")).strip() for row in rows]
        measured[source] = [Measured(**row, text=text) for row, text in zip(rows, texts, strict=True)]
    cold = measured["cold"]
    return DemoResult(
        model=MODEL_NAME,
        prompt_tokens=len(state.prompts.full[0]),
        sources=[SourceRow.of(source, measured[source], cold) for source in SOURCES],
        answers=[(question, answer.text) for question, answer in zip(QUESTIONS, cold, strict=True)],
        seconds=time.monotonic() - start,
        stored=list_stored(state.data),
    )


@contextmanager
def _folders(keep: Path | None) -> Iterator[tuple[Path, Path]]:
    """Where the tiers are, and a folder for the rest; without ``keep`` both go at the end."""
    runs = cache_root() / "runs"
    runs.mkdir(mode=0o700, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=runs))
    data = keep.resolve() if keep is not None else scratch / "kv"
    try:
        data.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield data, scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(file=sys.stderr), transient=True) as progress:
        yield progress
