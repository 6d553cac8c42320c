"""Imports go one way, engines stay in their adapters, and nothing unpickles. `make check` runs this.

    what things are <- bytes <- who holds what <- tiers <- decisions <- connectors <- tools

A new module of kvstore gets its place in LAYERS, from the bottom up.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvstore

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kvstore", "connectors", "tools")
LAYERS = {
    "what things are": "strict_json errors layout byte_layout identity keys events config config_source",
    "bytes": "slot safetensors_header stored_format direct_io arena jobs copier process journal",
    "who holds what": "allocator index policy slot_table",
    "tiers": "tiers",
    "decisions": "manager promotion write_behind journal_writer io_messages io_service io_connection io_client"
    " io_process planes store lookup_buffer metrics",
    "for others": "prefix_file export journal_entries journal_view testing",
}
# The control plane knows keys and slots and never touches payload.
CONTROL_PLANE = "allocator index policy slot_table manager"
DATA_PLANE = "direct_io arena jobs copier tiers"
# Engines and transports, and the files that adapt them.
ADAPTERS = {
    "transformers": ("connectors/transformers.py", "tools/demo*.py"),
    "gguf": ("tools/demo*.py",),
    "tokenizers": ("tools/choice.py", "tools/demo*.py"),
    "vllm": ("connectors/vllm/*.py", "tools/bench/vllm*.py"),
    "nixl": ("connectors/nixl_process/agent.py", "tools/bench/network_peer.py"),
    "aiohttp": ("tools/proxy/*.py", "tools/demo_vllm/client.py"),
    "zmq": ("connectors/control/*.py",),
}
UNPICKLE = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "multiprocessing"}
UNPICKLE_CALLS = {"torch.load", "torch.save", "numpy.load", "numpy.save", "eval", "exec", "__import__"}
NO_PICKLE_CALLS = {"np.load", "np.save"}  # allowed with a literal allow_pickle=False
UNPICKLE_NAMES = {
    "ProcessPoolExecutor",
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}

FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
_LAYER_OF = {name: i for i, names in enumerate(LAYERS.values()) for name in names.split()}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, as a dotted name."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def part_of_kvstore(dotted: str) -> str | None:
    """The module or folder right below kvstore that a dotted name lies in."""
    package, _, rest = dotted.partition(".")
    return rest.partition(".")[0] if package == "kvstore" else None


@each_file
def test_imports_go_one_way(path: Path) -> None:
    inside = path.relative_to(ROOT).with_suffix("").parts
    allowed = PACKAGES[: PACKAGES.index(inside[0]) + 1]
    for name in imports(path):
        package = name.partition(".")[0]
        assert package not in PACKAGES or package in allowed, f"{path}: {inside[0]} must not import {name}"
        if inside[0] == "kvstore" and inside != ("kvstore", "__init__") and package == "kvstore":
            assert_not_above(path, inside[1], name)


def assert_not_above(path: Path, mine: str, name: str) -> None:
    other = part_of_kvstore(name)
    for module in (mine, other):
        assert module in _LAYER_OF, f"{path}: give {module!r} its place in LAYERS of {Path(__file__).name}"
    assert _LAYER_OF[mine] >= _LAYER_OF[other or ""], f"{path}: {mine} must not import {name}: its layer is above"
    in_control, to_data = mine in CONTROL_PLANE.split(), other in DATA_PLANE.split()
    assert not (in_control and to_data), f"{path}: {mine} is control plane and must not import {name}"


@each_file
def test_engines_are_imported_in_their_adapters_only(path: Path) -> None:
    for name in imports(path):
        places = ADAPTERS.get(name.partition(".")[0])
        if places is not None:
            here = any(path.relative_to(ROOT).match(place) for place in places)
            assert here, f"{path}: imports {name}, which only {' and '.join(places)} may"


@each_file
def test_nothing_unpickles(path: Path) -> None:
    for name in imports(path):
        assert name.partition(".")[0] not in UNPICKLE, f"{path}: imports {name}"
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in UNPICKLE_CALLS, f"{path}:{node.lineno}: {function}"
            safe = any(k.arg == "allow_pickle" and ast.unparse(k.value) == "False" for k in node.keywords)
            assert safe or function not in NO_PICKLE_CALLS, (
                f"{path}:{node.lineno}: {function} without allow_pickle=False"
            )
        if isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = {ast.Attribute: "attr", ast.Name: "id", ast.alias: "name"}[type(node)]
            assert getattr(node, name) not in UNPICKLE_NAMES, f"{path}:{node.lineno}: {getattr(node, name)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_no_engine(package: str) -> None:
    assert modules_after(f"import {package}", set(ADAPTERS) | {"pytest", "hypothesis"}) == []


def test_what_the_store_exports() -> None:
    """All that `from kvstore import *` gives; the store itself comes when it is asked for, and torch with it."""
    names = (
        "BlockKey DeviceTierConfig DiskTierConfig HostTierConfig JournalConfig KVIdentity KVLayout Placement"
        " SharedTierConfig StoreConfig StoreStats TieredStore hash_blocks"
    )
    assert kvstore.__all__ == names.split() and set(kvstore.__all__) <= set(dir(kvstore))
    assert all(getattr(kvstore, name).__module__.startswith("kvstore.") for name in kvstore.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        kvstore.nothing  # noqa: B018
    assert modules_after("import kvstore", {"torch"}) == []
    assert modules_after("from kvstore import TieredStore", {"torch"}) == ["torch"]


@pytest.mark.parametrize("module", ["ls", "ls_blocks", "stat", "top", "explain", "prefix_tree", "remove", "plan.plan"])
def test_what_only_looks_starts_without_torch(module: str) -> None:
    assert modules_after(f"import tools.cli, tools.{module}", {"torch", "matplotlib"}) == []


def modules_after(code: str, names: set[str]) -> list[str]:
    """Which of these modules a fresh interpreter has imported then."""
    code += f"; import sys; print(*sorted(set(sys.modules) & {names}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return done.stdout.split()


def test_layers_name_modules_once() -> None:
    names = " ".join(LAYERS.values()).split()
    assert len(names) == len(set(names))
    assert set(f"{CONTROL_PLANE} {DATA_PLANE}".split()) <= set(names)
