"""Planted truth and null: the expert that knows has an effect, its controls have none, and nothing is found where nothing is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

SEEDS = 200
MOST = 18  # the 99 % bound of how many of 200 intervals of 95 % exclude the truth


def rows_of(store: Any, effect_id: str, **columns: Any) -> list[dict[str, Any]]:
    where = " AND ".join(f"{name} = ${name}" for name in columns)
    query = f"SELECT * FROM effects WHERE effect_id = $effect AND {where} ORDER BY draw"
    return list(store.sql(query, {"effect": effect_id, **columns}).to_arrow_table().to_pylist())


def test_expert_that_alone_knows_a_class_has_an_effect_and_its_controls_have_none(
    knowing_module: Any, knowing_corpus: Any, store: Any, ablate: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.probes.effects.measure import measure_effect

    model = ms.load(knowing_module)
    effect = measure_effect(model, knowing_corpus, ablate(0, 0), store, controls=5, progress=False)
    assert len({control.edits[0].ids for control in effect.controls}) == 5
    assert all(0 not in control.edits[0].ids for control in effect.controls)
    (target,) = rows_of(store, effect.effect_id, kind="target", group_kind="all", metric="delta_nll")
    assert target["ci_low"] > 0.1
    controls = rows_of(store, effect.effect_id, kind="control", group_kind="all", metric="delta_nll")
    assert len(controls) == 5
    for control in controls:
        assert control["ci_low"] <= 0 <= control["ci_high"]
    by_label = {
        row["group_value"]: row
        for row in rows_of(store, effect.effect_id, kind="target", group_kind="label", metric="delta_nll")
    }
    assert by_label["known"]["ci_low"] > 1
    assert by_label["others"]["value"] == by_label["others"]["ci_high"] == 0, "nobody asks the expert there"
    flips = rows_of(store, effect.effect_id, kind="target", group_kind="label", group_value="known", metric="flips")
    assert flips[0]["value"] == 1, "without it the model says the token again"


def test_answer_says_that_it_is_beyond_its_controls(
    knowing_module: Any, knowing_corpus: Any, store: Any, ablate: Callable[..., Any]
) -> None:
    import moescope as ms
    from moescope.effect_api import effect

    answer = effect(ms.load(knowing_module), knowing_corpus, ablate(0, 0), store, progress=False)
    frame = answer.df().set_index(["metric", "kind"])
    beyond = frame.loc[("delta_nll", "difference")]
    assert beyond["ci_low"] > 0.1
    assert beyond["rank_p"] == pytest.approx(1 / 6)
    assert answer.title.startswith("Removing L0E0 raises NLL by ")
    assert "5 matched controls 0.0" in answer.title
    nothing = effect(ms.load(knowing_module), knowing_corpus, ablate(0, 3), store, controls=3, progress=False)
    assert "by exactly 0 nats" in nothing.title or "does not surely change NLL" in nothing.title


def _paired(random: np.random.Generator, *, shift: float) -> list[Any]:
    """Batches whose ΔNLL has the mean `shift`, with documents of two parts that differ from each other."""
    from moescope.probes.batches import Batch, Sequence
    from moescope.probes.corpus import Document
    from moescope.probes.effects.paired import PairedBatch

    batches = []
    for number in range(10):
        lengths = random.integers(8, 30, 8)
        text = Document("", "a" if number % 2 else "b", "", {})
        sequences = tuple(
            Sequence(8 * number + i, 4 * number + i // 2, text, i % 2, "", random.integers(0, 50, n))
            for i, n in enumerate(lengths)
        )
        batch = Batch(number, sequences, 0)
        ids, mask = batch.padded(0)
        predicted = mask & (np.arange(mask.shape[1]) > 0)
        of_document = np.repeat(random.normal(0, 0.3, 4), 2)[:, None]
        delta = np.where(predicted, shift + of_document + random.normal(0, 1.0, mask.shape), 0.0)
        zero = np.zeros_like(delta)
        batches.append(
            PairedBatch(batch, ids, predicted, zero + predicted, delta[None], np.abs(delta)[None], zero[None])
        )
    return batches


def _intervals(seed: int, *, shift: float = 0.0) -> dict[tuple[str, str | None], tuple[float, float]]:
    from moescope.probes.effects.intervals import token_rows
    from moescope.probes.effects.tally import Tally

    tally = Tally(groups=("label", "position"))
    for paired in _paired(np.random.default_rng(seed), shift=shift):
        tally.add(paired)
    tallied = tally.done()
    (rows,) = token_rows(tallied, [tallied.of(0)], seed=seed)
    found = {}
    for row in rows:
        if row.metric == "delta_nll":
            assert row.ci_low is not None
            assert row.ci_high is not None
            found[row.group_kind, row.group_value] = (row.ci_low, row.ci_high)
    return found


def test_where_nothing_is_planted_few_intervals_exclude_zero() -> None:
    excluding: dict[tuple[str, str | None], int] = {}
    for seed in range(SEEDS):
        for group, (low, high) in _intervals(seed).items():
            excluding[group] = excluding.get(group, 0) + (low > 0 or high < 0)
    assert excluding["all", None] <= MOST, excluding
    assert excluding["all", None] >= 2, "intervals of 95 % exclude it now and then"


def test_where_something_is_planted_the_interval_finds_it() -> None:
    found = [_intervals(seed, shift=0.3)["all", None] for seed in range(20)]
    assert all(low > 0 for low, _ in found)
    assert np.mean([low <= 0.3 <= high for low, high in found]) > 0.8


def test_difference_from_controls_that_do_the_same_rarely_excludes_zero() -> None:
    from moescope.routing.effects.against_controls import beyond_controls

    excluding = 0
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        n = random.integers(20, 60, 40).astype(float)
        # Documents differ in how far any edit moves them; all edits move them alike.
        sensitivity = random.normal(1.0, 0.5, 40)
        every = n * sensitivity + random.normal(0, 1.0, (6, 40)) * np.sqrt(n)
        found = beyond_controls(every[0], every[1:], n, draws=400, seed=seed)
        excluding += found.ci_low > 0 or found.ci_high < 0
    assert excluding <= MOST


def test_rank_of_an_effect_among_its_controls_is_even_where_it_is_one_of_them() -> None:
    from moescope.routing.effects.against_controls import beyond_controls

    ranks = []
    for seed in range(SEEDS):
        random = np.random.default_rng(seed)
        sums = random.normal(0, 1, (5, 12))
        ranks.append(beyond_controls(sums[0], sums[1:], np.ones(12), draws=10, seed=seed).rank_p)
    counts = np.array([np.isclose(ranks, k / 5).sum() for k in range(1, 6)])
    assert counts.sum() == SEEDS
    assert ((counts - SEEDS / 5) ** 2 / (SEEDS / 5)).sum() < 13.3, counts  # χ² of 4, 99 %


def test_controls_that_differ_widen_the_interval() -> None:
    from moescope.routing.effects.against_controls import beyond_controls

    n = np.full(30, 10.0)
    target = 2 * n
    alike, apart = np.tile(n, (4, 1)), np.outer([0.0, 0.5, 1.5, 2.0], n)
    narrow = beyond_controls(target, alike, n, draws=500, seed=0)
    wide = beyond_controls(target, apart, n, draws=500, seed=0)
    assert narrow.value == wide.value == 1.0
    assert narrow.ci_low == narrow.ci_high == 1.0
    assert wide.ci_low < 0.7
    assert wide.ci_high > 1.3


def test_a_control_is_divided_by_its_own_tokens() -> None:
    """A text too short for a measure under one variant counts in that one's mean no more than in its sum."""
    from moescope.routing.effects.against_controls import beyond_controls

    target, n = np.array([5.0, 5.0]), np.array([10.0, 10.0])
    controls, control_n = np.array([[5.0, 0.0]]), np.array([[10.0, 0.0]])
    assert beyond_controls(target, controls, n, control_n, draws=50, seed=0).value == 0.0
