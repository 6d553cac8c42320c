"""Every mistake names the key, what was given and what is allowed; every way in gives the same settings."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvstore import DiskTierConfig, HostTierConfig, JournalConfig, KVIdentity, SharedTierConfig, StoreConfig
from kvstore.config import MAX_THREADS
from kvstore.config_source import _leaves
from kvstore.errors import ConfigError

FULL: dict[str, Any] = {
    "identity": {
        "model": "m",
        "revision": "0123abcd",
        "layout": {"num_layers": 2, "num_kv_heads": 1, "head_size": 8, "block_size": 4, "dtype": "bfloat16"},
        "placement": {"tp_size": 2},
    },
    "host": {"num_blocks": 64, "eviction_policy": "arc"},
    "device": {"num_blocks": 8, "device": "cpu"},
    "disk": {"path": "/a", "capacity_nbytes": 1 << 30, "on_mismatch": "clear"},
    "shared": {"path": "/b", "capacity_nbytes": 1 << 30, "max_age_s": 3600, "fsync": "always"},
    "journal": {"path": "/j", "capacity_nbytes": 1 << 24, "sample_s": 1.5},
    "blocks_per_chunk": 4,
    "io": "process",
    "put_timeout_s": 0,
}


def changed(key: str, value: object) -> dict[str, Any]:
    """FULL with one dotted key set, or deleted where the value is `...`."""
    settings = copy.deepcopy(FULL)
    *parents, leaf = key.split(".")
    node = settings
    for parent in parents:
        node = node[parent]
    if value is ...:
        del node[leaf]
    else:
        node[leaf] = value
    return settings


MISTAKES: list[tuple[str, object, str]] = [
    # key, value, what the message says is allowed
    ("identity", ..., "missing"),
    ("host", ..., "missing"),
    ("host", None, "HostTierConfig"),
    ("host", 5, "num_blocks, eviction_policy"),
    ("host", [], "num_blocks, eviction_policy"),
    ("disk", "/a", "path, capacity_nbytes"),
    ("journal", "/j", "path, capacity_nbytes"),
    ("journal.path", "", "not empty"),
    ("journal.sample_s", 0, "seconds above 0"),
    ("identity.model", "", "the model's name"),
    ("identity.model", 5, "the model's name"),
    ("identity.revision", "main", "immutable revision"),
    ("identity.revision", "AUTO", "immutable revision"),
    ("identity.revision", ..., "missing"),
    ("identity.rope", "auto", "the value that took effect"),
    ("identity.kv_scales", None, "the value that took effect"),
    ("identity.layout", None, "KVLayout"),
    ("identity.layout.num_layers", 0, "at least 1"),
    ("identity.layout.block_size", 2.0, "at least 1"),
    ("identity.layout.head_size", True, "at least 1"),
    ("identity.layout.num_kv_heads", "2", "at least 1"),
    ("identity.layout.dtype", "auto", "bfloat16, float16"),
    ("identity.layout.dtype", 16, "bfloat16, float16"),
    ("identity.layout.dtype", ..., "missing"),
    ("identity.placement.tp_size", 0, "at least 1"),
    ("identity.placement.first_layer", -1, "at least 0"),
    ("host.num_blocks", "x", "at least 1"),
    ("host.num_blocks", 0, "at least 1"),
    ("host.num_blocks", -4, "at least 1"),
    ("host.num_blocks", 4.5, "at least 1"),
    ("host.num_blocks", True, "at least 1"),
    ("host.num_blocks", None, "at least 1"),
    ("host.num_blocks", 3, "blocks_per_chunk=4"),
    ("host.eviction_policy", "", "not empty"),
    ("device.num_blocks", 0, "at least 1"),
    ("device.device", None, "not empty"),
    ("disk.path", "", "not empty"),
    ("disk.path", "a\0b", "not empty"),
    ("disk.path", 5, "not empty"),
    ("disk.capacity_nbytes", 4095, "at least 4096"),
    ("disk.capacity_nbytes", "8GB", "at least 4096"),
    ("disk.capacity_nbytes", ..., "exactly one"),
    ("disk.num_blocks", 5, "exactly one"),
    ("disk.on_mismatch", "ask", "refuse, clear"),
    ("disk.on_mismatch", ["refuse"], "refuse, clear"),
    ("disk.num_threads", 0, f"1 to {MAX_THREADS}"),
    ("disk.num_threads", MAX_THREADS + 1, f"1 to {MAX_THREADS}"),
    ("shared.path", "/a", "its own directory"),
    ("shared.capacity_nbytes", 0, "at least 4096"),
    ("shared.capacity_nbytes", ..., "missing"),
    ("shared.max_age_s", 0, "above 0"),
    ("shared.fsync", "sometimes", "never, flush, always"),
    ("shared.num_threads", "8", f"1 to {MAX_THREADS}"),
    ("shared.gc_interval_s", float("inf"), "above 0"),
    ("blocks_per_chunk", 0, "at least 1"),
    ("io", "x", "thread, process"),
    ("io", None, "thread, process"),
    ("put_timeout_s", -1, "at least 0"),
    ("put_timeout_s", float("nan"), "at least 0"),
    ("put_timeout_s", "1", "at least 0"),
    ("load_timeout_s", 0, "above 0"),
    ("load_timeout_s", True, "above 0"),
    ("stall_s", float("inf"), "above 0"),
    ("integrity_key_file", "", "not empty"),
    ("typo", 1, "allowed: identity, host"),
    ("disk.typo", 1, "disk.path, disk.capacity_nbytes"),
    ("identity.layout.typo", 1, "identity.layout.num_layers"),
]


@pytest.mark.parametrize(("key", "value", "allowed"), MISTAKES)
def test_mistake_names_key_value_and_what_is_allowed(key: str, value: object, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StoreConfig.from_dict(changed(key, value))
    message = str(caught.value)
    assert message.startswith((f"{key}: ", f"{key}=")) or allowed == "exactly one"
    assert key in message
    assert allowed in message
    if value is not ... and allowed not in ("exactly one",) and not key.endswith("typo"):
        assert repr(value) in message


@pytest.mark.parametrize("top", [None, 5, "x", [], [("host", 1)]])
def test_settings_that_are_no_mapping(top: Any) -> None:
    with pytest.raises(ConfigError, match="settings: .* give a mapping of identity, host"):
        StoreConfig.from_dict(top)


@pytest.mark.parametrize("text", ["", "{", b"\xff", "[" * 100_000, "nul"])
def test_text_that_is_not_json(text: str | bytes) -> None:
    with pytest.raises(ConfigError, match="settings: not JSON .* give a JSON object of identity"):
        StoreConfig.from_json(text)


def test_every_way_in_gives_the_same_settings() -> None:
    config = StoreConfig.from_dict(FULL)
    environ = {"KVSTORE_" + "_".join(path).upper(): str(v) for path, v in leaves_of(FULL)}
    assert StoreConfig.from_json(json.dumps(FULL)) == config
    assert StoreConfig.from_env(environ | {"HOME": "/", "KVSTOREX": "1"}) == config
    assert config == StoreConfig(
        identity=config.identity,
        host=HostTierConfig(num_blocks=64, eviction_policy="arc"),
        device=config.device,
        disk=DiskTierConfig(path="/a", capacity_nbytes=1 << 30, on_mismatch="clear"),
        shared=SharedTierConfig(path="/b", capacity_nbytes=1 << 30, max_age_s=3600, fsync="always"),
        journal=JournalConfig(path="/j", capacity_nbytes=1 << 24, sample_s=1.5),
        blocks_per_chunk=4,
        io="process",
        put_timeout_s=0,
    )
    assert config.identity.layout.dtype is torch.bfloat16
    assert config.identity.placement.tp_size == 2


def leaves_of(settings: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], object]]:
    found: list[tuple[tuple[str, ...], object]] = []
    for key, value in settings.items():
        found += leaves_of(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def test_objects_may_stand_for_mappings(identity: KVIdentity) -> None:
    config = StoreConfig.from_dict({"identity": identity, "host": {"num_blocks": 4}})
    assert config.identity is identity


def test_what_is_none_is_left_out() -> None:
    config = StoreConfig.from_dict({"identity": FULL["identity"], "host": {"num_blocks": 4}, "disk": None})
    assert "disk" not in config.to_dict()
    assert "integrity_key_file" not in config.to_dict()


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("KVSTORE_HOST_NUM_BLOCKS", "many", "a whole number"),
        ("KVSTORE_HOST_NUM_BLOCKS", "4.0", "a whole number"),
        ("KVSTORE_PUT_TIMEOUT_S", "", "a number"),
        ("KVSTORE_HOST_NUMBLOCKS", "4", "KVSTORE_HOST_NUM_BLOCKS"),
        ("KVSTORE_host_num_blocks", "4", "KVSTORE_HOST_NUM_BLOCKS"),
    ],
)
def test_mistake_in_the_environment_names_the_variable(name: str, value: str, allowed: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .*{allowed}"):
        StoreConfig.from_env({name: value})


def test_environment_without_settings() -> None:
    with pytest.raises(ConfigError, match="^identity: missing"):
        StoreConfig.from_env({"PATH": "/bin"})


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for path, value in leaves_of(FULL):
        monkeypatch.setenv("KVSTORE_" + "_".join(path).upper(), str(value))
    assert StoreConfig.from_env() == StoreConfig.from_dict(FULL)


def test_no_two_settings_share_a_variable() -> None:
    names = ["_".join(path).upper() for path, _ in _leaves(StoreConfig)]
    assert len(names) == len(set(names))


def test_one_directory_for_two_tiers_is_refused_whatever_its_name(tmp_path: Any) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"shared\.path"):
        StoreConfig.from_dict(
            changed("disk.path", str(tmp_path)) | {"shared": {"path": f"{tmp_path}/link", "capacity_nbytes": 4096}}
        )


@given(
    num_blocks=st.integers(8, 10**9),
    per_chunk=st.integers(1, 8),
    seconds=st.floats(1e-3, 1e6),
    policy=st.sampled_from(["lru", "arc", "s3fifo", "my.module:Policy"]),
    io=st.sampled_from(["thread", "process"]),
    by_blocks=st.booleans(),
    dtype=st.sampled_from(["bfloat16", "float16", "float32", "float8_e4m3fn", "int8"]),
    tenant=st.text(max_size=8),
)
def test_round_trip(
    num_blocks: int, per_chunk: int, seconds: float, policy: str, io: str, by_blocks: bool, dtype: str, tenant: str
) -> None:
    settings = copy.deepcopy(FULL)
    settings["host"] = {"num_blocks": num_blocks, "eviction_policy": policy}
    settings["disk"] = {"path": "/a", "num_blocks" if by_blocks else "capacity_nbytes": num_blocks + 4096}
    settings["identity"]["layout"]["dtype"] = dtype
    settings["identity"]["hash_seed"] = tenant if tenant != "auto" else ""
    settings |= {"blocks_per_chunk": per_chunk, "stall_s": seconds, "io": io}
    config = StoreConfig.from_dict(settings)
    assert StoreConfig.from_dict(config.to_dict()) == config
    assert StoreConfig.from_json(json.dumps(config.to_dict())) == config


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
all_keys = [".".join(path) for path, _ in _leaves(StoreConfig)] + ["identity", "host", "disk", "identity.layout"]


@given(key=st.sampled_from(all_keys), value=json_values)
def test_any_value_is_taken_or_refused_with_its_key(key: str, value: object) -> None:
    try:
        config = StoreConfig.from_dict(changed(key, value))
    except ConfigError as e:
        assert key in str(e)
    else:
        assert StoreConfig.from_dict(config.to_dict()) == config


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        HostTierConfig(num_blocks=4).num_blocks = 5  # type: ignore[misc]


@pytest.mark.parametrize("tier", ["disk", "shared"])
def test_a_journal_has_a_directory_of_its_own(tier: str) -> None:
    with pytest.raises(ConfigError, match=rf"journal\.path: .* is {tier}\.path too"):
        StoreConfig.from_dict(changed("journal.path", FULL[tier]["path"] + "/."))
