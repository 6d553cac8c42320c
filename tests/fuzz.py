"""Feeds every parser what anybody may have written, for a bounded time: `make fuzz`, ``python -m tests.fuzz SECONDS``.

Each target gets sound input of which some bytes were changed, cut, repeated or swapped. It may refuse it in the
one way that it says it does; anything else, a crash, a hang of more than some seconds, or much memory, is a
failure, and the input is left in ``fuzz-<target>.bin``.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import numpy as np
from rich.progress import Progress

from connectors.lookup_messages import ANSWERS, REQUESTS, Reserve, Select
from connectors.registration import Joins
from kvstore.errors import ConfigError, KVStoreError
from kvstore.journal import frame
from kvstore.journal_view import JournalView
from kvstore.prefix_file import PrefixFile, PrefixHeader
from kvstore.safetensors_header import parse_header
from kvstore.slot import SlotCodec, SlotFormat
from kvstore.stored_format import StoredFormat
from kvstore.tiers.disk_header import DirectoryHeader, read_header, write_header
from kvstore.tiers.disk_index import RecordFormat
from kvstore.tiers.index_stream import _Frames
from tests.foreign import FS_CONFIG
from tests.small import IDENTITY
from tests.test_journal import ASKED, GOOD, OPENED, packed, segment_with
from tools.choice import Choice
from tools.foreign.base import ForeignEntry
from tools.foreign.vllm_fs import VllmFsStore
from tools.plan.trace import read_trace
from tools.timeline import timeline

DEFAULT_S = 60.0
MOST_NBYTES = 2 << 30
SLOW_S = 5.0
FMT = SlotFormat.of(IDENTITY, 2)


def slot_trailer(data: bytes, folder: Path) -> None:
    rows = np.zeros((1, FMT.slot_nbytes), dtype=np.uint8)
    tail = np.frombuffer(data[: FMT.trailer_nbytes].ljust(FMT.trailer_nbytes, b"\0"), dtype=np.uint8)
    rows[0, FMT.body_nbytes :] = tail
    SlotCodec(FMT).verify(rows, np.arange(1), IDENTITY.namespace())


def description(data: bytes, folder: Path) -> None:
    found = json.loads(data)
    StoredFormat.of(found.get("content"), found.get("placed")).identity()


def directory_header(data: bytes, folder: Path) -> None:
    (folder / "store.json").write_bytes(data)
    read_header(folder)


def prefix_file(data: bytes, folder: Path) -> None:
    (folder / "file").write_bytes(data)
    file = PrefixFile(folder / "file")
    for i in range(len(file.keys)):
        file.block(i)
    file.close()


def index_dump(data: bytes, folder: Path) -> None:
    frames = _Frames(RecordFormat.of(2))
    for at in range(0, len(data), 777):
        frames.feed(data[at : at + 777])


def control_message(data: bytes, folder: Path) -> None:
    for kinds in (REQUESTS, ANSWERS):
        msgspec.msgpack.Decoder(kinds).decode(data)


def registration(data: bytes, folder: Path) -> None:
    msgspec.json.decode(data, type=Joins)


def trace(data: bytes, folder: Path) -> None:
    (folder / "trace").write_bytes(data)
    read_trace(folder / "trace")


def journal(data: bytes, folder: Path) -> None:
    view = JournalView.of(segment_with(folder / "journal", data))
    view.asked_by_node()
    view.hits_by_node()
    for request in view.requests:
        view.path_to(request.last)
    with suppress(ConfigError):
        timeline(view)


def journal_record(data: bytes, folder: Path) -> None:
    """As `journal`, behind a checksum that is right."""
    journal(GOOD + packed(data), folder)


def safetensors_header(data: bytes, folder: Path) -> None:
    parse_header(data, 8)


def fs_config(data: bytes, folder: Path) -> None:
    """vLLM's own fs tier, and a file of it."""
    base = folder / "m_0123456789ab"
    base.mkdir(exist_ok=True)
    (base / "config.json").write_bytes(data)
    store = VllmFsStore(base)
    store.parts(ForeignEntry("0" * 64, folder / "m_0123456789ab_r0/000/00_g0/x.bin", 8192, 0))


def tokens(data: bytes, folder: Path) -> None:
    (folder / "tokens").write_bytes(data)
    Choice(tokens_file=folder / "tokens").of_prompt(StoredFormat.of(IDENTITY.content(), IDENTITY.placed(2)))


def sealed() -> bytes:
    rows = np.zeros((1, FMT.slot_nbytes), dtype=np.uint8)
    keys = np.ones((1, 2, 36), dtype=np.uint8)
    SlotCodec(FMT).seal(rows, np.arange(1), keys, IDENTITY.namespace(), np.ones(1, dtype=np.uint64))
    return rows[0, FMT.body_nbytes :].tobytes()


def header() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        made = DirectoryHeader(content=IDENTITY.content(), placement=IDENTITY.placed(2), slot_nbytes=FMT.slot_nbytes,
                               num_slots=10)  # fmt: skip
        write_header(Path(folder), made)
        return (Path(folder) / "store.json").read_bytes()


def dump() -> bytes:
    size = RecordFormat.of(2).record_nbytes
    return b"".join(
        (8).to_bytes(4, "little") + size.to_bytes(4, "little") + i.to_bytes(8, "little") + bytes([i]) * size
        for i in range(5)
    )


def prefix() -> bytes:
    made = PrefixHeader.of(IDENTITY, 2)
    return made.pack() + bytes(made.data_nbytes)


_REFUSED = (ValueError, AttributeError, RecursionError, KVStoreError)
PLACED = {"content": IDENTITY.content(), "placed": IDENTITY.placed(2)}
JOINS = Joins(role="decode", url="http://127.0.0.1:1", lease_s=5.0)
# What is fed, sound inputs, and how each may refuse.
TARGETS: dict[str, tuple[Callable[[bytes, Path], None], list[bytes], tuple[type[BaseException], ...]]] = {
    "slot_trailer": (slot_trailer, [sealed()], ()),
    "description": (description, [json.dumps(PLACED).encode()], _REFUSED),
    "directory_header": (directory_header, [header()], ()),
    "prefix_file": (prefix_file, [prefix()], (KVStoreError,)),
    "index_dump": (index_dump, [dump()], ()),
    "control_message": (
        control_message,
        [
            msgspec.msgpack.encode(Select(b"n" * 16, b"k" * 72, 1.0)),
            msgspec.msgpack.encode(Reserve(b"n" * 16, b"", 1.0)),
        ],
        (msgspec.MsgspecError, RecursionError, UnicodeDecodeError),
    ),
    "registration": (
        registration,
        [msgspec.json.encode(JOINS)],
        (msgspec.MsgspecError, RecursionError, UnicodeDecodeError),
    ),
    "trace": (trace, [b'{"timestamp": 1, "hash_ids": [0, 1, 2]}\n{"hash_ids": [0, 5]}\n'], (KVStoreError,)),
    "journal": (journal, [GOOD + frame(ASKED)], ()),
    "journal_record": (journal_record, [frame(ASKED)[12:], frame(OPENED)[12:]], ()),
    "safetensors_header": (
        safetensors_header,
        [b'{"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}, "__metadata__": {"x": "y"}}'],
        (KVStoreError,),
    ),
    "fs_config": (fs_config, [json.dumps(FS_CONFIG).encode()], (KVStoreError,)),
    "tokens": (tokens, [b"[0, 1, 2, 3, 4, 5, 6, 7, 8]"], (KVStoreError,)),
}


def changed(data: bytes, rng: random.Random) -> bytes:
    """Some bytes of it changed, cut, repeated or swapped."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not made:
            break
        at, n = rng.randrange(len(made)), rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                made[at] ^= 1 << rng.randrange(8)
            case 1:
                made[at : at + n] = rng.randbytes(n)
            case 2:
                made[at : at + n] = rng.choice((b"\xff", b"\0", b"[", b'{"', b"9", b"-1", b"NaN", b"1e999")) * n
            case 3:
                del made[at : at + n]
            case 4:
                made[at:at] = made[at : at + n] * rng.choice((1, 2, 100))
            case 5:
                del made[at:]
            case _:
                other = rng.randrange(len(made))
                made[at], made[other] = made[other], made[at]
    return bytes(made)


def fuzz(seconds: float, seed: int) -> int:
    """Every target for its share of the time; how many inputs were fed. Raises what a target should not have."""
    rng, fed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder, Progress(disable=not sys.stderr.isatty()) as bar:
        for name, (target, seeds, refusals) in TARGETS.items():
            until, task = time.monotonic() + seconds / len(TARGETS), bar.add_task(name, total=None)
            while time.monotonic() < until:
                data, begun = changed(rng.choice(seeds), rng), time.monotonic()
                try:
                    target(data, Path(folder))
                    if time.monotonic() - begun > SLOW_S:
                        raise TimeoutError(f"{name} took {time.monotonic() - begun:.0f} s")
                except refusals:
                    pass
                except BaseException:
                    Path(f"fuzz-{name}.bin").write_bytes(data)
                    raise
                fed += 1
                bar.advance(task)
    return fed


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_NBYTES, MOST_NBYTES))
    chosen = time.time_ns() & 0xFFFF
    print(f"seed {chosen}", flush=True)
    print(
        f"{fuzz(float(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_S, chosen):,} inputs, none of which did any harm"
    )
