"""Massive activations as they are recorded: every channel that qualifies, against loops over the model's own block outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moescope as ms
from moescope.probes.recorders import massive_activations
from moescope.probes.recorders.massive_activations import SiteValues, longer_lists, massive_rows
from moescope.probes.selection import largest_and_median

# The kernel a CPU takes, and the one of every other device.
KERNELS: tuple[Callable[..., Any], ...] = (longer_lists, longer_lists._init_fn)
CHANNEL = 7
Row = tuple[int, int, int, float, float]


def lower_median(sizes: list[float]) -> float:
    return sorted(sizes)[(len(sizes) - 1) // 2]


def by_loops(outputs: list[torch.Tensor], layer: int, first: int, prefill: list[int] | None = None) -> list[Row]:
    """(layer, token, channel, value, ratio) of one layer, from [position, d_model] of each sequence in turn."""
    found, token = [], first
    for number, vectors in enumerate(outputs):
        seen = vectors[: prefill[number]] if prefill else vectors
        median = lower_median([abs(x) for row in seen.tolist() for x in row])
        for row in vectors.tolist():
            for channel, x in enumerate(row):
                if math.isfinite(x) and abs(x) > 100 and abs(x) >= 1000 * median:
                    found.append((layer, token, channel, x, abs(x) / median if median else math.inf))
            token += 1
    return found


def recorded(run: Any) -> list[Row]:
    query = "SELECT layer, token, channel, value, ratio FROM massive_activations WHERE run_id = ? ORDER BY ALL"
    return list(map(tuple, run.store.fetch(query, [run.run_id])))


def block_outputs(module: Any, ids: list[int]) -> list[torch.Tensor]:
    """[position, d_model] of each block for one unpadded sequence, seen from outside."""
    blocks = module.transformer.h if hasattr(module, "transformer") else module.model.layers
    found: dict[int, torch.Tensor] = {}

    def noting(number: int) -> Callable[[Any, Any, Any], None]:
        return lambda _m, _i, out: found.update(
            {number: (out[0] if isinstance(out, tuple) else out).squeeze(0).clone()}
        )

    handles = [block.register_forward_hook(noting(n)) for n, block in enumerate(blocks)]
    with torch.no_grad():
        module(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [found[n] for n in range(len(blocks))]


def near(found: list[Row], expected: list[Row]) -> None:
    """The same places; values as close as padding allows."""
    assert [row[:3] for row in found] == [row[:3] for row in sorted(expected)]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in sorted(expected)], rel=1e-4)
    assert [row[4] for row in found] == pytest.approx([row[4] for row in sorted(expected)], rel=1e-3)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    width=st.integers(3, 12),
    spikes=st.integers(0, 40),
    size=st.sampled_from([99.0, 1000.0, 3000.0]),
    left=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_every_massive_activation_is_found_wherever_it_stands(
    lengths: list[int], width: int, spikes: int, size: float, left: bool, dtype: torch.dtype, seed: int
) -> None:
    """Also where all channels of all tokens are, whichever side is padded, and whatever stands in the padding."""
    random = torch.Generator().manual_seed(seed)
    stream = torch.rand(len(lengths), 6, width, generator=random)
    for _ in range(spikes):
        row, place, channel = (int(torch.randint(n, (1,), generator=random)) for n in stream.shape)
        stream[row, place, channel] = size * (1 if channel % 2 else -1)
    mask = torch.arange(6)[None, :] < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    stream[~mask] = 1e6
    stream = stream.to(dtype)
    expected = by_loops([row[real].float() for row, real in zip(stream, mask, strict=True)], 4, 10)
    channels, medians = largest_and_median(stream, mask, 3)
    values = stream.gather(-1, channels)
    places = np.flatnonzero(mask.numpy())
    for kernel in KERNELS:
        positions, list_channels, list_values = kernel(stream, values, mask, medians)
        site = SiteValues(
            4,
            values.flatten(0, 1).float().numpy()[places],
            channels.flatten(0, 1).int().numpy()[places],
            medians.double().numpy()[places // 6],
            positions.numpy(),
            list_channels.numpy(),
            list_values.numpy(),
        )
        rows, missing = massive_rows(site, places, np.arange(10, 10 + len(places)), 6)
        assert missing == 0
        found = [] if rows is None else [tuple(row.values()) for row in rows.to_pylist()]
        assert [row[:4] for row in found] == [row[:4] for row in expected]
        assert [row[4] for row in found] == pytest.approx([row[4] for row in expected], rel=1e-9)


def test_the_operator_is_well_behaved() -> None:
    stream = torch.randn(2, 5, 6)
    given = (stream, stream[..., :3].contiguous(), torch.ones(2, 5, dtype=torch.bool), torch.ones(2))
    torch.library.opcheck(longer_lists, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_no_massive_activation(kernel: Callable[..., Any], bad: float) -> None:
    stream = torch.ones(1, 4, 8)
    stream[0, 1] = bad
    stream[0, 2, 5] = 5000.0
    mask = torch.ones(1, 4, dtype=torch.bool)
    channels, medians = largest_and_median(stream, mask, 3)
    values = stream.gather(-1, channels)
    positions, list_channels, list_values = kernel(stream, values, mask, medians)
    kept = [t.flatten(0, 1).numpy() for t in (values, channels.int())]
    lists = [t.numpy() for t in (positions, list_channels, list_values)]
    rows, _ = massive_rows(SiteValues(0, *kept, np.ones(4), *lists), np.arange(4), np.arange(4), 4)
    assert rows is not None
    assert rows.to_pylist() == [{"layer": 0, "token": 2, "channel": 5, "value": 5000.0, "ratio": 5000.0}]


def planted(
    tiny_model: Callable[..., Any], position: int, value: float = 2000.0, channels: int = 1, **config: Any
) -> Any:
    """A model that writes a bias at one position, into so many channels from `CHANNEL` on."""
    module = tiny_model("gpt2", hidden_size=64, **config)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.5)
        module.transformer.wpe.weight[position, CHANNEL : CHANNEL + channels] = value
    return module


@pytest.mark.parametrize("position", [0, 5])
def test_a_massive_activation_by_bias_is_found_at_its_token_and_channel(
    position: int, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """In every text long enough to have the position, and in no other."""
    module, sequences = planted(tiny_model, position), token_ids([9, 4, 12])
    run = record_ids(module, sequences, batch_size=2)
    assert run.status == "complete"
    found = recorded(run)
    starts = [start for start, ids in zip((0, 9, 13), sequences, strict=True) if len(ids) > position]
    assert {row[:3] for row in found} == {(layer, start + position, CHANNEL) for layer in (0, 1) for start in starts}
    expected, token = [], 0
    for ids in sequences:
        for layer, vectors in enumerate(block_outputs(module, ids)):
            expected += by_loops([vectors], layer, token)
        token += len(ids)
    near(found, expected)
    assert all(row[3] == pytest.approx(2000, rel=0.05) for row in found)


def test_a_model_without_any_has_no_rows_and_is_complete(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """What is large beside 100 but not beside the rest is not massive either."""
    small = record_ids(tiny_model("olmoe"), token_ids([8, 5]))
    flat = record_ids(planted(tiny_model, 0, 110.0), token_ids([8, 5]), name="flat")
    for run in (small, flat):
        assert run.status == "complete"
        assert recorded(run) == []


def test_padding_and_the_cut_into_batches_change_nothing(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, sequences = planted(tiny_model, 2, 3e4, channels=6), token_ids([3, 11, 1, 7, 20, 2])
    whole = recorded(record_ids(module, sequences, batch_size=6))
    assert len(whole) == 2 * 6 * 4
    for size in (1, 4):
        near(recorded(record_ids(module, sequences, name=f"{size}", batch_size=size)), whole)


def test_a_generated_token_is_measured_by_the_median_of_its_text(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    module, sequences = planted(tiny_model, 6, 1e4, channels=5, eos_token_id=None), token_ids([5, 6])
    run = record_ids(module, sequences, batch_size=2, generate=3)
    assert run.status == "complete"
    expected, token = [], 0
    for number, ids in enumerate(sequences):
        query = "SELECT token_id FROM tokens WHERE run_id = ? AND sequence_id = ? ORDER BY token"
        written = [row[0] for row in run.store.fetch(query, [run.run_id, number])]
        assert len(written) == len(ids) + 3
        for layer, vectors in enumerate(block_outputs(module, written)):
            expected += by_loops([vectors], layer, token, [len(ids)])
        token += len(written)
    assert {row[1] for row in expected} == {6, 8 + 6}
    near(recorded(run), expected)


def test_a_stopped_run_goes_on_to_the_same_rows(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any,
) -> None:  # fmt: skip
    from moescope.store.writer import RunWriter

    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 20)
    module, sequences = planted(tiny_model, 1), token_ids([7] * 12)
    unbroken = recorded(record_ids(module, sequences, batch_size=2))
    plain, calls = module.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return plain(*args, **kwargs)

    with ms.Store(tmp_path / "stopped.duckdb") as stopped:
        module.forward = failing
        with pytest.raises(KeyboardInterrupt):
            record_ids(module, sequences, batch_size=2, store=stopped)
        del module.forward
        assert 0 < len(recorded(stopped.run("run"))) < len(unbroken)
        run = record_ids(module, sequences, batch_size=2, store=stopped, resume=True)
        assert run.status == "complete"
        assert recorded(run) == unbroken


def test_more_than_fit_make_the_run_incomplete_and_say_so(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    limit = massive_activations.CHANNELS
    fits = record_ids(planted(tiny_model, 0, 1e6, channels=limit, num_hidden_layers=1), token_ids([20]), name="fits")
    assert fits.status == "complete"
    assert [(row[0], row[1]) for row in recorded(fits)] == [(0, 0)] * limit
    module = planted(tiny_model, 0, 1e6, channels=limit + 2, num_hidden_layers=1)
    run = record_ids(module, token_ids([20]), name="channels")
    assert run.status == "incomplete"
    said = run.coverage.df().query("status == 'invalid'")
    assert list(said["site"]) == ["blocks.0.hook_resid_post"]
    assert "1 tokens of a batch may have more massive activations than the record holds" in said["detail"].iloc[0]
    monkeypatch.setattr(massive_activations, "_TOKENS", 2)
    several = planted(tiny_model, 0, 1e6, channels=4, num_hidden_layers=1)
    with torch.no_grad():
        several.transformer.wpe.weight[1:3] = several.transformer.wpe.weight[:1]
    run = record_ids(several, token_ids([20]), name="tokens")
    assert run.status == "incomplete"
    assert len(recorded(run)) == 2 * 4 + 3, "what is known of the third token is kept"


def test_rows_join_their_token_text_and_norm(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """A row joins its token, its text and the norm recorded there."""
    run = record_ids(planted(tiny_model, 4), token_ids([9, 6]), batch_size=1)
    query = """
        SELECT t.position, r.norm >= abs(m.value), r.top_values[1] = m.value, r.top_channels[1] = m.channel,
            abs(m.value) / s.median_abs - m.ratio
        FROM massive_activations m
        JOIN tokens t USING (run_id, token)
        JOIN residual r USING (run_id, token, layer)
        JOIN residual_sequences s USING (run_id, sequence_id, layer)
    """
    rows = run.store.fetch(query)
    assert [row[:4] for row in rows] == [(4, True, True, True)] * 4
    assert [row[4] for row in rows] == pytest.approx([0] * 4, abs=1e-2)
