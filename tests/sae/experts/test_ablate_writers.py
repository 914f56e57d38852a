"""A latent without its writers: planted, so that what is left is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.sae.experts.ablate_writers import ablate_writers

LENGTHS = [22, 18, 25, 16, 21, 19, 24, 17]


@pytest.fixture
def planted(tiny_model: Callable[..., Any]) -> tuple[Any, torch.Tensor]:
    """A Mixtral of 8 experts, of which expert 3 alone writes along the first direction."""
    module = tiny_model("mixtral", num_local_experts=8)
    d = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q[:6].contiguous()
    with torch.no_grad():
        down = module.model.layers[0].mlp.experts.down_proj
        down -= torch.einsum("d,em->edm", d[0], torch.einsum("d,edm->em", d[0], down))
        down[3] += 2.0 * torch.outer(d[0], torch.ones(down.shape[2]))
    return module, d


def test_without_its_only_writer_a_latent_is_gone_and_other_experts_leave_it_whole(
    planted: tuple[Any, torch.Tensor], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module, directions = planted
    run = record_ids(module, token_ids(LENGTHS))
    autoencoder = planted_autoencoder("blocks.0.hook_mlp_out", directions, threshold=0.05)
    (found,) = ablate_writers(
        autoencoder,
        ms.load(module),
        store,
        run=run,
        features=[0],
        writers=1,
        controls=4,
        least_active=5,
        progress=False,
    )
    assert found.experts == (3,)
    assert found.drop[0] == pytest.approx(1.0, abs=1e-5)
    assert all(abs(drop) < 1e-5 for drop in found.control_drops)
    assert len(found.control_drops) == 4
    assert found.more[1] > 0.99
    assert all(3 not in experts for experts in found.controls)
    row = store.sql("SELECT * FROM feature_experts WHERE metric = 'ablation_drop'").df().iloc[0]
    assert row["value"] == found.drop[0]
    assert row["n"] == found.n > 5
    assert row["null_value"] == pytest.approx(0.0, abs=1e-5)
    taken = store.fetch("SELECT expert FROM feature_experts WHERE metric = 'ablated_writer'")
    assert taken == [(3,)]


def test_drop_is_that_of_a_model_whose_experts_were_zeroed_by_hand(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any, plain_passes: Callable[..., Any],
) -> None:  # fmt: skip
    module = tiny_model("qwen3_moe")
    sequences = token_ids(LENGTHS)
    run = record_ids(module, sequences)
    directions = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2))).Q[:6].contiguous()
    autoencoder = planted_autoencoder("blocks.0.hook_resid_post", directions, threshold=0.2)
    found = ablate_writers(
        autoencoder,
        ms.load(module),
        store,
        run=run,
        features=[1, 4],
        writers=2,
        controls=2,
        least_active=5,
        progress=False,
    )

    def activity(feature: int) -> np.ndarray[Any, Any]:
        values = []
        for batch in plain_passes(module, sequences):
            acts = torch.relu(batch.resid[0] @ directions[feature] - 0.2)
            values += [acts[row, 1 : int(batch.mask[row].sum())] for row in range(len(batch.ids))]
        return torch.cat(values).numpy()

    down = module.model.layers[0].mlp.experts.down_proj
    for one in found:
        before = activity(one.feature)
        whole = down.detach().clone()
        for experts, drop in ((one.experts, one.drop[0]), *zip(one.controls, one.control_drops, strict=True)):
            with torch.no_grad():
                down[list(experts)] = 0
            after = activity(one.feature)
            with torch.no_grad():
                down.copy_(whole)
            assert drop == pytest.approx(1 - after[before > 0].sum() / before.sum(), rel=1e-3, abs=1e-5)


def test_strongest_latents_are_found_and_measured_again_in_their_place(
    planted: tuple[Any, torch.Tensor], record_ids: Callable[..., Any], token_ids: Callable[..., Any],
    planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module, directions = planted
    run = record_ids(module, token_ids(LENGTHS))
    autoencoder = planted_autoencoder("blocks.0.hook_mlp_out", directions, threshold=0.05)
    for _ in range(2):
        found = ablate_writers(
            autoencoder, ms.load(module), store, run=run, top=2, writers=1, controls=2, least_active=5, progress=False
        )
        assert found[0].feature == 0
        assert store.fetch("SELECT count(*) FROM feature_experts WHERE metric = 'ablation_drop'") == [(2,)]


@pytest.mark.parametrize(
    ("site", "change", "message"),
    [
        ("blocks.0.hook_mlp_out", {"features": [0], "least_active": 100_000}, "latent 0 is active on"),
        ("blocks.0.hook_mlp_out", {"writers": 0}, "are 1 or more"),
        ("blocks.0.hook_resid_pre", {}, "no expert writes into"),
        ("blocks.0.mlp.experts.hook_out", {}, "experts' own outputs"),
    ],
)
def test_ablation_that_cannot_be_is_refused(
    site: str, change: dict[str, Any], message: str, planted: tuple[Any, torch.Tensor], record_ids: Callable[..., Any],
    token_ids: Callable[..., Any], planted_autoencoder: Callable[..., Any], store: Any,
) -> None:  # fmt: skip
    module, directions = planted
    run = record_ids(module, token_ids([9, 8]))
    autoencoder = planted_autoencoder(site, directions)
    with pytest.raises(InputError, match=message):
        ablate_writers(autoencoder, ms.load(module), store, run=run, progress=False, **change)
