"""Planted runs for the analyses: see `planted.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import settings

from moescope.store.run import Run
from moescope.store.store import Store

settings.register_profile("moescope", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("moescope")


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("moescope_tests_planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The module `planted.py`: `Plan`, `Router`, `Stream`, `plant`, `insert`, `HOSTILE`."""
    return _loaded(Path(__file__).parent / "planted.py")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store a test module; every planted run gets a name of its own."""
    with Store(tmp_path_factory.mktemp("planted") / "runs.duckdb") as opened:
        yield opened


@pytest.fixture(scope="module")
def plant(store: Store, planted: ModuleType) -> Callable[..., Run]:
    """`plant(lengths=…, routers=…, …)` writes a run and gives it back."""
    number = count()

    def make(*, status: str = "complete", name: str | None = None, **fields: Any) -> Run:
        return planted.plant(store, planted.Plan(**fields), name=name or f"run {next(number)}", status=status)

    return make
