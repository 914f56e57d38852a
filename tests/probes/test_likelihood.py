"""`token_nll` against `log_softmax` in float64, for every float type and however the logits are cut into slices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.probes import likelihood
from moescope.probes.likelihood import token_nll


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    positions=st.integers(1, 9),
    vocabulary=st.integers(1, 40),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    offset=st.sampled_from([0.0, -800.0, 3000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    slice_elements=st.sampled_from([1, 40, 77, 1 << 20]),
    seed=st.integers(0, 2**31),
)
def test_token_nll_is_minus_log_softmax_of_the_token_before(
    rows: int,
    positions: int,
    vocabulary: int,
    spread: float,
    offset: float,
    dtype: torch.dtype,
    slice_elements: int,
    seed: int,
) -> None:
    """Softmax knows no common offset, however large; what little rounding of the offset costs, it costs both sides."""
    random = torch.Generator().manual_seed(seed)
    logits = (offset + spread * torch.randn(rows, positions, vocabulary, generator=random)).to(dtype)
    ids = torch.randint(vocabulary, (rows, positions), generator=random)
    before = logits.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(likelihood, "_SLICE_ELEMENTS", {"cpu": slice_elements})
        nll, best = token_nll(logits, ids)
    assert torch.equal(logits, before), "the model's logits are read, never written"
    assert nll.shape == best.shape == (rows, positions)
    assert nll.dtype == torch.float32
    assert nll[:, 0].isnan().all()
    logp = logits.double().log_softmax(-1)
    for row in range(rows):
        for position in range(1, positions):
            expected = -logp[row, position - 1, ids[row, position]]
            torch.testing.assert_close(nll[row, position].double(), expected, rtol=1e-5, atol=1e-5)
    first_largest = (logits == logits.amax(-1, keepdim=True)).numpy().argmax(-1)
    assert best.tolist() == first_largest.tolist()


def test_slices_do_not_change_a_single_bit() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, 33, generator=random)
    ids = torch.randint(33, (3, 50), generator=random)
    found = []
    for elements in (33, 100, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(likelihood, "_SLICE_ELEMENTS", {"cpu": elements})
            found.append(token_nll(logits, ids))
    for nll, best in found[1:]:
        assert torch.equal(nll[:, 1:], found[0][0][:, 1:])
        assert torch.equal(best, found[0][1])


def test_an_excluded_token_costs_infinity_and_harms_no_other() -> None:
    logits = torch.tensor([[[0.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf], [1.0, 1.0, 1.0]]])
    nll, _ = token_nll(logits, torch.tensor([[0, 1, 2]]))
    assert nll[0, 1].item() == pytest.approx(0.6931472, abs=1e-6)
    assert nll[0, 2].item() == float("inf")


def test_a_wholly_certain_model_loses_nothing() -> None:
    logits = torch.full((1, 4, 5), -1e4)
    ids = torch.tensor([[3, 1, 4, 1]])
    logits[0, torch.arange(3), ids[0, 1:]] = 1e4
    nll, best = token_nll(logits, ids)
    assert nll[0, 1:].tolist() == [0.0, 0.0, 0.0]
    assert best[0, :3].tolist() == [1, 4, 1]


@pytest.mark.parametrize("spans", [[(0, 3), (4, 8), (9, 10)], [(1, 10)], []])
def test_places_outside_the_spans_are_left_out_and_the_others_are_as_without(spans: list[tuple[int, int]]) -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 7, generator=random)
    ids = torch.randint(0, 7, (2, 5), generator=random)
    inside = torch.zeros(10, dtype=torch.bool)
    for first, end in spans:
        inside[first:end] = True
    whole_nll, whole_best = token_nll(logits, ids)
    nll, best = token_nll(logits, ids, spans=spans)
    assert torch.equal(best.flatten()[inside], whole_best.flatten()[inside])
    assert not best.flatten()[~inside].any()
    # The loss at a place comes from the logits of the one before it.
    predicted = torch.cat([torch.zeros(2, 1, dtype=torch.bool), inside.reshape(2, 5)[:, :-1]], 1)
    assert torch.equal(nll[predicted], whole_nll[predicted])
    assert nll[~predicted].isnan().all()
