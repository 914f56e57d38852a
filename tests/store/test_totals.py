"""Running reductions: any cut of a run into batches gives the sums of one loop over its decisions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moescope.store.totals import ExpertPartial, LoadPartial, expert_rows, load_rows

EXPERTS = 4


@dataclass(frozen=True)
class Slot:
    """One token at one expert: weight, norm of the output, its largest |value| and channel; zeros among its 8 neurons."""

    token: int
    expert: int
    weight: float
    norm: float
    peak: float
    channel: int
    zeros: int = 0


def _loads(slots: list[Slot]) -> LoadPartial:
    tokens, weights = np.zeros(EXPERTS, np.int64), np.zeros(EXPERTS)
    for slot in slots:
        tokens[slot.expert] += 1
        weights[slot.expert] += slot.weight
    return LoadPartial(0, "mlp", "code", "prefill", tokens, weights)


def _experts(slots: list[Slot]) -> ExpertPartial:
    sums = {name: np.zeros(EXPERTS) for name in ("tokens", "weight", "norm", "weighted")}
    zeros = np.zeros(EXPERTS, np.int64)
    best: dict[int, Slot] = {}
    for slot in slots:
        sums["tokens"][slot.expert] += 1
        sums["weight"][slot.expert] += slot.weight
        sums["norm"][slot.expert] += slot.norm
        sums["weighted"][slot.expert] += slot.weight * slot.norm
        zeros[slot.expert] += slot.zeros
        if slot.expert not in best or slot.peak > best[slot.expert].peak:
            best[slot.expert] = slot
    peaks = [(best[e].peak, best[e].channel, best[e].token) if e in best else (-1.0, -1, -1) for e in range(EXPERTS)]
    value, channel, token = zip(*peaks, strict=True)
    return ExpertPartial(
        0, "mlp", sums["tokens"].astype(np.int64), sums["weight"], sums["norm"], sums["weighted"],
        np.array(value, np.float32), np.array(channel), np.array(token),
        8 * sums["tokens"].astype(np.int64), 8 * sums["tokens"].astype(np.int64) - zeros, zeros,
    )  # fmt: skip


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Slot], list[list[Slot]]]:
    """Slots of a run in token order, and the same cut into batches. Eighths add without rounding."""
    eighth = st.integers(0, 64).map(lambda n: n / 8)
    drawn = draw(
        st.lists(st.tuples(st.integers(0, EXPERTS - 1), eighth, eighth, st.integers(0, 3)), min_size=1, max_size=40)
    )
    slots = [Slot(t, e, w, n, float(p), (7 * t) % 5, (3 * t) % 9) for t, (e, w, n, p) in enumerate(drawn)]
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(slots) - 1)))))
    return slots, [slots[a:b] for a, b in pairwise([0, *cuts, len(slots)]) if a < b]


@given(runs())
def test_load_of_folded_batches_is_the_sum_over_slots(made: tuple[list[Slot], list[list[Slot]]]) -> None:
    slots, batches = made
    total = _loads(batches[0])
    for batch in batches[1:]:
        total.fold(_loads(batch))
    expected: defaultdict[int, tuple[int, float]] = defaultdict(lambda: (0, 0.0))
    for slot in slots:
        tokens, weight = expected[slot.expert]
        expected[slot.expert] = (tokens + 1, weight + slot.weight)
    assert [(int(t), float(w)) for t, w in zip(total.tokens, total.weight_sum, strict=True)] == [
        expected[e] for e in range(EXPERTS)
    ]


@given(runs())
def test_reductions_of_folded_batches_equal_one_loop_over_slots(made: tuple[list[Slot], list[list[Slot]]]) -> None:
    slots, batches = made
    total = _experts(batches[0])
    for batch in batches[1:]:
        total.fold(_experts(batch))
    for expert in range(EXPERTS):
        mine = [slot for slot in slots if slot.expert == expert]
        assert total.tokens[expert] == len(mine)
        assert total.weight_sum[expert] == sum(slot.weight for slot in mine)
        assert total.norm_sum[expert] == sum(slot.norm for slot in mine)
        assert total.weighted_norm_sum[expert] == sum(slot.weight * slot.norm for slot in mine)
        assert total.neurons[expert] == 8 * len(mine)
        assert total.zeros[expert] == sum(slot.zeros for slot in mine)
        assert total.active[expert] == sum(8 - slot.zeros for slot in mine)
        if mine:
            first = min((slot for slot in mine if slot.peak == max(s.peak for s in mine)), key=lambda slot: slot.token)
            found = total.max_abs_out[expert], total.max_abs_channel[expert], total.max_abs_token[expert]
            assert found == (first.peak, first.channel, first.token)
        else:
            assert (total.max_abs_out[expert], total.max_abs_token[expert]) == (-1, -1)


@given(runs(), st.integers(1, 5))
def test_folding_folded_chunks_gives_the_same_as_folding_batches(
    made: tuple[list[Slot], list[list[Slot]]], size: int
) -> None:
    _, batches = made
    one_by_one = _experts(batches[0])
    for batch in batches[1:]:
        one_by_one.fold(_experts(batch))
    chunks = []
    for start in range(0, len(batches), size):
        chunk = _experts(batches[start])
        for batch in batches[start + 1 : start + size]:
            chunk.fold(_experts(batch))
        chunks.append(chunk)
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole.fold(chunk)
    for name in (
        "tokens",
        "weight_sum",
        "norm_sum",
        "weighted_norm_sum",
        "max_abs_out",
        "max_abs_channel",
        "max_abs_token",
        "neurons",
        "active",
        "zeros",
    ):
        assert getattr(whole, name).tolist() == getattr(one_by_one, name).tolist()


def test_equal_maxima_keep_the_earlier_token_and_its_channel() -> None:
    early, late = Slot(3, 1, 1.0, 1.0, 9.0, 2), Slot(8, 1, 1.0, 1.0, 9.0, 4)
    total = _experts([early])
    total.fold(_experts([late]))
    assert (total.max_abs_token[1], total.max_abs_channel[1]) == (3, 2)


def test_expert_first_chosen_in_a_later_batch_takes_that_batchs_maximum() -> None:
    total = _experts([Slot(0, 0, 1.0, 1.0, 5.0, 1)])
    total.fold(_experts([Slot(1, 2, 1.0, 1.0, 0.0, 3)]))
    assert (total.max_abs_out[2], total.max_abs_token[2], total.max_abs_channel[2]) == (0.0, 1, 3)


def test_rows_of_all_experts_or_of_those_used() -> None:
    partial = _loads([Slot(0, 2, 0.5, 1.0, 1.0, 0), Slot(1, 2, 0.25, 1.0, 1.0, 0), Slot(2, 0, 1.0, 1.0, 1.0, 0)])
    whole = load_rows([partial], {}, only_used=False)
    used = load_rows([partial], {"batch": 7}, only_used=True)
    assert whole is not None
    assert used is not None
    assert whole["expert"].to_pylist() == [0, 1, 2, 3]
    assert whole["tokens"].to_pylist() == [1, 0, 2, 0]
    assert used.to_pylist() == [
        {
            "batch": 7,
            "layer": 0,
            "block": "mlp",
            "label": "code",
            "phase": "prefill",
            "expert": e,
            "tokens": t,
            "weight_sum": w,
        }
        for e, t, w in ((0, 1, 1.0), (2, 2, 0.75))
    ]


def test_nothing_gives_no_rows() -> None:
    assert load_rows([], {}, only_used=False) is None
    assert expert_rows([], {}, only_used=True) is None
