"""Real weights: where the massive activations of SmolLM2-135M are, found without being told."""

from __future__ import annotations

from typing import Any

import pytest

import moescope as ms
from moescope.analysis_api import analyze
from moescope.store.store import Store

TEXTS = (
    "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is Madrid.",
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I went to sea.",
)


@pytest.mark.slow
def test_massive_activations_of_smollm2_are_on_the_first_token_in_channel_507(smollm2: Any, store: Store) -> None:
    run = ms.record(smollm2, list(TEXTS), store, name="smollm2", probes=("tokens", "residual"), progress=False)
    assert run.status == "complete"
    result = analyze(run, "massive_activations")
    assert result.title.startswith("Massive activations form in block 11, on the first token of 2 of 2 texts")
    places = result.df().query("metric == 'massive at token'").set_index("channel")
    assert {507, 247} <= set(places.index), "lesser channels qualify too"
    assert (places["position"] == 0).all()
    largest = places.loc[507]
    assert (largest["layer"], largest["last_layer"], largest["layers"], largest["n"]) == (11, 27, 17, 2)
    found = run.store.fetch(
        """
        SELECT t.sequence_id, list(m.layer ORDER BY m.layer), min(abs(m.value)), min(m.ratio)
        FROM massive_activations m
        JOIN tokens t USING (run_id, token)
        WHERE run_id = ? AND m.channel = 507
        GROUP BY ALL
        ORDER BY 1
        """,
        [run.run_id],
    )
    assert [row[:2] for row in found] == [(0, list(range(11, 28))), (1, list(range(11, 28)))]
    assert all(smallest > 20_000 and ratio >= 1000 for *_, smallest, ratio in found)
    means = result.df().query("metric == 'mean of maxima'")
    assert means.loc[means["massive"].astype(bool), "layer"].tolist() == list(range(11, 28))
