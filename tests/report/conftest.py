"""Planted runs for reports: the plan and the planting live in `tests/routing/planted.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moescope.store.store import Store


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """The module `planted.py`: `Plan`, `Router`, `Stream`, `plant`, `insert`, `HOSTILE`."""
    spec = importlib.util.spec_from_file_location(
        "moescope_tests_planted", Path(__file__).parents[1] / "routing" / "planted.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("report") / "runs.duckdb") as opened:
        yield opened
