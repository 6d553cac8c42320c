"""Every benchmark runs at a small scale; figures are not asserted, their form is."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest

from kvstore.errors import ConfigError
from tools.bench import BENCHES, Scale, run

NEEDS = {
    "host": [pytest.mark.slow],
    "vllm": [
        pytest.mark.slow,
        pytest.mark.timeout(900),
        pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    ],
}


@pytest.mark.parametrize("what", [pytest.param(what, marks=NEEDS.get(what, [])) for what in BENCHES])
def test_runs_at_a_small_scale(what: str, tmp_path: Path) -> None:
    result = run(what, tmp_path, Scale(nbytes=32 << 20, num_keys=20_000, rounds=1))
    rows = json.loads(json.dumps(result.to_dict()))["rows"]
    assert rows
    for row in rows:
        assert all(math.isfinite(row[k]) and row[k] > 0 for k in ("rate", "raw_rate", "ratio")), row
        assert row["raw_is"] and row["floor"] >= 0
    assert len(result.parts()) == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="allowed: host, disk, shared, index"):
        run("gpu")
    with pytest.raises(ConfigError, match="not a directory"):
        run("host", tmp_path / "missing")
