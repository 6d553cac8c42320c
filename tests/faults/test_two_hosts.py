"""Hand-over between two hosts: network namespaces of their own, with a slow and lossy link between them.

Loss comes from netem where the kernel has it, else from a short queue that overflows.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from connectors.curve_keys import generate
from tests.waiting import wait_until
from tools.demo_process import Child

NEEDS_NIXL = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="nixl is not installed")
ADDRESSES = ("10.99.0.1", "10.99.0.2")
LOAD_TIMEOUT_S = 8.0
N = 24
LINKS = {
    "netem": ["netem", "delay", "5ms", "loss", "1%", "rate", "300mbit"],
    "tbf": ["tbf", "rate", "300mbit", "burst", "32kb", "limit", "96kb"],
}


def run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=30)


def connect(names: tuple[str, str]) -> str:
    """Make two namespaces and a slow, lossy link between them; why that cannot be, or nothing."""
    for name in names:
        made = run("ip", "netns", "add", name, check=False)
        if made.returncode:
            return f"network namespaces cannot be made: {made.stderr.strip()}"
        run("ip", "-n", name, "link", "set", "lo", "up")
    ends = ("netns", names[0], "type", "veth", "peer", "name", "kvt0", "netns", names[1])
    made = run("ip", "link", "add", "kvt0", *ends, check=False)
    if made.returncode:
        return f"they cannot be linked: {made.stderr.strip()}"
    for name, address in zip(names, ADDRESSES, strict=True):
        run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "kvt0")
        run("ip", "-n", name, "link", "set", "kvt0", "up")
        for what in LINKS.values():
            if not run("tc", "-n", name, "qdisc", "add", "dev", "kvt0", "root", *what, check=False).returncode:
                break
        else:
            return "the kernel has neither netem nor tbf, which make a link slow and lossy"
    return ""


def remove(names: tuple[str, str]) -> None:
    for name in names:
        run("ip", "netns", "del", name, check=False)


def new_names() -> tuple[str, str]:
    tag = uuid.uuid4().hex[:6]
    return f"kvt-a-{tag}", f"kvt-b-{tag}"


def why_not() -> str:
    """Why there can be no two hosts here; empty where there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "there is no iproute2"
    names = new_names()
    try:
        return connect(names)
    finally:
        remove(names)


WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "-")


@dataclass
class Link:
    """Two namespaces and what is between them."""

    names: tuple[str, str]

    def set(self, state: str) -> None:
        run("ip", "-n", self.names[0], "link", "set", "kvt0", state)

    def dropped(self) -> int:
        """Packets that were lost on the way from the first to the second."""
        shown = run("tc", "-n", self.names[0], "-s", "qdisc", "show", "dev", "kvt0").stdout
        return int(shown.partition("(dropped ")[2].partition(",")[0])


@pytest.fixture
def link() -> Iterator[Link]:
    names = new_names()
    try:
        assert not connect(names)
        yield Link(names)
    finally:
        remove(names)


class Host:
    """A process in one of the namespaces."""

    def __init__(self, link: Link, i: int, transport: str, folder: Path) -> None:
        before = {"PYTHONDONTWRITEBYTECODE": "1", "UCX_NET_DEVICES": "kvt0", "UCX_TLS": "tcp,self"}
        self.child = Child(
            f"host-{i}", "tests.faults.hand_over_host", folder, before, prefix=["ip", "netns", "exec", link.names[i]]
        )
        self.ask("start", address=ADDRESSES[i], keys=str(folder / f"keys-{i}"), transport=transport,
                 load_timeout_s=LOAD_TIMEOUT_S)  # fmt: skip

    def ask(self, command: str, **arguments: Any) -> Any:
        return self.child.ask(command, timeout_s=60, **arguments)["answer"]


@pytest.fixture(params=["tcp", "nccl", pytest.param("nixl", marks=NEEDS_NIXL)])
def hosts(request: pytest.FixtureRequest, link: Link, tmp_path: Path) -> Iterator[tuple[Host, Host]]:
    for i in range(2):
        generate(tmp_path / f"keys-{i}", f"host-{i}")
    for mine, other in ((0, 1), (1, 0)):
        peers = tmp_path / f"keys-{mine}" / "peers"
        (peers / "other.key").write_text((tmp_path / f"keys-{other}" / "public.key").read_text())
    made: list[Host] = []
    try:
        for i in range(2):
            made.append(Host(link, i, request.param, tmp_path))
        yield made[0], made[1]
    finally:
        for host in made:
            host.child.kill()


def test_right_over_a_slow_and_lossy_link(hosts: tuple[Host, Host], link: Link) -> None:
    producer, consumer = hosts
    for seed in range(1, 5):
        answer = consumer.ask("decode", n=N, seed=seed, told=producer.ask("prefill", n=N, seed=seed))
        assert answer["found"] == N
        assert answer["seconds"] < LOAD_TIMEOUT_S
    assert link.dropped() > 0
    wait_until(lambda: producer.ask("held") == [0, 0, 0])


@pytest.mark.parametrize(
    "hosts",
    ["tcp", pytest.param("nccl", marks=pytest.mark.slow), pytest.param("nixl", marks=[pytest.mark.slow, NEEDS_NIXL])],
    indirect=True,
)
def test_a_link_that_is_cut_and_comes_back(hosts: tuple[Host, Host], link: Link) -> None:
    producer, consumer = hosts
    answer = consumer.ask("decode", n=N, seed=1, told=producer.ask("prefill", n=N, seed=1))
    assert answer["found"] == N
    told = producer.ask("prefill", n=N, seed=2)
    consumer.child.send("decode", n=N, seed=2, told=told)
    link.set("down")
    answer = consumer.child.receive(60)["answer"]
    assert answer["found"] <= N  # what came is right
    assert answer["seconds"] < LOAD_TIMEOUT_S + 5
    link.set("up")

    def hands_over_again() -> bool:
        seed = hands_over_again.seed = hands_over_again.seed + 1  # type: ignore[attr-defined]
        told = producer.ask("prefill", n=N, seed=seed)
        return bool(consumer.ask("decode", n=N, seed=seed, told=told)["found"] == N)

    hands_over_again.seed = 10  # type: ignore[attr-defined]
    wait_until(hands_over_again, timeout_s=120)
    wait_until(lambda: producer.ask("held") == [0, 0, 0], timeout_s=60)
