"""A store under load, run by processes that are there to be killed.

As a script: a server that has everything imported and forks a process for each line
``DIRECTORY SEED`` it reads, answering with its pid. Those put and get until they are killed,
check every byte, and write how far they are to ``progress-PID``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import torch

from kvstore import (
    BlockKey,
    DiskTierConfig,
    HostTierConfig,
    KVIdentity,
    KVLayout,
    StoreConfig,
    TieredStore,
    hash_blocks,
)
from kvstore.keys import keys_to_array

LAYOUT = KVLayout(num_layers=4, num_kv_heads=8, head_size=64, block_size=16, dtype=torch.bfloat16)  # 128 KiB a block
IDENTITY = KVIdentity(model="m", revision="r1", layout=LAYOUT)
CAPACITY_NBYTES = 64 << 20
NUM_PREFIXES, PREFIX_BLOCKS = 70, 12  # some 840 blocks; the directory has room for some 490


def open_store(directory: Path, *, host_blocks: int = 64, **settings: object) -> TieredStore:
    disk = DiskTierConfig(path=str(directory / "disk"), capacity_nbytes=CAPACITY_NBYTES, num_threads=4)
    config = {"identity": IDENTITY, "host": HostTierConfig(num_blocks=host_blocks), "disk": disk, **settings}
    return TieredStore(StoreConfig(**config))  # type: ignore[arg-type]


def keys_of(prefix: int) -> list[BlockKey]:
    return hash_blocks([prefix * 10_000 + i for i in range(PREFIX_BLOCKS * 16)], 16, IDENTITY)


def blocks_of(keys: list[BlockKey]) -> torch.Tensor:
    """Blocks whose every byte follows from their key."""
    seeds = keys_to_array(keys)[:, :8].copy().view(np.uint64)
    words = seeds * np.arange(1, LAYOUT.block_nbytes // 8 + 1, dtype=np.uint64)[None, :]
    return torch.from_numpy(words.view(np.int16)).view(torch.bfloat16).reshape(len(keys), *LAYOUT.block_shape)


def check_all(store: TieredStore) -> int:
    """Assert that whatever the store returns is right; how many blocks it returned."""
    num_blocks = 0
    for prefix in range(NUM_PREFIXES):
        keys = keys_of(prefix)
        out = torch.zeros((len(keys), *LAYOUT.block_shape), dtype=LAYOUT.dtype)
        n = store.get(keys, out)
        assert torch.equal(out[:n].view(torch.int16), blocks_of(keys[:n]).view(torch.int16)), f"wrong bytes in {prefix}"
        num_blocks += n
    return num_blocks


def check_bound(directory: Path, store: TieredStore) -> None:
    stats = store.stats().tiers["disk"]
    assert stats.used_nbytes <= stats.capacity_nbytes <= CAPACITY_NBYTES
    assert sum(f.stat().st_blocks * 512 for f in (directory / "disk").rglob("*")) <= CAPACITY_NBYTES


def run(directory: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    progress = directory / f"progress-{os.getpid()}"
    with open_store(directory, host_blocks=32, stall_s=1.0, put_timeout_s=2.0) as store:
        for count in range(1 << 30):
            keys = keys_of(int(rng.integers(NUM_PREFIXES)))
            out = torch.zeros((len(keys), *LAYOUT.block_shape), dtype=LAYOUT.dtype)
            n = store.get(keys, out)
            if not torch.equal(out[:n].view(torch.int16), blocks_of(keys[:n]).view(torch.int16)):
                report(progress, "wrong bytes")
                return
            store.put(keys, blocks_of(keys))
            if rng.random() < 0.05:
                store.flush(1.0)
            report(progress, str(count))


def report(path: Path, text: str) -> None:
    path.with_suffix(".new").write_text(text)
    path.with_suffix(".new").replace(path)


class Workers:
    """The server's other end."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        self._pids: list[int] = []
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.faults.workload"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        )  # fmt: skip

    def start(self, directory: Path, seed: int) -> int:
        """Start a process; returns its pid."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{directory} {seed}\n")
        self._server.stdin.flush()
        self._pids.append(int(self._server.stdout.readline()))
        return self._pids[-1]

    def close(self) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.kill()
        self._server.communicate(timeout=30)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        directory, seed = line.split()
        pid = os.fork()
        if pid == 0:
            run(Path(directory), int(seed))
            os._exit(0)
        print(pid, flush=True)
        threading.Thread(target=os.waitpid, args=(pid, 0), daemon=True).start()


if __name__ == "__main__":
    serve()
