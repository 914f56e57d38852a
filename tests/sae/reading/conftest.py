"""Planted activations: an autoencoder whose latents are the components of its vectors, on runs whose vectors are planted."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

DOCUMENTS, LENGTH, IDS = 24, 40, 20
LABELS = ["a", "b", "c"]


def _loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("moescope_tests_planted_for_reading", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def planted_runs() -> ModuleType:
    """`tests/routing/planted.py`."""
    return _loaded(Path(__file__).parents[2] / "routing" / "planted.py")


@pytest.fixture
def store(store: Any) -> Any:
    """A fresh store that knows the autoencoders of `components`, by their width."""
    return with_autoencoders(store)


def with_autoencoders(store: Any) -> Any:
    """Rows of the autoencoders of `components`."""
    for width in (2, 4, 11, 12, 32, 40, 128, 192):
        store.connection.execute(
            "INSERT INTO saes (sae_id, name, site, architecture, d_sae) VALUES (?, ?, 'blocks.0.hook_resid_post', 'planted', ?)",
            [str(uuid.UUID(int=width)), f"components {width}", width],
        )
    return store


@pytest.fixture(scope="session")
def components() -> Callable[..., Any]:
    """`components(width, site, **fields)`: an `Autoencoder` whose latent i is component i where that is over 0."""
    import torch

    from moescope.core.sites import Site
    from moescope.sae.autoencoder import Autoencoder

    def make(width: int, site: str = "blocks.0.hook_resid_post", *, decoder: Any = None, **fields: Any) -> Autoencoder:
        weights = torch.eye(width) if decoder is None else torch.as_tensor(decoder, dtype=torch.float32)
        module = SimpleNamespace(
            cfg=SimpleNamespace(d_in=width, d_sae=width, normalize_activations="none"),
            W_dec=weights,
            dtype=torch.float32,
            encode=torch.relu,
        )
        identity = str(fields.pop("sae_id", uuid.UUID(int=width)))
        named = {
            "name": "components",
            "target_site": None,
            "expert": None,
            "row": {"settings": {"skip_first": 0}},
            **fields,
        }
        return Autoencoder(sae_id=identity, site=Site.parse(site), module=module, **named)

    return make


@dataclass
class Plant:
    """What was planted: the run, [token, latent] activations, token ids, documents and labels of tokens."""

    run: Any
    activations: Any
    ids: Any
    document: Any
    labels: list[str]

    @property
    def label(self) -> Any:
        return np.array(self.labels)[self.document]


@pytest.fixture
def plant(store: Any, planted_runs: ModuleType) -> Callable[..., Plant]:
    """`plant(activations, ids=…, labels=…, name=…)`: a run of `DOCUMENTS` texts of `LENGTH` tokens with these vectors."""

    def make(activations: Any, **fields: Any) -> Plant:
        return planted_run(store, planted_runs, activations, **fields)

    return make


def planted_run(
    store: Any,
    planted_runs: ModuleType,
    activations: Any,
    *,
    ids: Any = None,
    labels: list[str] | None = None,
    vectors: Any = None,
    name: str = "run",
) -> Plant:
    """Write the run."""
    ids = token_ids() if ids is None else ids
    labels = [LABELS[d % 3] for d in range(DOCUMENTS)] if labels is None else labels
    plan = planted_runs.Plan(
        lengths=[LENGTH] * DOCUMENTS, labels=labels, ids=ids.tolist(), vocabulary={i: f" t{i}".encode() for i in range(IDS)},
        vectors=vectors or {"blocks.0.hook_resid_post": planted_runs.Vectors(activations)},
    )  # fmt: skip
    run = planted_runs.plant(store, plan, name=name)
    return Plant(run, activations, ids, np.repeat(np.arange(DOCUMENTS), LENGTH), labels)


def token_ids(seed: int = 0) -> Any:
    """Random ids of the planted texts."""
    return np.random.default_rng(seed).integers(0, IDS, DOCUMENTS * LENGTH)


def planted_activations() -> Any:
    """[token, 12] latents of known meaning, float32.

    0 fires on token id 3; 1 at random; 2 on half the tokens of documents with label a; 3 never; 4 wherever 5 or 6 do, and
    elsewhere; 5 and 6 apart; 7 on most tokens; 8 after token id 5; 9 with one value; 10 and 11 at random.
    """
    random = np.random.default_rng(1)
    tokens = DOCUMENTS * LENGTH
    ids, document = token_ids(), np.repeat(np.arange(DOCUMENTS), LENGTH)
    fires = random.random((tokens, 12)) < 0.05
    fires[:, 0] = ids == 3
    fires[:, 2] = (document % 3 == 0) & (random.random(tokens) < 0.5)
    fires[:, 3] = False
    fires[:, 6] &= ~fires[:, 5]
    fires[:, 4] = fires[:, 5] | fires[:, 6]
    fires[:, 7] = random.random(tokens) < 0.6
    fires[:, 8] = (np.roll(ids, 1) == 5) & (np.arange(tokens) % LENGTH > 0)
    values = random.uniform(0.5, 4.0, (tokens, 12))
    values[:, 0] = random.uniform(1.9, 2.1, tokens)
    values[:, 8] = random.uniform(1.9, 2.1, tokens)
    values[:, 9] = 1.5
    return np.where(fires, values, -1.0).astype(np.float32)
