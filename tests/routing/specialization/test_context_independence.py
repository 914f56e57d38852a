"""Context independence: lookup routers reach the closed-form maxima, values equal pairs counted by hand."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import combinations
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
SPREAD, AGREEMENT = "standard deviation over experts", "agreement of two occurrences"


@pytest.mark.parametrize(("size", "k"), [(8, 1), (16, 4), (256, 8)])
def test_lookup_by_id_reaches_the_largest_spread(plant: Plant, planted: ModuleType, size: int, k: int) -> None:
    ids = np.random.default_rng(0).integers(0, 3, 600)
    experts = np.stack([(5 * ids + slot) % size for slot in range(k)], 1)
    run = plant(lengths=[60] * 10, ids=ids.tolist(), routers=[planted.Router(experts, size)])
    frame = analyze(run, "context_independence").df().set_index(["given", "metric"])
    assert frame.loc[("token id", SPREAD), "value"] == pytest.approx(math.sqrt((1 / k - 1 / size) / size))
    assert frame.loc[("token id", AGREEMENT), "value"] == pytest.approx(1.0)
    assert frame.loc[("token id", AGREEMENT), "ci_low"] == pytest.approx(1.0)
    assert ("position", SPREAD) not in frame.index  # ten occurrences each: too few for the standard deviation
    position = frame.loc[("position", AGREEMENT)]
    assert position["value"] == pytest.approx(position["null"], abs=0.1)
    assert frame.loc[("token id", SPREAD), "null"] < frame.loc[("token id", SPREAD), "value"]


def test_lookup_by_position_is_told_from_lookup_by_id(plant: Plant, planted: ModuleType) -> None:
    ids = np.random.default_rng(1).integers(0, 4, 150 * 4)
    position = np.tile(np.arange(4), 150)
    run = plant(lengths=[4] * 150, ids=ids.tolist(), routers=[planted.Router(position[:, None], 4)])
    frame = analyze(run, "context_independence").df().set_index(["given", "metric"])
    assert frame.loc[("position", AGREEMENT), "value"] == pytest.approx(1.0)
    assert frame.loc[("position", SPREAD), "value"] == pytest.approx(math.sqrt(3) / 4)
    assert frame.loc[("token id", AGREEMENT), "value"] == pytest.approx(0.25, abs=0.03)


@given(data=st.data())
def test_values_equal_pairs_counted_by_hand(data: st.DataObject, plant: Plant, planted: ModuleType) -> None:
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=2, max_size=5))
    total = sum(lengths)
    generator = np.random.default_rng(data.draw(st.integers(0, 999)))
    ids = generator.integers(0, 4, total).tolist()
    shapes = data.draw(st.sampled_from([((3, 1),), ((4, 2), (6, 3)), ((256, 8),)]))
    routers = [
        planted.Router(np.stack([generator.permutation(e)[:k] for _ in range(total)]), e, layer=layer)
        for layer, (e, k) in enumerate(shapes)
    ]
    run = plant(lengths=lengths, ids=ids, routers=routers)
    position = [p for length in lengths for p in range(length)]
    before = [None if p == 0 else ids[t - 1] for t, p in enumerate(position)]
    more_than = data.draw(st.integers(1, 3))
    keys = {"token id": ids, "position": position, "id before it": before}
    groups = {name: defaultdict(list) for name in keys}
    for name, of_token in keys.items():
        for token, key in enumerate(of_token):
            if key is not None:
                groups[name][key].append(token)
    if not any(len(tokens) > 1 for found in groups.values() for tokens in found.values()):
        with pytest.raises(InputError, match="occurs twice"):
            analyze(run, "context_independence")
        return
    frame = analyze(run, "context_independence", more_than=more_than, shuffles=1, draws=5).df()
    keyed = frame.set_index(["layer", "given", "metric"])
    for router in routers:
        chosen = router.experts.tolist()
        for name, found in groups.items():
            agreement, spread = [], []
            for tokens in found.values():
                if len(tokens) > 1:
                    shared = [len(set(chosen[a]) & set(chosen[b])) / router.top_k for a, b in combinations(tokens, 2)]
                    agreement.append(np.mean(shared))
                if len(tokens) > more_than:
                    listed = [e for token in tokens for e in chosen[token]]
                    spread.append(np.std([listed.count(e) / len(listed) for e in range(router.n_experts)]))
            for metric, values in ((AGREEMENT, agreement), (SPREAD, spread)):
                if values:
                    assert keyed.loc[(router.layer, name, metric), "value"] == pytest.approx(np.mean(values), abs=1e-9)
                    assert keyed.loc[(router.layer, name, metric), "n"] == len(values)
                else:
                    assert (router.layer, name, metric) not in keyed.index


def test_agreement_of_unrelated_tokens_has_no_bias_from_rare_ids(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(5)
    experts = np.stack([generator.permutation(8)[:2] for _ in range(3000)])
    ids = np.repeat(np.arange(1500), 2)[generator.permutation(3000)]  # each id twice
    run = plant(lengths=[100] * 30, ids=ids.tolist(), routers=[planted.Router(experts, 8)])
    row = analyze(run, "context_independence").df().set_index(["given", "metric"]).loc[("token id", AGREEMENT)]
    assert row["ci_low"] < 0.25 < row["ci_high"]  # two draws of 2 of 8 share k ÷ E
    assert row["null"] == pytest.approx(0.25, abs=0.02)
    # 1,500 pairs whose overlap has variance 0.0804 (2 of 8, over k): the interval is theirs, up to √2 wider.
    spread = (row["ci_high"] - row["ci_low"]) / (2 * 1.96)
    assert 0.9 < spread / math.sqrt(0.0804 / 1500) < 1.7


def test_interval_follows_how_much_documents_differ(plant: Plant, planted: ModuleType) -> None:
    """Half of the documents route id 0 to expert 0, half to expert 1: resampling moves the mixture, and so the agreement."""
    documents, length = 40, 20
    own = np.repeat(np.arange(documents) % 4 == 0, length).astype(int)
    run = plant(lengths=[length] * documents, ids=[0] * len(own), routers=[planted.Router(own[:, None], 2)])
    row = (
        analyze(run, "context_independence", draws=3000)
        .df()
        .set_index(["given", "metric"])
        .loc[("token id", AGREEMENT)]
    )
    generator = np.random.default_rng(6)
    n = documents * length
    drawn = generator.binomial(documents, 0.25, 3000) * length
    full = (drawn * (drawn - 1) + (n - drawn) * (n - drawn - 1)) / (n * (n - 1))
    low, high = np.quantile(full, [0.025, 0.975])
    assert row["ci_high"] - row["ci_low"] == pytest.approx(high - low, rel=0.2)
    assert row["ci_low"] < row["value"] < row["ci_high"]
