"""Activity of latents read while the model runs is the one that its recorded vectors give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.sae.concepts.activity import read_activity


def test_live_and_recorded_activity_agree(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any], components: Any
) -> None:
    import moescope as ms

    module, sequences = tiny_model("llama"), token_ids([12, 7, 15, 9])
    site = "blocks.0.hook_resid_post"
    kept = record_ids(module, sequences, name="kept", probes=("tokens", "activations"), sites=[site])
    bare = record_ids(module, sequences, name="bare", probes=("tokens",))
    given: dict[str, Any] = {"sae": components(32, site), "layer": None, "block": "mlp", "most": 1000, "seed": 0}
    recorded = read_activity(kept, "latent", [3, 8], model=None, **given)
    live = read_activity(bare, "latent", [3, 8], model=ms.load(module), **given)
    for unit in (3, 8):
        assert live.places[unit].tolist() == recorded.places[unit].tolist() != []
        assert live.values[unit] == pytest.approx(recorded.values[unit], abs=1e-5)
    assert np.array_equal(live.known, recorded.known)
    with pytest.raises(InputError, match="pass the model, or record"):
        read_activity(bare, "latent", [3], model=None, **given)


def test_experts_are_active_where_they_were_chosen_by_weight_and_norm(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(
        tiny_model("qwen3_moe"), token_ids([12, 7, 15, 9]), probes=("tokens", "routing", "expert_outputs"), batch_size=2
    )
    found = read_activity(run, "expert", [5], sae=None, layer=1, block="mlp", model=None, most=1000, seed=0)
    rows = run.store.fetch(
        "SELECT r.token, r.experts, r.weights, o.norms FROM routing r JOIN expert_outputs o USING (run_id, token, layer, block) "
        "WHERE layer = 1 ORDER BY token"
    )
    expected = {
        token: weights[experts.index(5)] * norms[experts.index(5)]
        for token, experts, weights, norms in rows
        if 5 in experts
    }
    assert found.places[5].tolist() == list(expected)
    assert found.values[5] == pytest.approx(list(expected.values()), rel=1e-6)


def test_reading_fewer_tokens_takes_whole_documents(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    run = record_ids(tiny_model("qwen3_moe"), token_ids([10] * 8), probes=("tokens", "routing"))
    found = read_activity(run, "expert", [0], sae=None, layer=0, block="mlp", model=None, most=45, seed=0)
    assert len(found.tokens) == 40
    assert set(np.bincount(found.tokens.document)) == {0, 10}
