"""Interventions on massive activations: planted by a bias, set to zero and to their mean, against loops over a plain model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import moescope as ms
from moescope.core.errors import InputError
from moescope.probes.batches import BatchPlan
from moescope.probes.corpus import Corpus
from moescope.probes.edits.session import edited
from moescope.probes.phenomena.massive import (
    MassivePlaces,
    massive_places,
    other_channels,
    stream_means,
    to_mean,
    to_zero,
    without_mean,
)
from moescope.store.run import Run

CHANNEL, SIZE, MARK = 9, 5e4, 41


def plant_bias(module: Any, layer: int, token_id: int | None) -> Any:
    """The block adds 5·10⁴ to one channel, at the first token, or at every occurrence of one token id."""
    fed: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, named: dict[str, torch.Tensor]) -> None:
        fed[:] = [named["input_ids"]]

    block = module.model.layers[layer]
    plain = block.forward

    def forward(*args: Any, **named: Any) -> Any:
        output = plain(*args, **named)
        out = (output[0] if isinstance(output, tuple) else output).clone()
        if token_id is None:
            out[:, 0, CHANNEL] += SIZE
        else:
            out[..., CHANNEL] += SIZE * (fed[0] == token_id)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    module.register_forward_pre_hook(note, with_kwargs=True)
    block.forward = forward  # part of the model: hooks, edits among them, come after it
    return module


@pytest.fixture
def planted(
    tiny_model: Callable[..., Any], record_ids: Callable[..., Any], request: pytest.FixtureRequest
) -> Callable[..., tuple[Any, Run, list[list[int]]]]:
    def make(token_id: int | None) -> tuple[Any, Run, list[list[int]]]:
        module = plant_bias(tiny_model("llama", num_hidden_layers=4), 1, token_id)
        random = np.random.default_rng(1)
        sequences = [random.integers(1, 40, n).tolist() for n in (9, 12, 7)]
        if token_id is not None:
            for row, place in zip(sequences, (5, 3, 2), strict=True):
                row[place] = token_id
        run = record_ids(module, sequences, name=request.node.name[:40], batch_size=2)
        assert run.status == "complete"
        return module, run, sequences

    return make


def test_a_bias_on_first_tokens_is_found_with_token_and_channel(planted: Any) -> None:
    _, run, sequences = planted(None)
    found = massive_places(run)
    assert found is not None
    assert (found.layer, found.channel) == (1, CHANNEL)
    assert found.places == dict.fromkeys(range(len(sequences)), 0)
    assert (found.first_channels, found.other_channels) == ((CHANNEL,), ())
    assert found.on_first_tokens
    assert found.value == pytest.approx(SIZE, rel=0.01)


def test_a_bias_on_a_later_token_is_found_at_its_place(planted: Any) -> None:
    _, run, _ = planted(MARK)
    found = massive_places(run)
    assert found is not None
    assert (found.layer, found.channel) == (1, CHANNEL)
    assert found.places == {0: 5, 1: 3, 2: 2}
    assert (found.first_channels, found.other_channels) == ((), (CHANNEL,))


def test_a_plain_model_has_no_place(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    assert massive_places(record_ids(tiny_model("llama"), token_ids((6, 9)))) is None


@pytest.mark.parametrize("token_id", [None, MARK])
def test_zero_and_mean_change_the_stream_there_and_nowhere_else(planted: Any, token_id: int | None) -> None:
    module, run, sequences = planted(token_id)
    places = massive_places(run)
    model = ms.load(module)
    plan = BatchPlan(Corpus.from_token_ids(sequences), None, 2, 64, 97)
    means = stream_means(model, plan, places.layer, places.other_channels)
    plain = [_stream(module, row) for row in sequences]
    at = [places.places[number] for number in range(len(sequences))]
    by_hand = np.mean([float(out[place, CHANNEL]) for out, place in zip(plain, at, strict=True)])
    mean = means.first[CHANNEL] if token_id is None else means.massive[CHANNEL]
    assert mean == pytest.approx(by_hand, rel=1e-5)
    for intervention, value in ((to_zero(places), 0.0), (to_mean(places, means), by_hand)):
        with edited(model, intervention):
            changed = [_stream(module, row) for row in sequences]
        for before, after, place in zip(plain, changed, at, strict=True):
            expected = before.clone()
            expected[place, CHANNEL] = value
            torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
    for before, row in zip(plain, sequences, strict=True):
        assert torch.equal(before, _stream(module, row)), "outside nothing remains"


def test_controls_set_as_many_other_channels_at_first_tokens(planted: Any) -> None:
    module, run, sequences = planted(None)
    model, places = ms.load(module), massive_places(run)
    plan = BatchPlan(Corpus.from_token_ids(sequences), None, 2, 64, 97)
    means = stream_means(model, plan, places.layer, ())
    for own in (None, means):
        found = other_channels(model, places, own, draws=6, seed=3)
        assert len(found) == 6
        assert len({control.edits[0].channels for control in found}) > 1
        for control in found:
            (edit,) = control.edits
            assert CHANNEL not in edit.channels
            assert len(edit.channels) == 1
            assert edit.positions == "0:1"
            expected = None if own is None else tuple(own.first[c] for c in edit.channels)
            assert edit.values == (expected if expected is None else pytest.approx(expected))


def test_calibrating_on_nothing_is_refused(demo_model: Any) -> None:
    with pytest.raises(InputError, match="no text to calibrate on"):
        stream_means(demo_model, [], 0, ())


def test_means_of_channels_that_are_never_large_elsewhere_are_missing(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any]
) -> None:
    plan = BatchPlan(Corpus.from_token_ids(token_ids((5, 6))), None, 2, 64, 97)
    means = stream_means(ms.load(tiny_model("llama")), plan, 0, (1, 2))
    assert means.massive == {}
    assert means.texts == 2
    places = MassivePlaces(0, 1, 1, 200.0, 200.0, {0: 3}, (), (1,))
    assert to_mean(places, means).edits == (), "no mean is known: nothing is put in its place"
    assert without_mean(places, means) == (1,)


def _stream(module: Any, row: list[int]) -> torch.Tensor:
    """Output of block 1 for one sequence, in a plain pass."""
    seen: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        seen[:] = [(output[0] if isinstance(output, tuple) else output)[0].clone()]

    handle = module.model.layers[1].register_forward_hook(note)
    with torch.no_grad():
        module(input_ids=torch.tensor([row]), use_cache=False)
    handle.remove()
    return seen[0]
