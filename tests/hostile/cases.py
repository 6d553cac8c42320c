"""Files and folders that someone wrote who means harm. Each case fills a folder of its own:

    kv/                 a PATH for every command (made from a sound store where not said otherwise)
    file                what is given as a dump
    tokens.json, keys, model/tokenizer.json     what says which blocks
    journal/            what is given as a journal
    trace               what is given as a trace

Nothing of them may end in a traceback, in much memory, or in a file that is written elsewhere.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from kvstore.journal import MAGIC, Moved, Sample, frame
from kvstore.prefix_file import PrefixHeader
from tests.foreign import LAYERS, example_store, fs_store
from tests.small import IDENTITY, small_keys
from tests.test_journal import ASKED as ASKED_RECORD
from tests.test_journal import GOOD, OPENED, packed, segment_with
from tests.test_safetensors_header import BAD, file_of, tensor
from tests.tiers.test_large_chunks import describe_huge_slots, make_huge_file

Case = Callable[[Path], None]
OUTSIDE: Final = "../outside"  # as seen from a case: what must never be touched
KEY: Final = str(small_keys()[0])
STORES: dict[str, Case] = {}
DUMPS: dict[str, Case] = {}
ASKED: dict[str, Case] = {}
JOURNALS: dict[str, Case] = {}
TRACES: dict[str, Case] = {}


def of_store(case: Case) -> Case:
    """``kv`` is there, sound; the case spoils it."""
    STORES[case.__name__] = case
    return case


# -- a disk tier's directory


def _json(name: str, text: bytes) -> None:
    def spoil(folder: Path) -> None:
        (folder / "kv/disk/store.json").write_bytes(text)
        for file in (*folder.glob("kv/shared/*/namespace.json"), *folder.glob("kv/shared/*/*/placement.json")):
            file.write_bytes(text)

    STORES[f"description {name}"] = spoil


_json("deep", b"[" * 500_000)
_json("deep mapping", b'{"content":' * 50_000)
_json("NaN", b'{"format": "kvstore disk tier", "content": {"block_size": NaN}, "placement": {}}')
_json("not UTF-8", b'{"format": "\xff\xfe"}')
_json("long list", b"[" + b"0," * 1_000_000 + b"0]")
_json("oversized", b'{"content": "' + b"x" * (32 << 20) + b'"}')
_json("long number", b'{"num_slots": ' + b"9" * 100_000 + b"}")
_json("empty", b"")


def _field(name: str, part: str, field: str, value: Any) -> None:
    def spoil(folder: Path) -> None:
        path = folder / "kv/disk/store.json"
        raw = json.loads(path.read_text())
        (raw[part] if part else raw)[field] = value
        path.write_text(json.dumps(raw))

    STORES[f"field {name}"] = spoil


_field("layers", "placement", "num_layers", 10**9)
_field("heads", "placement", "num_kv_heads", -1)
_field("ranks", "placement", "tp_size", 10**9)
_field("block", "content", "block_size", 10**18)
_field("slots", "", "num_slots", 10**18)
_field("a list", "content", "head_size", [8])
_field("out of the tree", "content", "model", "../../outside/\x00\x1b[2J")
_field("byte layout", "placement", "byte_layout", "vllm 0.32 cpu LBHNC amx " + "x" * 10_000)


@of_store
def duplicate_names(folder: Path) -> None:
    path = folder / "kv/disk/store.json"
    path.write_text(path.read_text().rstrip()[:-1] + ', "num_slots": 1}')


@of_store
def huge_slots(folder: Path) -> None:
    describe_huge_slots(folder / "kv/disk")


@of_store
def garbage_index(folder: Path) -> None:
    with (folder / "kv/disk/index/data.mdb").open("r+b") as f:
        f.write(os.urandom(1 << 14))
    os.truncate(folder / "kv/disk/index/data.mdb", 1 << 40)


@of_store
def garbage_data(folder: Path) -> None:
    nbytes = (folder / "kv/disk/data").stat().st_size
    (folder / "kv/disk/data").write_bytes(os.urandom(1 << 20))
    os.truncate(folder / "kv/disk/data", nbytes)


@of_store
def symlinks_out_of_the_tree(folder: Path) -> None:
    for name in ("kv/disk/data", "kv/disk/store.json", "kv/disk/index/data.mdb", "kv/disk/locks"):
        (folder / name).unlink()
        (folder / name).symlink_to(folder / OUTSIDE / "file")
    shutil.rmtree(folder / "kv/shared")
    (folder / "kv/shared").symlink_to(folder / OUTSIDE)


@of_store
def symlinked_chunks(folder: Path) -> None:
    for file in (folder / "kv/shared").rglob("*.safetensors"):
        file.unlink()
        file.symlink_to(folder / OUTSIDE / "file")
    (folder / "kv/shared" / ("f" * 32)).symlink_to(folder / OUTSIDE)
    shutil.rmtree(folder / "kv/disk")


@of_store
def devices_and_pipes(folder: Path) -> None:
    for file in (folder / "kv/shared").rglob("*.safetensors"):
        file.unlink()
        os.mkfifo(file)
    for name in ("kv/disk/data", "kv/disk/store.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)


@of_store
def endless_device(folder: Path) -> None:
    (folder / "kv/disk/store.json").unlink()
    (folder / "kv/disk/store.json").symlink_to("/dev/zero")


# -- a shared path


@of_store
def huge_chunk(folder: Path) -> None:
    make_huge_file(folder / "kv/shared")


def _headers(name: str, text: bytes) -> None:
    def spoil(folder: Path) -> None:
        for file in (folder / "kv/shared").rglob("*.safetensors"):
            file.write_bytes(file_of(text, bytes(64)))

    STORES[f"chunk with header {name}"] = spoil


_headers("deep", BAD["deep"])
_headers("bomb", BAD["bomb"])


@of_store
def names_that_climb(folder: Path) -> None:
    for placed in (folder / "kv/shared").glob("*/*"):
        if placed.is_dir():
            for name in ("..%2f..%2foutside", "..", "\udcff" * 20, "-" * 255, "x\n\x1b[2J"):
                (placed / "00").mkdir(exist_ok=True)
                if name != "..":
                    (placed / "00" / name).touch()
                    (placed / f"{name}x"[:200]).mkdir(exist_ok=True)
    for file in (folder / "kv/shared").rglob("*.safetensors"):
        os.truncate(file, 1 << 40)


# -- other systems


def _example(name: str, text: bytes, length: int | None = None) -> None:
    def make(folder: Path) -> None:
        shutil.rmtree(folder / "kv")
        example_store(folder / "kv")
        for prompt in (folder / "kv").iterdir():
            prompt.rename(folder / "kv" / ("0" + prompt.name[1:]))
        for file in (folder / "kv").rglob("*.safetensors"):
            file.write_bytes(file_of(text, bytes(8)))
            if length is not None:
                os.truncate(file, length)
        (folder / "key").write_text(next((folder / "kv").iterdir()).name)

    STORES[f"vllm-example {name}"] = make


for _name in ("deep", "bomb", "twice", "overlap", "negative", "not UTF-8"):  # the rest: as dumps
    _example(_name, BAD[_name])
_example("sparse", json.dumps({"kv_cache": tensor(0, 1 << 42, shape=[1 << 40, 2, 2])}).encode(), 1 << 40)
_example("deep shape", json.dumps({"kv_cache": tensor(0, 8, shape=[1] * 7 + [8])}).encode())


@of_store
def vllm_example_out_of_the_tree(folder: Path) -> None:
    shutil.rmtree(folder / "kv")
    example_store(folder / "kv")
    prompt = next((folder / "kv").iterdir())
    (prompt / f"{LAYERS[0]}.safetensors").unlink()
    (prompt / f"{LAYERS[0]}.safetensors").symlink_to(folder / OUTSIDE / "file")
    (prompt / "..%2f..%2foutside.safetensors").write_bytes(file_of(b"{}"))
    (folder / "kv" / ("e" * 32)).symlink_to(folder / OUTSIDE)
    (folder / "key").write_text(prompt.name)


def _fs(name: str, **changes: Any) -> None:
    def make(folder: Path) -> None:
        shutil.rmtree(folder / "kv")
        fs_store(folder / "kv", 1, **changes)
        (file,) = (folder / "kv").rglob("*.bin")
        (folder / "key").write_text(file.stem)
        os.truncate(file, 8191)

    STORES[f"vllm-fs {name}"] = make


_fs("huge", tp_size=1 << 20, blocks_per_file=1 << 20)
_fs("layers", kv_cache_groups=[{"tokens_per_block": 1 << 20, "layer_names": ["\x1b[2J../../outside"] * 4096}])
_fs("types", kv_cache_groups=[{"tokens_per_block": [1], "layer_names": {"a": 1}}])
_fs("groups", kv_cache_groups=[7, None, {"tokens_per_block": 16}], dtype={"a": 1}, model_name="x\x1b[2J")
_fs("tokens", kv_cache_groups=[{"tokens_per_block": "16", "layer_names": [1, None, {}]}])
_fs("zero", blocks_per_file=0)


# -- dumps


def _dump(name: str, data: bytes, length: int | None = None) -> None:
    def make(folder: Path) -> None:
        (folder / "file").write_bytes(data)
        if length is not None:
            os.truncate(folder / "file", length)

    DUMPS[name] = make


def _as_dump(num_blocks: int, **changes: Any) -> bytes:
    """A dump's header, whatever its metadata says; behind it zeros, where they are few.

    Args:
        changes: to fields of ``content`` or ``placement``, or a whole text as ``placement_text``.
    """
    made = PrefixHeader.of(IDENTITY, num_blocks)
    fields = made.fields()
    content, placement = {**made.content, **changes.get("content", {})}, {**made.placed, **changes.get("placement", {})}
    fields["__metadata__"]["identity"] = json.dumps(content, sort_keys=True, separators=(",", ":"))
    text = json.dumps(placement, sort_keys=True, separators=(",", ":"))
    fields["__metadata__"]["placement"] = changes.get("placement_text", text)
    return file_of(json.dumps(fields).encode(), bytes(made.data_nbytes) if made.data_nbytes < 1 << 20 else b"")


for _name, _text in BAD.items():
    _dump(f"header {_name}", file_of(_text, bytes(8)))
_dump("empty", b"")
_dump("length", (1 << 63).to_bytes(8, "little"))
_dump("oversized header", (32 << 20).to_bytes(8, "little") + b"{" + b" " * (32 << 20))
_dump("another's file", file_of(json.dumps({"x": tensor(0, 8)}).encode(), bytes(8)))
_dump("no identity", _as_dump(1, content={"head_size": "x"}))
_dump("another's identity", _as_dump(1, content={"nested": "x", "model": "../../outside"}))
_dump("content deep", _as_dump(1, placement_text="[" * 100_000))
_dump("content not UTF-8", _as_dump(1, placement_text="\ud800"))
_dump("huge identity", _as_dump(1, placement={"num_layers": 4096, "num_kv_heads": 1 << 20}))
_dump("blocks", _as_dump(1 << 26), 1 << 40)
_dump("sound, of zeros", _as_dump(2))


# -- what says which blocks


def _asked(name: str, file: str, data: bytes, length: int | None = None) -> None:
    def make(folder: Path) -> None:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_bytes(data)
        if length is not None:
            os.truncate(folder / file, length)

    ASKED[f"{file} {name}"] = make


_asked("long list", "tokens.json", b"[" + b"0," * (4_000_000 - 1) + b"0]")
_asked("longer list", "tokens.json", b"[" + b"0," * 20_000_000 + b"0]")
_asked("10^9 elements", "tokens.json", b"[", 2 * 10**9)
_asked("deep", "tokens.json", b"[" * 1_000_000)
_asked("NaN", "tokens.json", b"[NaN]")
_asked("negative", "tokens.json", b"[-1]")
_asked("too large", "tokens.json", b"[" + b"9" * 5000 + b"]")
_asked("not UTF-8", "tokens.json", b'["\xff"]')
_asked("bytes", "tokens.json", bytes(range(256)))
_asked("mapping", "tokens.json", b'{"a": [1]}')
_asked("many", "keys", b"0\n" * 4_000_000)
_asked("more", "keys", b"0\n" * 40_000_000)
_asked("many starts", "keys", b"\n".join(b"%06x" % i for i in range(100_000)))
_asked("a long one", "keys", b"f" * 8_000_000)
_asked("not UTF-8", "keys", b"\xff\xfe\x00")
_asked("climbs", "keys", b"../../outside\n")
_asked("deep", "model/tokenizer.json", b"[" * 1_000_000)
_asked("empty", "model/tokenizer.json", b"{}")
_asked("oversized", "model/tokenizer.json", b"{", 1 << 40)
_asked("not UTF-8", "model/tokenizer.json", b'{"version": "\xff"}')
for _id in (-1, 4294967295):
    _words = {"type": "WordLevel", "vocab": {"a": _id}, "unk_token": "a"}
    _asked(f"id {_id}", "model/tokenizer.json", json.dumps({"version": "1.0", "model": _words}).encode())


# -- journals


def _journal(name: str, *records: bytes, length: int | None = None) -> None:
    def make(folder: Path) -> None:
        segment_with(folder / "journal", b"".join(records))
        if length is not None:
            os.truncate(next((folder / "journal").iterdir()), length)

    JOURNALS[name] = make


def _asked_with(**changes: Any) -> bytes:
    return frame(msgspec.structs.replace(ASKED_RECORD, **changes))


def _opened_with(**changes: Any) -> bytes:
    return MAGIC + frame(msgspec.structs.replace(OPENED, **changes))


_HASHES = b"".join(i.to_bytes(32, "big") for i in range(1000))
_SAMPLE = {
    "used_nbytes": float("inf"),
    "capacity_nbytes": float("nan"),
    "is_on": -1e308,
    "pinned_blocks": float("-inf"),
}
_journal("huge length", GOOD, (1 << 31).to_bytes(4, "little"), bytes(8))
_journal("sparse", GOOD, length=1 << 40)
_journal("array", GOOD, packed(b"\xdd\xff\xff\xff\xff"))
_journal("deep", GOOD, packed(b"\x91" * 500_000))
_journal("content deep", _opened_with(content={"a": "b" * 100_000, "block_size": 10**18}), _asked_with())
_journal("content types", _opened_with(content={"block_size": [1]}, placed={"x": None}), _asked_with(hashes=_HASHES))
_journal("no request", GOOD)
_journal("more hits than blocks", GOOD, _asked_with(hits={"host": 1 << 60, "disk": 1 << 61}))
_journal("tiers' names", GOOD, _asked_with(hits={"\x1b[2J": 1, "../../outside": 2, "": 3}))
_journal("names", _opened_with(who="\x1b[2J[red]<b>"), _asked_with(request="r/../../o\x00\x1b[2J", tenant="a" * 64))
_journal("depth", GOOD, _asked_with(depth=1 << 61, num_tokens=1 << 61), _asked_with(depth=5, parent=b"x" * 32))
_journal("circle", GOOD, _asked_with(depth=99, hashes=_HASHES[:64]),
         _asked_with(parent=_HASHES[32:64], hashes=b"y" * 32),
         _asked_with(depth=99, parent=b"y" * 32, hashes=_HASHES[:64]))  # fmt: skip
_journal("times", GOOD, _asked_with(t_ns=1 << 61, hashes=_HASHES), _asked_with(t_ns=0), frame(OPENED))
_journal("numbers", GOOD, frame(Sample(t_ns=5, tiers={"host": _SAMPLE, "x" * 64: {"used_nbytes": 1e308}})),
         _asked_with(waited_s=1e9), frame(Sample(t_ns=6, tiers={"host": {}})))  # fmt: skip
_journal(
    "odd lengths", GOOD, _asked_with(hashes=b"h" * 63), frame(Moved(t_ns=3, tier="disk", why="", ids=b"123456789"))
)
_journal("a reason", GOOD, _asked_with(), frame(Moved(t_ns=3, tier="disk", why="[red]\x1b", ids=bytes(800))))
_journal("a long prompt", GOOD, *[_asked_with(request=f"r{i}", hashes=_HASHES, hits={"host": i}) for i in range(300)])


_NOW = time.time_ns()
_FORMULA = "$\\frac{1$"
_FULL = {"used_nbytes": 1e6, "capacity_nbytes": 5e6}
_journal("formulas", GOOD, _asked_with(t_ns=_NOW, hits={_FORMULA: 1}, hashes=_HASHES),
         *[frame(Sample(t_ns=_NOW + i, tiers={_FORMULA: _FULL, "host": _FULL})) for i in range(3)])  # fmt: skip
_journal("letters", GOOD, frame(Sample(t_ns=_NOW, tiers={"\x1b]0;\x07\u202e\U0010ffff": _FULL})),
         _asked_with(t_ns=_NOW, hits={"\x1b[2J\x07": 1}, hashes=_HASHES))  # fmt: skip
_journal("sizes", GOOD, _asked_with(t_ns=_NOW, num_tokens=1 << 62, depth=1 << 61, hits={"host": 1 << 62}),
         *[frame(Sample(t_ns=_NOW + i, tiers={"host": {"used_nbytes": used, "capacity_nbytes": capacity}}))
           for i, used in enumerate((1e308, float("nan"), -1e308, 5e-324, 1e6))
           for capacity in (float("inf"), 1e308, 0.0, 5e-324, 5e6)],
         frame(Sample(t_ns=1 << 62, tiers={"host": _FULL})),
         frame(Sample(t_ns=_NOW, tiers={"disk": _FULL})))  # fmt: skip


def _links(folder: Path) -> None:
    segment_with(folder / "journal", GOOD + _asked_with())
    (folder / "journal" / f"{2:020d}-1-00000000.kvj").symlink_to(folder / OUTSIDE / "file")
    os.mkfifo(folder / "journal" / f"{3:020d}-1-00000000.kvj")
    (folder / "journal" / f"{4:020d}-1-00000000.kvj").symlink_to("/dev/zero")


JOURNALS["links and pipes"] = _links


# -- traces


def _trace(name: str, data: bytes, length: int | None = None) -> None:
    def make(folder: Path) -> None:
        (folder / "trace").write_bytes(data)
        if length is not None:
            os.truncate(folder / "trace", length)

    TRACES[name] = make


_trace("10^9 elements", b'{"hash_ids": [', 2 * 10**9)
_trace("long line", b'{"hash_ids": [' + b"0," * 10_000_000 + b"0]}")
_trace("deep", b"[" * 1_000_000)
_trace("NaN", b'{"hash_ids": [NaN]}')
_trace("negative", b'{"hash_ids": [-1]}')
_trace("too large", b'{"hash_ids": [' + b"9" * 5000 + b"]}")
_trace("not UTF-8", b'{"hash_ids": ["\xff"]}')
_trace("no requests", b"\n" * 1000)
_trace("names twice", b'{"hash_ids": [1], "hash_ids": [2, 3]}')
_trace("empty requests", b'{"hash_ids": []}\n' * 1000)
