"""Recorded residual stream against the block outputs of the plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

LENGTHS = (7, 1, 12, 4, 9)


def real_rows(stream: Any, mask: Any) -> list[np.ndarray]:
    """[token, d_model] of each sequence of a batch, padding cut off, in float64."""
    return [row[: int(real.sum())].double().numpy() for row, real in zip(stream, mask, strict=True)]


def assert_recorded(run: Any, layers: dict[int, list[np.ndarray]], *, exact: bool) -> None:
    """`layers`: layer → [token, d_model] of each sequence of the corpus, in order."""
    query = "SELECT layer, token, norm, top_values, top_channels FROM residual WHERE run_id = ? ORDER BY layer, token"
    rows = run.store.fetch(query, [run.run_id])
    streams = {layer: np.concatenate(sequences) for layer, sequences in layers.items()}
    assert [row[:2] for row in rows] == [(layer, n) for layer in sorted(streams) for n in range(len(streams[layer]))]
    tolerance = 0.0 if exact else 1e-6
    for layer, token, norm, values, channels in rows:
        vector = streams[layer][token]
        largest = sorted(np.abs(vector), reverse=True)[:3]
        assert norm == pytest.approx(np.sqrt((vector**2).sum()), rel=1e-5)
        assert np.abs(values) == pytest.approx(largest, rel=tolerance, abs=0)
        assert len(set(channels)) == 3
        # Equal magnitudes may stand in either order, so each value is looked up where its channel says it is.
        assert values == pytest.approx([vector[channel] for channel in channels], rel=tolerance, abs=0)
    query = "SELECT layer, sequence_id, median_abs FROM residual_sequences WHERE run_id = ? ORDER BY layer, sequence_id"
    medians = run.store.fetch(query, [run.run_id])
    expected = [
        (layer, number, sorted(np.abs(sequence).ravel())[(sequence.size - 1) // 2])
        for layer in sorted(layers)
        for number, sequence in enumerate(layers[layer])
    ]
    assert [row[:2] for row in medians] == [row[:2] for row in expected]
    assert [row[2] for row in medians] == pytest.approx([row[2] for row in expected], rel=tolerance, abs=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "llama"])
def test_residual_equals_the_outputs_of_the_plain_blocks(
    family: str,
    dtype: str,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    plain_passes: Callable[..., Any],
) -> None:
    sequences = token_ids(LENGTHS)
    run = record_ids(tiny_model(family, dtype=dtype), sequences, batch_size=2)
    layers: dict[int, list[np.ndarray]] = {}
    for batch in plain_passes(tiny_model(family, dtype=dtype), sequences, 2):
        for layer, stream in batch.resid.items():
            layers.setdefault(layer, []).extend(real_rows(stream, batch.mask))
    assert len(layers) == run.info["anatomy"]["n_layers"]
    assert_recorded(run, layers, exact=True)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_residual_equals_hidden_states_up_to_the_last_block(
    family: str, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """`output_hidden_states`: entry L + 1 is block L's output, but the last entry is taken after the final norm."""
    module, sequences = tiny_model(family, num_hidden_layers=3), token_ids(LENGTHS)
    run = record_ids(module, sequences, batch_size=1)
    layers: dict[int, list[np.ndarray]] = {0: [], 1: []}
    for sequence in sequences:
        with torch.no_grad():
            states = module(input_ids=torch.tensor([sequence]), output_hidden_states=True).hidden_states
        for layer, found in layers.items():
            found.append(states[layer + 1][0].double().numpy())
    run.store.connection.execute("DELETE FROM residual WHERE layer = 2")
    run.store.connection.execute("DELETE FROM residual_sequences WHERE layer = 2")
    assert_recorded(run, layers, exact=False)


def test_the_median_of_an_even_count_is_the_lower_one(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """A model whose blocks add nothing passes its embeddings on: the values are known beforehand."""
    module = tiny_model("llama")
    with torch.no_grad():
        for block in module.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        module.model.embed_tokens.weight[5] = torch.arange(1.0, 33.0)  # lower median 16, upper median 17
        module.model.embed_tokens.weight[6] = -torch.arange(1.0, 33.0).flip(0)
    run = record_ids(module, [[5], [5, 6], [6]])
    assert run.store.fetch("SELECT DISTINCT median_abs FROM residual_sequences") == [(16.0,)]
    query = "SELECT DISTINCT top_values, top_channels FROM residual WHERE token = ? AND layer = 1"
    assert run.store.fetch(query, [0]) == [((32.0, 31.0, 30.0), (31, 30, 29))]
    assert run.store.fetch(query, [3]) == [((-32.0, -31.0, -30.0), (0, 1, 2))]
    norms = run.store.fetch("SELECT DISTINCT norm FROM residual")
    assert [norm for (norm,) in norms] == pytest.approx([(32 * 33 * 65 / 6) ** 0.5])
