"""Known features, found again: our training from shards beside SAELens' own trainer, on the same synthetic vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moescope.sae.training.batches import TensorBatches
from moescope.sae.training.train import train

FEATURES, WIDTH, VECTORS, ACTIVE = 64, 32, 30_000, 5
BATCH, EPOCHS, RATE = 256, 10, 3e-3
SITE = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def synthetic() -> tuple[torch.Tensor, torch.Tensor]:
    """SAELens' synthetic model: its features [feature, component], and vectors [row, component] in which five are active."""
    from sae_lens.synthetic import ActivationGenerator, FeatureDictionary, orthogonal_initializer

    with torch.random.fork_rng():
        torch.manual_seed(1234)
        features = FeatureDictionary(FEATURES, WIDTH, initializer=orthogonal_initializer(100))
        drawn = ActivationGenerator(FEATURES, ACTIVE / FEATURES, std_firing_magnitudes=0.1)
        with torch.no_grad():
            return features.feature_vectors.detach().clone(), features(drawn.sample(VECTORS))


def _mean_max_cosine(true: torch.Tensor, decoder: torch.Tensor) -> float:
    """For every true feature the cosine of the decoder row nearest to it; the mean of these."""
    true, decoder = (w / w.norm(dim=-1, keepdim=True) for w in (true, decoder))
    return float((true @ decoder.T).max(dim=-1).values.mean())


def _saelens_own(vectors: torch.Tensor) -> torch.Tensor:
    import sae_lens
    from sae_lens.config import LoggingConfig, SAETrainerConfig

    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=FEATURES, k=ACTIVE))
    config = SAETrainerConfig(
        total_training_samples=EPOCHS * VECTORS // BATCH * BATCH, train_batch_size_samples=BATCH, lr=RATE, lr_end=RATE,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae_lens.SAETrainer(cfg=config, sae=module, data_provider=TensorBatches(vectors, BATCH, seed=1)).fit()
    found: torch.Tensor = module.W_dec.detach()
    return found


@pytest.mark.slow
def test_features_are_found_as_saelens_finds_them(
    synthetic: tuple[torch.Tensor, torch.Tensor], plant_run: Callable[..., Any]
) -> None:
    true, vectors = synthetic
    theirs = _mean_max_cosine(true, _saelens_own(vectors))
    run = plant_run({SITE: vectors.numpy()})
    (ours,) = train(
        run, run.store, f"topk:d={FEATURES},k={ACTIVE},lr={RATE}", site=SITE, vectors=EPOCHS * VECTORS, batch_size=BATCH,
        held_out=0, skip_first=0, progress=False,
    )  # fmt: skip
    found = _mean_max_cosine(true, ours.decoder)
    assert theirs > 0.9
    assert found > 0.9
    assert found > 0.98 * theirs
    assert int((ours.encode(vectors) > 0).sum(-1).max()) == ACTIVE
    random = torch.randn(FEATURES, WIDTH, generator=torch.Generator().manual_seed(0))
    assert _mean_max_cosine(true, random) < 0.6
