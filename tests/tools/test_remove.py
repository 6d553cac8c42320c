"""gc, purge and stat: what is to go goes for good, nothing else does, beside stores that run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore import HostTierConfig, SharedTierConfig, StoreConfig, TieredStore, hash_blocks
from kvstore.config import DiskTierConfig
from tests.small import IDENTITY, LAYOUT, NUM_BLOCKS, copy_store, fill, small_blocks, small_config, small_keys
from tests.tools.test_cli import kvstore, kvstore_json, tree
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kv(small_store: Path, tmp_path: Path) -> Path:
    return copy_store(small_store, tmp_path / "kv")


def stored(path: Path) -> dict[str, int]:
    """Chunks by tier."""
    found: dict[str, int] = {}
    for row in kvstore_json("ls", path)["namespaces"]:
        found[row["tier"]] = found.get(row["tier"], 0) + row["chunks"]
    return found


def is_sound(path: Path) -> bool:
    return bool(kvstore_json("verify", path)["ok"])


def prefix_hit(config: StoreConfig, keys: list[Any]) -> int:
    with TieredStore(config) as store:
        return store.prefix_hit(keys)


def test_a_dry_run_changes_nothing(kv: Path) -> None:
    before = tree(kv)
    for command in (["purge", kv, "--all"], ["gc", kv, "--older-than", "0s"], ["gc", kv, "--max-bytes", "1"]):
        said = kvstore_json(*command, "--dry-run")
        assert said["dry_run"] and sum(part["blocks"] for part in said["removed"]) == 3 * NUM_BLOCKS
    assert tree(kv) == before


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_a_block_is_purged_for_good(kv: Path, tier: str) -> None:
    key = small_keys()[5]
    said = kvstore_json("purge", kv / tier, "--key", key, "--yes")
    (part,) = said["removed"]
    assert (part["tier"], part["chunks"], part["blocks"]) == (tier, 1, 2)  # its chunk goes as a whole
    assert is_sound(kv / tier)
    config = small_config(**{tier: kv / tier})
    assert prefix_hit(config, small_keys()) == 4
    if tier == "disk":
        for file in (kv / "disk" / "index").iterdir():
            file.unlink()
        assert prefix_hit(config, small_keys()) == 4  # no rebuild brings it back
        assert prefix_hit(config, small_keys()[6:]) == NUM_BLOCKS - 6
    else:
        assert not list((kv / "shared" / IDENTITY.namespace().hex()).rglob(f"{key}*"))


def test_a_prompt_a_model_a_namespace(kv: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.json"
    prompt.write_text(json.dumps(list(range(20))))
    before = stored(kv)
    kvstore_json("purge", kv, "--tokens", prompt, "--yes")
    assert stored(kv) == {"disk": before["disk"] - 3, "shared": before["shared"] - 6}  # of two models
    other = next(row for row in kvstore_json("ls", kv)["namespaces"] if row["model"] != IDENTITY.model)
    kvstore_json("purge", kv, "--model", other["model"], "--yes")
    assert {row["model"] for row in kvstore_json("ls", kv)["namespaces"]} == {IDENTITY.model}
    kvstore_json("purge", kv, "--namespace", IDENTITY.namespace().hex()[:8], "--yes")
    assert kvstore_json("ls", kv)["namespaces"] == []
    assert is_sound(kv)


def test_nobody_is_asked_and_nothing_given(kv: Path) -> None:
    before = tree(kv)
    code, _, err = kvstore("purge", kv, "--all")
    assert code == 2 and "--yes" in err
    for command in ("purge", "gc"):
        code, _, err = kvstore(command, kv)
        assert code == 2 and "say what is to go" in err
    for option, value in (("--max-bytes", "much"), ("--older-than", "yesterday"), ("--max-bytes", "-1")):
        code, _, err = kvstore("gc", kv, f"{option}={value}")
        assert code == 2 and option in err
    assert tree(kv) == before


def test_gc_by_size_takes_the_oldest(tmp_path: Path) -> None:
    for tier in ("disk", "shared"):
        config = small_config(**{tier: tmp_path / tier})
        with TieredStore(config) as store:
            for i in range(0, NUM_BLOCKS, 2):
                store.put(small_keys()[: i + 2], small_blocks()[: i + 2])
                assert store.flush()
                time.sleep(0.01)
        if tier == "shared":
            names = {key: next((tmp_path / tier).rglob(f"{key}*")) for key in small_keys()}
            for i, key in enumerate(small_keys()):
                os.utime(names[key], (1e9 + i // 2, 1e9 + i // 2))
        chunk = kvstore_json("ls", tmp_path / tier)["namespaces"][0]["nbytes"] // 6
        said = kvstore_json("gc", tmp_path / tier, "--max-bytes", 2 * chunk + chunk // 2)
        assert said["removed"][0]["chunks"] == 4  # down to what fits
        assert prefix_hit(config, small_keys()) == 0
        assert prefix_hit(config, small_keys()[8:]) == 4
        assert is_sound(tmp_path / tier)


def test_gc_by_age_and_epoch(tmp_path: Path) -> None:
    config = small_config(disk=tmp_path / "disk", shared=tmp_path / "shared")
    with TieredStore(config) as store, TieredStore(config) as other:
        store.put(small_keys(), small_blocks())
        store.flush()
        other.reset()
        other.put(small_keys(), small_blocks())
        other.flush()
    assert stored(tmp_path) == {"disk": 12, "shared": 12}
    assert sum(part["chunks"] for part in kvstore_json("gc", tmp_path, "--older-than", "1h")["removed"]) == 0
    kvstore_json("gc", tmp_path, "--old-epochs")
    assert stored(tmp_path) == {"disk": 6, "shared": 6}
    assert prefix_hit(config, small_keys()) == NUM_BLOCKS
    kvstore_json("gc", tmp_path, "--older-than", "0s", "--tier", "disk")
    assert stored(tmp_path) == {"shared": 6}


STORE = """
import sys, torch
from tests.tools.test_remove import run
run(sys.argv[1], int(sys.argv[2]))
"""


def wide_config(path: Path) -> StoreConfig:
    layout = dataclasses.replace(LAYOUT, head_size=64)
    return StoreConfig(
        identity=dataclasses.replace(IDENTITY, layout=layout),
        host=HostTierConfig(num_blocks=64),
        disk=DiskTierConfig(path=str(path / "disk"), num_blocks=256),
        shared=SharedTierConfig(path=str(path / "shared"), capacity_nbytes=64 << 20),
    )


def run(path: str, seed: int) -> None:
    """Put and get until stdin is closed; every byte that comes is checked."""
    config = wide_config(Path(path))
    generator, rounds = torch.Generator().manual_seed(seed), 0
    import select

    with TieredStore(config) as store:
        shape = config.identity.layout.block_shape
        while not select.select([sys.stdin], [], [], 0)[0]:
            n = int(torch.randint(4, 24, (1,), generator=generator))
            start = int(torch.randint(0, 40, (1,), generator=generator)) * 1000
            keys = hash_blocks(range(start, start + 4 * n), 4, config.identity)
            blocks = torch.stack([torch.full(shape, float(key[0]), dtype=LAYOUT.dtype) for key in keys])
            out = torch.zeros_like(blocks)
            found = store.get(keys, out)
            assert torch.equal(out[:found], blocks[:found])
            store.put(keys, blocks)
            rounds += 1
            if rounds == 5:
                print("running", flush=True)
        store.flush()  # False where write-behind had to drop some, so fast as this is
        print(f"rounds {rounds} {store.stats().tiers['disk'].corrupt_chunks}", flush=True)


def test_beside_stores_that_put_and_get(tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    stores = [subprocess.Popen([sys.executable, "-c", STORE, str(tmp_path), str(seed)], **pipes) for seed in (1, 2)]
    try:
        for store in stores:
            assert store.stdout is not None and store.stdout.readline() == "running\n"
        for i in range(6):
            keys = hash_blocks(range(i * 1000, i * 1000 + 32), 4, wide_config(tmp_path).identity)
            (tmp_path / "keys").write_text("\n".join(map(str, keys[:1])))
            kvstore("purge", tmp_path, "--keys", tmp_path / "keys", "--yes")  # there or not
            kvstore_json("gc", tmp_path, "--max-bytes", "200KB")
            assert {line["state"] for line in kvstore_json("stat", tmp_path)["tiers"] if line["tier"] == "disk"} == {
                "in use"
            }
        for store in stores:
            out, _ = store.communicate("\n", timeout=60)
            assert store.returncode == 0
            rounds, corrupt = out.split()[1:]
            assert int(rounds) > 5 and int(corrupt) == 0
    finally:
        for store in stores:
            store.kill()
            store.communicate()
    assert is_sound(tmp_path)
    kvstore_json("purge", tmp_path, "--all", "--yes")
    assert kvstore_json("ls", tmp_path)["namespaces"] == []


def test_interrupted(tmp_path: Path) -> None:
    """By a real SIGINT: what has gone is said, the rest is as it was."""
    fill(small_config(shared=tmp_path / "shared"))
    code = (
        "import kvstore.tiers.removal as r, signal, tools.cli, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
        "unlink = r._unlink\n"
        "def slow(chunk):\n"
        "    gone = unlink(chunk); print('one', flush=True); time.sleep(0.5); return gone\n"
        "r._unlink = slow\n"
        "tools.cli.main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "purge", str(tmp_path), "--all", "--yes", "--json"], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline() == "one\n"
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    said = json.loads(out[out.index("{") :])
    assert process.returncode == 130 and not said["whole"]
    assert stored(tmp_path)["shared"] == 6 - 2
    assert 1 <= said["removed"][0]["chunks"] <= 2
    assert is_sound(tmp_path)


def test_after_a_sigkill(tmp_path: Path) -> None:
    """A purge that is killed at any moment leaves a directory that a store opens."""
    config = small_config(disk=tmp_path / "disk")
    for delay_s in (0.0, 0.4, 0.8, 1.2):
        fill(config)
        process = subprocess.Popen(
            [sys.executable, "-c", "import tools.cli; tools.cli.main()", "purge", str(tmp_path), "--all", "--yes"],
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        time.sleep(delay_s)
        process.kill()
        process.wait()
        with TieredStore(config) as store:
            out = torch.zeros_like(small_blocks())
            found = store.get(small_keys(), out)
            assert torch.equal(out[:found], small_blocks()[:found])


@pytest.mark.parametrize("damage", ["truncate", "zero", "noise"])
def test_a_damaged_index_takes_no_command_down(kv: Path, damage: str) -> None:
    file = kv / "disk" / "index" / "data.mdb"
    data = bytearray(file.read_bytes())
    if damage == "truncate":
        data = data[: len(data) // 2]
    elif damage == "zero":
        data[4096:] = bytes(len(data) - 4096)
    else:
        data[100:] = os.urandom(len(data) - 100)
    file.write_bytes(data)
    for command in (["ls"], ["stat"], ["inspect"], ["purge", "--all", "--yes"], ["gc", "--max-bytes", "1"]):
        code, out, err = kvstore(command[0], kv / "disk", *command[1:])
        assert code in (0, 1, 2) and "Traceback" not in out + err
        if command[0] in ("ls", "stat"):
            assert "index" in out


def test_stat(kv: Path) -> None:
    lines = {line["tier"]: line for line in kvstore_json("stat", kv)["tiers"]}
    assert lines["disk"]["blocks"] == NUM_BLOCKS and lines["disk"]["state"] == "idle"
    assert 0 < lines["disk"]["used_nbytes"] <= lines["disk"]["capacity_nbytes"]
    assert lines["shared"]["capacity_nbytes"] is None and lines["shared"]["namespaces"] == 2
    with TieredStore(small_config(disk=kv / "disk")):
        wait_until(lambda: kvstore_json("stat", kv / "disk")["tiers"][0]["state"] == "in use")


def test_symlinks_are_not_followed(kv: Path, tmp_path: Path) -> None:
    """A folder of chunks that leads elsewhere: what lies there stays."""
    folder = next((kv / "shared" / IDENTITY.namespace().hex()).rglob("*.safetensors")).parent
    outside = tmp_path / "outside"
    folder.rename(outside)
    folder.symlink_to(outside)
    before = tree(outside)
    kvstore_json("purge", kv / "shared", "--all", "--yes")
    assert tree(outside) == before


@pytest.mark.parametrize("name", ["index", "index/data.mdb", "index/lock.mdb", "data", "locks", "store.json"])
@pytest.mark.parametrize("kind", ["symlink", "second name"])
def test_nothing_is_written_through_a_link(kv: Path, tmp_path: Path, name: str, kind: str) -> None:
    inside, outside = kv / "disk" / name, tmp_path / "outside"
    if kind == "symlink":
        inside.rename(outside)
        inside.symlink_to(outside)
    elif inside.is_file():
        outside.hardlink_to(inside)
    else:
        return
    before = tree(tmp_path)
    for command in (["purge", kv / "disk", "--all", "--yes"], ["gc", kv / "disk", "--older-than", "0s"],
                    ["verify", kv / "disk", "--repair"]):  # fmt: skip
        code, out, err = kvstore(*command)
        is_told = (code == 2 and "link" in err) or "problem in" in out
        assert is_told or command[0] == "verify" or name == "store.json", (command, code, out, err)
        assert tree(tmp_path) == before


def test_an_empty_shared_path_has_nothing_to_remove(tmp_path: Path) -> None:
    with TieredStore(small_config(shared=tmp_path / "shared")):
        pass
    (tmp_path / "shared" / ("0" * 32)).mkdir()
    assert kvstore_json("purge", tmp_path / "shared", "--all", "--yes")["removed"] == []
    assert kvstore_json("gc", tmp_path / "shared", "--older-than", "0s", "--dry-run")["removed"] == []


# -- repair


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_what_is_damaged_is_removed(kv: Path, tier: str) -> None:
    if tier == "disk":
        data = kv / "disk" / "data"
        content = bytearray(data.read_bytes())
        content[4096 + 100] ^= 1
        data.write_bytes(content)
    else:
        file = next((kv / "shared" / IDENTITY.namespace().hex()).rglob(f"{small_keys()[2]}*"))
        content = bytearray(file.read_bytes())
        content[-3000] ^= 1
        with file.open("r+b") as f:  # the same inode: its chunk has another name
            f.write(content)
    assert kvstore("verify", kv / tier)[0] == 1
    said = kvstore_json("verify", kv / tier, "--repair")
    assert said["ok"] and said["repaired"] == 1
    assert is_sound(kv / tier)
    config = small_config(**{tier: kv / tier})
    with TieredStore(config) as store:
        out = torch.zeros_like(small_blocks())
        found = store.get(small_keys(), out)
        assert found in (2, 4) or tier == "disk"
        assert torch.equal(out[:found], small_blocks()[:found])


def test_a_damaged_index_is_rebuilt(kv: Path) -> None:
    before = stored(kv / "disk")
    file = kv / "disk" / "index" / "data.mdb"
    file.write_bytes(os.urandom(file.stat().st_size))
    with TieredStore(small_config(disk=kv / "disk")) as store:  # rebuilds it, and has it open
        assert store.prefix_hit(small_keys()) == NUM_BLOCKS
        file.write_bytes(os.urandom(file.stat().st_size))
        code, _, err = kvstore("verify", kv / "disk", "--repair")
        assert code == 2 and "is in use" in err
    assert kvstore("verify", kv / "disk")[0] == 1
    assert kvstore_json("verify", kv / "disk", "--repair")["ok"]
    assert stored(kv / "disk") == before
    assert prefix_hit(small_config(disk=kv / "disk"), small_keys()) == NUM_BLOCKS


def test_the_shell_completes_commands_and_options() -> None:
    """As bash asks for it."""
    for words, wanted in (("kvstore ver", "verify"), ("kvstore gc --max", "--max-bytes")):
        environ = {**os.environ, "_KVSTORE_COMPLETE": "complete_bash", "COMP_WORDS": words,
                   "COMP_CWORD": str(len(words.split()) - 1)}  # fmt: skip
        command = [str(Path(sys.executable).parent / "kvstore")]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
        assert wanted in done.stdout.split(), done


def test_what_was_signed_is_not_removed_without_its_key(tmp_path: Path) -> None:
    """To who lacks the key all of it looks damaged; also where the index is."""
    key = tmp_path / "key"
    key.write_bytes(b"a secret of the tests")
    config = small_config(disk=tmp_path / "disk", shared=tmp_path / "shared", integrity_key_file=key)
    fill(config)
    for damage_index in (False, True):
        if damage_index:
            file = tmp_path / "disk" / "index" / "data.mdb"
            file.write_bytes(os.urandom(file.stat().st_size))
        for tier in ("disk", "shared"):
            code, _, err = kvstore("verify", tmp_path / tier, "--repair")
            assert code == 2 and "--integrity-key-file" in err
    assert kvstore_json("verify", tmp_path, "--repair", "--integrity-key-file", key)["ok"]
    assert prefix_hit(config, small_keys()) == NUM_BLOCKS
