from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

_SPEC = importlib.util.spec_from_file_location("planted", Path(__file__).parent / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
planted: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted"] = planted
_SPEC.loader.exec_module(planted)


@pytest.fixture
def Plan() -> Any:
    return planted.Plan


@pytest.fixture
def Text() -> Any:
    return planted.Text


@pytest.fixture
def store_of(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    opened: list[Store] = []

    def make(*plans: Any) -> Store:
        opened.append(planted.planted_store(tmp_path / f"{len(opened)}.duckdb", *plans))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def run(store_of: Callable[..., Store], Plan: Any) -> Any:
    """One complete mixture-of-experts run."""
    return store_of(Plan()).run("planted")
