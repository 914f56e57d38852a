"""Divergence between labels: closed forms of exclusive experts, counts by hand, shuffles and intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
BETWEEN, EXPERT, VARIATION = (
    "JS divergence between labels",
    "JS divergence of the expert's labels",
    "coefficient of variation over labels",
)


def _entropy(p: Sequence[float]) -> float:
    return -sum(x * math.log2(x) for x in p if x > 0)


def _divergence(parts: Sequence[Sequence[float]]) -> float:
    mean = [sum(column) / len(parts) for column in zip(*parts, strict=True)]
    return _entropy(mean) - sum(map(_entropy, parts)) / len(parts)


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_exclusive_experts_diverge_by_log2_of_the_labels(plant: Plant, planted: ModuleType, domains: int) -> None:
    labels = [f"domain {number}" for number in range(domains) for _ in range(3)]
    own = np.repeat(np.arange(domains), 3 * 4)
    # Each domain has two experts and every one of its tokens takes both.
    experts = np.stack([2 * own, 2 * own + 1], 1)
    run = plant(lengths=[4] * len(labels), labels=labels, routers=[planted.Router(experts, 2 * domains + 3)])
    result = analyze(run, "label_divergence")
    frame = result.df()
    assert frame[frame["metric"] == BETWEEN]["value"].tolist() == pytest.approx([math.log2(domains)])
    even, one = [1 / domains] * domains, [1.0] + [0.0] * (domains - 1)
    of_expert = frame[frame["metric"] == EXPERT].set_index("expert")["value"]
    assert of_expert.tolist() == pytest.approx([_divergence([one, even])] * 2 * domains)
    variation = frame[frame["metric"] == VARIATION].set_index("expert")["value"]
    assert variation.tolist() == pytest.approx([math.sqrt(domains)] * 2 * domains)
    assert any("3 experts" in note for note in result.notes)  # those nobody chose have no ratio
    assert (frame["null"] < frame["value"]).all()


def test_labels_that_use_experts_alike_do_not_diverge(plant: Plant, planted: ModuleType) -> None:
    experts = np.tile([[0], [1], [2], [0]], (6, 1))
    run = plant(lengths=[4] * 6, labels=["a", "b"] * 3, routers=[planted.Router(experts, 3)])
    frame = analyze(run, "label_divergence").df()
    assert frame["value"].abs().max() < 1e-9
    assert frame["null"].abs().max() < 1e-9
    assert frame["ci_high"].abs().max() < 1e-9


@given(data=st.data())
def test_values_equal_counts_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=6))
    more = data.draw(
        st.lists(st.sampled_from(["x", "y", "z", None]), min_size=len(lengths) - 2, max_size=len(lengths) - 2)
    )
    labels: list[str | None] = ["x", "y", *more]
    shapes = data.draw(st.sampled_from([((4, 1),), ((3, 2), (6, 3)), ((256, 8),)]))
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    routers = []
    for layer, (size, k) in enumerate(shapes):
        chosen = np.stack([generator.permutation(size)[:k] for _ in range(sum(lengths))])
        routers.append(planted.Router(chosen, size, layer=layer))
    run = plant(lengths=lengths, labels=labels, routers=routers)
    frame = analyze(run, "label_divergence", permutations=2, draws=3).df()
    of_token = [label for label, length in zip(labels, lengths, strict=True) for _ in range(length)]
    names = sorted({label for label in labels if label is not None})
    for router in routers:
        counts = {name: [0] * router.n_experts for name in names}
        tokens = dict.fromkeys(names, 0)
        for label, chosen in zip(of_token, router.experts.tolist(), strict=True):
            if label is None:
                continue
            tokens[label] += 1
            for expert in chosen:
                counts[label][expert] += 1
        mine = frame[frame["layer"] == router.layer]
        shares = [[c / sum(counts[name]) for c in counts[name]] for name in names]
        assert mine[mine["metric"] == BETWEEN]["value"].item() == pytest.approx(max(_divergence(shares), 0), abs=1e-12)
        used = [e for e in range(router.n_experts) if any(counts[name][e] for name in names)]
        assert mine[mine["metric"] == EXPERT]["expert"].tolist() == used
        for expert in used[:6]:
            ratio = [counts[name][expert] / tokens[name] for name in names]
            even = [1 / len(names)] * len(names)
            apart = _divergence([[r / sum(ratio) for r in ratio], even])
            mean = sum(ratio) / len(ratio)
            deviation = math.sqrt(sum((r - mean) ** 2 for r in ratio) / (len(ratio) - 1))
            row = mine[mine["expert"] == expert].set_index("metric")["value"]
            assert row[EXPERT] == pytest.approx(apart, abs=1e-9)
            assert row[VARIATION] == pytest.approx(deviation / mean)


def test_null_is_the_mean_over_all_relabellings(plant: Plant, planted: ModuleType) -> None:
    lengths, labels = [2, 3, 4, 3], ["a", "a", "b", "b"]
    experts = np.random.default_rng(4).integers(0, 3, (12, 1))
    run = plant(lengths=lengths, labels=labels, routers=[planted.Router(experts, 3)])
    row = analyze(run, "label_divergence", permutations=3000).df().iloc[0]
    document = np.repeat(np.arange(4), lengths)
    values = []
    for first in range(4):
        for second in range(first):
            inside = np.isin(document, [first, second])
            halves = [np.bincount(experts[mask, 0], minlength=3) / mask.sum() for mask in (inside, ~inside)]
            values.append(_divergence([half.tolist() for half in halves]))
    assert row["null"] == pytest.approx(np.mean(values), abs=4 * np.std(values) / math.sqrt(3000))


def test_without_an_effect_the_value_lies_among_its_shuffles(plant: Plant, planted: ModuleType) -> None:
    """Documents differ, labels do not: the divergence is far from 0, and so is its chance level."""
    generator = np.random.default_rng(1)
    excess = []
    for _ in range(12):
        preference = generator.dirichlet(np.full(6, 0.4), size=16)
        experts = np.concatenate([generator.choice(6, size=(12, 1), p=p) for p in preference])
        labels = generator.permutation(["a", "b"] * 8).tolist()
        run = plant(lengths=[12] * 16, labels=labels, routers=[planted.Router(experts, 6)])
        row = analyze(run, "label_divergence", permutations=60, draws=20).df().iloc[0]
        assert row["null"] > 0.01
        excess.append(row["value"] - row["null"])
    assert abs(np.mean(excess)) < 4 * np.std(excess) / math.sqrt(12)


def test_interval_holds_the_estimate_and_narrows_with_documents(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    widths = []
    for documents in (8, 64):
        odds = {"a": [0.6, 0.2, 0.2], "b": [0.2, 0.2, 0.6]}
        labels = ["a", "b"] * (documents // 2)
        experts = np.concatenate([generator.choice(3, size=(20, 1), p=odds[label]) for label in labels])
        run = plant(lengths=[20] * documents, labels=labels, routers=[planted.Router(experts, 3)])
        row = analyze(run, "label_divergence").df().iloc[0]
        assert row["ci_low"] < row["value"] < row["ci_high"]
        assert row["ci_low"] > row["null"]
        widths.append(row["ci_high"] - row["ci_low"])
    assert widths[1] < widths[0] / 2


def test_one_document_a_label_has_no_interval(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[1, 1], labels=["a", "b"], routers=[planted.Router(np.array([[0], [1]]), 2)])
    frame = analyze(run, "label_divergence").df()
    assert frame["ci_low"].isna().all()
    assert frame["value"].tolist() == pytest.approx(
        [1.0, *[_divergence([[1, 0], [0.5, 0.5]])] * 2, *[math.sqrt(2)] * 2]
    )


@pytest.mark.parametrize("name", ["label_divergence", "label_distance"])
@pytest.mark.parametrize("labels", [["only", None], [None, None]])
def test_fewer_than_two_labels_are_refused_by_name(
    plant: Plant, planted: ModuleType, labels: list[str | None], name: str
) -> None:
    run = plant(lengths=[2, 2], labels=labels, routers=[planted.Router(np.zeros((4, 1), int), 2)])
    with pytest.raises(InputError, match=r"fewer than two labels.*--label-field"):
        analyze(run, name)
