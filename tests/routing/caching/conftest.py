"""The caches written to be read, for every test of the compiled ones."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"moescope_tests_{name}", Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def brute() -> ModuleType:
    """The module `brute_caches.py`."""
    return _loaded("brute_caches")


@pytest.fixture(scope="session")
def in_numpy() -> ModuleType:
    """The module `numpy_caches.py`, which the benchmark times."""
    return _loaded("numpy_caches")
