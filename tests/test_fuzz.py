"""A second of what `make fuzz` does for a minute; and that it would notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import fuzz


def test_every_parser_stands_it() -> None:
    assert fuzz.fuzz(3.0, 1) > 500


def test_a_parser_that_does_not_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(data: bytes, folder: Path) -> None:
        data.decode("ascii")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fuzz, "TARGETS", {"bad": (bad, [b"text"], ())})
    with pytest.raises(UnicodeDecodeError):
        fuzz.fuzz(5.0, 1)
    assert (tmp_path / "fuzz-bad.bin").exists()
