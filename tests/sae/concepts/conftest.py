"""Runs whose experts and vectors are planted, so that what a concept is told by is known."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture(scope="session")
def planted() -> ModuleType:
    """`tests/routing/planted.py`."""
    path = Path(__file__).parents[2] / "routing" / "planted.py"
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_for_concepts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def plant(store: Any, planted: ModuleType) -> Callable[..., Any]:
    """`plant(name=…, lengths=…, …)` writes a run and gives it back."""

    def make(*, name: str = "planted", **fields: Any) -> Any:
        return planted.plant(store, planted.Plan(**fields), name=name)

    return make


@pytest.fixture(scope="session")
def components() -> Callable[..., Any]:
    """`components(width, site)`: an `Autoencoder` whose latent i is component i where that is over 0."""
    import torch

    from moescope.core.sites import Site
    from moescope.sae.autoencoder import Autoencoder

    def make(width: int, site: str = "blocks.0.hook_resid_post", *, row: dict[str, Any] | None = None) -> Autoencoder:
        module = SimpleNamespace(
            cfg=SimpleNamespace(d_in=width, d_sae=width), W_dec=torch.eye(width), dtype=torch.float32, encode=torch.relu
        )
        return Autoencoder(
            sae_id=str(uuid.UUID(int=width)), name="components", site=Site.parse(site), target_site=None, expert=None,
            module=module, row=row or {},
        )  # fmt: skip

    return make
