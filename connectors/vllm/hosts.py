"""Whether all ranks of an engine share one host's memory, which its arena is in."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from connectors.vllm.groups import UnsupportedEngineError


def check_one_host(ranks: Any) -> None:
    """Called by every rank of a tensor-parallel group (vLLM's ``GroupCoordinator``) at the same time.

    Raises:
        UnsupportedEngineError: they are on several hosts, or in several process-id namespaces.
    """
    if ranks.world_size == 1:
        return
    mine = torch.tensor([_host_number()], dtype=torch.int64)
    every = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    torch.distributed.all_gather(every, mine, group=ranks.cpu_group)
    num_hosts = len({int(number) for number in every})
    if num_hosts > 1:
        raise UnsupportedEngineError(
            f"tensor parallelism over hosts ({ranks.world_size} ranks on {num_hosts}) is not supported: "
            "all ranks map one arena; run them on one host, in one process-id namespace"
        )


def _host_number() -> int:
    """Of this boot of this host, and this process-id namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    namespace = os.readlink("/proc/self/ns/pid").encode()
    return int.from_bytes(hashlib.sha256(boot + namespace).digest()[:8], "little", signed=True)
