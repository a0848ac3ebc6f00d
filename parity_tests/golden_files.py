"""Finds the golden files: parity_tests/golden, or the folder that OSP_GOLDEN_DIR names."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path

import pytest

GOLDEN_DIR = Path(os.environ.get("OSP_GOLDEN_DIR") or Path(__file__).parent / "golden")


@lru_cache
def load(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def files(area: str, section: str) -> list[Path]:
    """Every `<area>_*.json` that holds `section`; key lists and other files of the area do not."""
    return [p for p in sorted(GOLDEN_DIR.glob(f"{area}_*.json")) if section in load(p)]


def items(area: str, section: str, name) -> list:
    """pytest parameters (golden file content, item) for each item of a list-valued section; `name(item)` labels it."""
    return [
        pytest.param(load(p), item, id=f"{p.stem}-{name(item)}")
        for p in files(area, section)
        for item in load(p)[section]
    ]
