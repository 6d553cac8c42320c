"""A prefill server hands KV to a decode server directly: real engines, each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from connectors.curve_keys import CurveKeys, generate
from connectors.registration import PeerAddress, Registration
from connectors.testing import IDENTITY
from kvstore.errors import ConfigError
from tests.engines.engine import NEEDS_VLLM, Engine, blocks, make_llama, prompt, same
from tests.waiting import wait_until
from tools.demo_process import ChildError

pytestmark = NEEDS_VLLM
ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1500, 700, 130, 100)
PROMPTS = [prompt(i, n) for i, n in enumerate(LENGTHS)]
TCP = "KVStoreTcpConnector"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


CONSUMER_PORT = free_port()
NOTHING_SHARED = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def peer(connector: str, role: str, **extra: Any) -> dict[str, Any]:
    return {
        "kv_connector": connector,
        "kv_connector_module_path": "connectors.vllm",
        "kv_role": role,
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"num_cpu_blocks": 96, **extra},
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("vllm") / "model")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Callable[..., Engine]]:
    engines: list[Engine] = []

    def start(name: str, transfer: dict[str, Any] | None, **settings: Any) -> Engine:
        engine = Engine(name, tmp_path_factory.mktemp(name), model, NOTHING_SHARED)
        engines.append(engine.load(transfer, max_num_batched_tokens=512, **settings))
        return engine

    yield start
    for engine in engines:
        with suppress(ChildError, ValueError):  # some have been killed, or have ended
            engine.stop()


@pytest.fixture(scope="module")
def pair(start: Callable[..., Engine]) -> tuple[Engine, Engine]:
    producer = start("producer", peer(TCP, "kv_producer", lease_s=12.0))
    listen = f"tcp://127.0.0.1:{CONSUMER_PORT}"
    return producer, start("consumer", peer(TCP, "kv_consumer", listen=listen, num_cpu_blocks=40))


@pytest.fixture(scope="module")
def wanted(pair: tuple[Engine, Engine]) -> list[dict[str, Any]]:
    """What the consumer computes itself."""
    answers = pair[1].generate(*PROMPTS, max_tokens=16)
    assert cached(answers) == [0] * len(PROMPTS)
    assert pair[1].ask("reset", connector=False)
    return answers


def cached(answers: list[dict[str, Any]]) -> list[int]:
    return [answer["cached"] for answer in answers]


def prefill(producer: Engine, *prompts: list[int]) -> list[dict[str, Any]]:
    told = [producer.hand_over(ids) for ids in prompts]
    producer.settle()  # in a server the engine goes on by itself
    return told


def decode(consumer: Engine, prompts: list[list[int]], told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        consumer.generate(ids, max_tokens=16, transfer_params=params)[0]
        for ids, params in zip(prompts, told, strict=True)
    ]


def computed(consumer: Engine, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What it answers to prompts that nobody has handed over; its own cache is empty again afterwards."""
    consumer.ask("reset", connector=False)
    answers = consumer.generate(*prompts, max_tokens=16)
    assert cached(answers) == [0] * len(prompts)
    consumer.ask("reset", connector=False)
    return answers


def is_idle(producer: Engine) -> bool:
    return bool(producer.settle()["host"]["pinned_blocks"] == 0)


def test_prompts_are_handed_over(pair: tuple[Engine, Engine], wanted: list[dict[str, Any]]) -> None:
    producer, consumer = pair
    told = prefill(producer, *PROMPTS[:3])
    assert [params[f"kvstore_peer@{TCP}"]["num_blocks"] * 128 for params in told] == [
        n // 128 * 128 for n in LENGTHS[:3]
    ]
    assert producer.hand_over(PROMPTS[3]) is None  # shorter than a block
    assert not is_idle(producer)
    answers = decode(consumer, PROMPTS[:3], told)
    same(answers, wanted[:3])
    assert cached(answers) == [blocks(n) for n in LENGTHS[:3]]
    wait_until(lambda: is_idle(producer))
    assert consumer.settle()["peer"]["hit_blocks"] == sum(blocks(n) // 128 for n in LENGTHS[:3])
    consumer.metrics(lambda found: found.get(f"hit_blocks{{{TCP},peer}}", 0) > 0)


@pytest.mark.parametrize("connector", ["KVStoreNcclConnector", "KVStoreNixlConnector"])
def test_other_transports(connector: str, wanted: list[dict[str, Any]], start: Callable[..., Engine]) -> None:
    producer, consumer = (
        start("other-producer", peer(connector, "kv_producer")),
        start("other-consumer", peer(connector, "kv_consumer")),
    )
    answers = decode(consumer, PROMPTS[:3], prefill(producer, *PROMPTS[:3]))
    same(answers, wanted[:3])
    assert cached(answers) == [blocks(n) for n in LENGTHS[:3]]
    wait_until(lambda: is_idle(producer))
    producer.stop()
    dies_while_it_sends(connector, consumer, start)
    consumer.stop()


def dies_while_it_sends(connector: str, consumer: Engine, start: Callable[..., Engine]) -> None:
    """Half of a prompt's blocks have come; what is not there is computed, and the consumer goes on."""
    ids, other = prompts = [prompt(80, 1500), prompt(81, 1500)]
    cold = computed(consumer, prompts)
    transfer = peer(connector.replace("KVStore", "Dying"), "kv_producer")
    producer = start("dying", transfer | {"kv_connector_module_path": "tests.engines.dying_connectors"})
    told = [
        {f"kvstore_peer@{connector}": value for value in params.values()} for params in prefill(producer, ids, other)
    ]
    begun = time.monotonic()
    answers = decode(consumer, [ids, other], told)
    same(answers, cold)
    assert cached(answers) == [0, 0]
    assert time.monotonic() - begun < 60
    wait_until(lambda: consumer.settle()["host"]["pinned_blocks"] == 0)
    with pytest.raises(ChildError):
        producer.settle()  # it is dead


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[str, str]]:
    """URL of a proxy, and the file with the secret that servers register with."""
    secret = tmp_path / "secret"
    secret.write_text("a secret of the tests\n")
    secret.chmod(0o600)
    command = [sys.executable, "-c", "from tools.cli import main; main()", "proxy", "--port", "0", "--json"]
    process = subprocess.Popen(
        [*command, "--register-key-file", str(secret)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as out:
        url = json.loads(out.readline())["url"]
    yield url, str(secret)
    process.kill()
    process.wait()


def registered(url: str) -> list[tuple[str, str]]:
    with urllib.request.urlopen(f"{url}/status", timeout=10) as answer:
        return [(server["role"], server["url"]) for server in json.load(answer)["servers"]]


def test_prompts_are_pushed(pair: tuple[Engine, Engine], start: Callable[..., Engine], proxy: tuple[str, str]) -> None:
    """The decode server is named to the prefill server, and then asks for nothing. The latter is with a proxy
    from its start to its end."""
    _, consumer = pair
    to = {"address": f"tcp://127.0.0.1:{CONSUMER_PORT}", "key": ""}
    here = {"register_at": proxy[0], "register_key_file": proxy[1], "serve_at": "http://127.0.0.1:9"}
    producer = start("pushes", peer(TCP, "kv_producer", push=True, **here))
    wait_until(lambda: registered(proxy[0]) == [("prefill", "http://127.0.0.1:9")])
    prompts = [prompt(70 + i, n) for i, n in enumerate(LENGTHS[:3])]
    cold = computed(consumer, prompts)
    before = consumer.settle()["peer"]["read_nbytes"]
    told = [producer.hand_over(ids, push_to=to) for ids in prompts]
    assert all(params[f"kvstore_peer@{TCP}"]["is_pushed"] for params in told)
    wait_until(lambda: is_idle(producer))  # all of it has gone
    answers = decode(consumer, prompts, told)
    same(answers, cold)
    assert cached(answers) == [blocks(n) for n in LENGTHS[:3]]
    assert consumer.settle()["peer"]["read_nbytes"] == before
    assert consumer.settle()["host"]["pinned_blocks"] == 0
    producer.stop()
    assert registered(proxy[0]) == []


def test_first_the_peer_then_the_shared_path_then_compute(
    pair: tuple[Engine, Engine], wanted: list[dict[str, Any]], start: Callable[..., Engine], tmp_path: Path
) -> None:
    """As children of vLLM's MultiConnector, at both ends."""

    def both(role: str) -> dict[str, Any]:
        shared = {"shared_storage_path": str(tmp_path / "shared"), "shared_capacity_bytes": 256 << 20}
        children = [peer(TCP, role, lease_s=12.0), peer("KVStoreSharedStorageConnector", role, **shared)]
        return {
            "kv_connector": "MultiConnector",
            "kv_role": role,
            "kv_connector_extra_config": {"connectors": children},
        }

    producer, consumer = start("both-producer", both("kv_producer")), start("both-consumer", both("kv_consumer"))
    told = prefill(producer, *PROMPTS[:2])
    assert {key.partition("@")[0] for key in told[0]} == {"kvstore_peer", "kvstore"}
    (first,) = decode(consumer, PROMPTS[:1], told[:1])
    by_peer = consumer.ask("settle")["stats"]
    assert by_peer[0]["peer"]["hit_blocks"] == blocks(LENGTHS[0]) // 128
    producer.stop()  # with all that it held
    (second,) = decode(consumer, PROMPTS[1:2], told[1:])
    (third,) = decode(consumer, PROMPTS[2:3], told[1:])
    same([first, second, third], wanted[:3])
    assert cached([first, second, third]) == [blocks(LENGTHS[0]), blocks(LENGTHS[1]), 0]
    assert consumer.ask("settle")["stats"][1]["shared"]["hit_blocks"] >= blocks(LENGTHS[1]) // 128
    consumer.stop()


def test_part_of_it_is_in_the_consumers_own_cache(pair: tuple[Engine, Engine], wanted: list[dict[str, Any]]) -> None:
    producer, consumer = pair
    ids = prompt(50, 1000)
    consumer.ask("reset", connector=False)
    (cold,) = consumer.generate(ids, max_tokens=16)
    consumer.ask("reset", connector=False)
    consumer.generate(ids[:400], max_tokens=1)
    (told,) = prefill(producer, ids)
    (answer,) = decode(consumer, [ids], [told])
    same([answer], [cold])
    assert answer["cached"] == blocks(1000)
    wait_until(lambda: is_idle(producer))


def test_nobody_takes_it(pair: tuple[Engine, Engine]) -> None:
    producer, _ = pair
    prefill(producer, prompt(60, 1000))
    assert not is_idle(producer)
    wait_until(lambda: is_idle(producer))  # its lease has run out


def test_the_consumer_dies_and_another_comes(
    pair: tuple[Engine, Engine], wanted: list[dict[str, Any]], start: Callable[..., Engine]
) -> None:
    producer, _ = pair
    first = start("first", peer(TCP, "kv_consumer"))
    told = prefill(producer, *PROMPTS[:2])
    first._child.send("generate", prompts=[PROMPTS[0]], max_tokens=64, transfer_params=told[0])
    time.sleep(0.05)
    first._child.kill()
    second = start("second", peer(TCP, "kv_consumer"))
    answers = decode(second, PROMPTS[:2], told)
    same(answers, wanted[:2])
    assert answers[1]["cached"] in (0, blocks(LENGTHS[1]))  # its lease may have run out
    wait_until(lambda: is_idle(producer))
    second.stop()


def test_the_producer_dies(pair: tuple[Engine, Engine], start: Callable[..., Engine]) -> None:
    """Before it is asked, after that, and while it sends."""
    _, consumer = pair
    producer = start("dies", peer(TCP, "kv_producer"))
    prompts = [prompt(83 + i, n) for i, n in enumerate(LENGTHS[:2])]
    cold = computed(consumer, prompts)
    told = prefill(producer, *prompts)
    begun = time.monotonic()
    consumer._child.send("generate", prompts=[prompts[0]], max_tokens=16, transfer_params=told[0])
    producer._child.kill()
    (answer,) = consumer._child.receive(120)["answer"]
    same([answer], cold[:1])
    (answer,) = decode(consumer, prompts[1:], told[1:])
    same([answer], cold[1:])
    assert answer["cached"] == 0
    assert time.monotonic() - begun < 60
    assert consumer.settle()["host"]["pinned_blocks"] == 0
    dies_while_it_sends(TCP, consumer, start)


def test_one_rank_to_two_and_back(
    pair: tuple[Engine, Engine], wanted: list[dict[str, Any]], start: Callable[..., Engine]
) -> None:
    """Prefill and decode are tuned apart: pages are cut anew on their way."""
    producer, consumer = pair
    of_two = start("ranks", peer(TCP, "kv_both"), tensor_parallel_size=2)
    answers = [decode(of_two, [ids], prefill(producer, ids))[0] for ids in PROMPTS[:3]]  # each within its lease
    same(answers, wanted[:3])
    assert cached(answers) == [blocks(n) for n in LENGTHS[:3]]
    wait_until(lambda: is_idle(producer))
    prompts = [prompt(90 + i, n) for i, n in enumerate(LENGTHS[:2])]
    cold = computed(consumer, prompts)
    answers = decode(consumer, prompts, prefill(of_two, *prompts))
    same(answers, cold)
    assert cached(answers) == [blocks(n) for n in LENGTHS[:2]]
    wait_until(lambda: is_idle(of_two))
    of_two.stop()


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "kv_connector_extra_config.device: 'cpu'; give a CUDA device"),
        (0, "kv_connector_extra_config.device: 0; give a CUDA device"),
        ("gpu", "kv_connector_extra_config.device: 'gpu'; give a CUDA device"),
        pytest.param(
            "cuda",
            "kv_connector_extra_config.device: .*NCCL cannot be used; leave device out to use gloo",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here"),
        ),
    ],
    ids=str,
)
def test_a_device_that_nccl_cannot_use(device: object, message: str) -> None:
    from connectors.vllm import KVStoreNcclConnector

    with pytest.raises(ConfigError, match=message):
        object.__new__(KVStoreNcclConnector).configure(IDENTITY, {"num_cpu_blocks": 8, "device": device})


def test_a_server_that_listens_everywhere_says_where_it_is_reached(tmp_path: Path) -> None:
    from connectors.vllm.peer_connectors import PeerSettings, check_listens, reached_at

    for name in ("mine", "theirs"):
        generate(tmp_path / name, name)
    (tmp_path / "mine" / "peers").mkdir(exist_ok=True)
    (tmp_path / "mine" / "peers" / "theirs.key").write_text((tmp_path / "theirs" / "public.key").read_text())
    keys = CurveKeys.load(tmp_path / "mine")
    for listen in ("tcp://0.0.0.0:7000", "tcp://[::]:7000", "tcp://*:7000"):
        with pytest.raises(ConfigError, match="listen: .*set advertise to one"):
            reached_at(PeerSettings(listen=listen), keys)
    listen = "tcp://0.0.0.0:7000"
    assert reached_at(PeerSettings(listen=listen, advertise="tcp://127.0.0.2:7000"), keys) == "127.0.0.2"
    with pytest.raises(ConfigError, match="listen, advertise: '192.0.2.1', where pipes listen too: .*no address of"):
        check_listens("192.0.2.1")
    with pytest.raises(ConfigError, match="advertise: tcp://127.0.0.2:0 has no port"):
        reached_at(PeerSettings(listen=listen, advertise="tcp://127.0.0.2:0"), keys)


def test_a_start_that_fails_leaves_no_process() -> None:
    """One that cannot listen, and one that cannot register."""
    from vllm.config import KVTransferConfig

    from connectors.vllm import KVStoreNixlConnector

    def left() -> tuple[int, int, int]:
        return len(psutil.Process().children()), threading.active_count(), len(psutil.Process().net_connections())

    before = left()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for listen, register_at in ((f"tcp://127.0.0.1:{taken.getsockname()[1]}", None), ("tcp://127.0.0.1:0", "http")):
            connector = object.__new__(KVStoreNixlConnector)
            connector._event_log_blocks = 0
            connector._kv_transfer_config = KVTransferConfig(kv_connector="KVStoreNixlConnector", kv_role="kv_both")
            connector.configure(IDENTITY, {"num_cpu_blocks": 8, "listen": listen})
            if register_at is not None:
                connector._register = fail
            with pytest.raises(ConfigError):
                connector.make_scheduler(1, (None,))
        wait_until(
            lambda: all(now <= was for now, was in zip(left(), (before[0], before[1], before[2] + 1), strict=True))
        )


def fail(_: PeerAddress) -> Registration:
    raise ConfigError("register_at: broken by a test")


def test_every_setting_is_in_the_docs() -> None:
    from connectors.vllm.peer_connectors import PeerSettings

    text = (Path(__file__).parents[2] / "docs" / "p2p.md").read_text()
    rows = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))))
    assert {f.name for f in dataclasses.fields(PeerSettings)} <= rows


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"listen": "tcp://0.0.0.0:0"}, "kv_connector_extra_config.listen"),
        ({"advertise": "tcp://10.1.2.3:7000"}, "kv_connector_extra_config.advertise: .*not loopback, and without keys"),
        ({"listen": 5}, "kv_connector_extra_config.listen: 5"),
        ({"lease_s": 0}, "kv_connector_extra_config.lease_s: 0"),
        ({"keys_path": "/nowhere"}, "kv_connector_extra_config.*nowhere"),
        ({"disk_path": "/x"}, "kv_connector_extra_config.disk_path: not known"),
        ({"block_size": 256}, "kv_connector_extra_config.block_size: not known"),
        ({"push": 1}, "kv_connector_extra_config.push: 1"),
        ({"register_at": "http://x"}, "kv_connector_extra_config.register_at: 'http://x' needs serve_at, register_key"),
        (
            {"register_at": "http://x", "serve_at": "http://y", "register_key_file": "/nowhere"},
            "kv_connector_extra_config.*/nowhere cannot be read",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_names_the_key(extra: dict[str, Any], message: str) -> None:
    """As the connector reads them at the start."""
    from vllm.config import KVTransferConfig

    from connectors.vllm import KVStoreTcpConnector

    connector = object.__new__(KVStoreTcpConnector)
    connector._event_log_blocks = 0
    connector._kv_transfer_config = KVTransferConfig(kv_connector=TCP, kv_role="kv_both")

    def start() -> None:
        connector.configure(IDENTITY, {"num_cpu_blocks": 8, **extra})
        connector.make_scheduler(1, (None,))

    with pytest.raises(ConfigError, match=message):
        start()
