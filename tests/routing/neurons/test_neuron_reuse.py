"""Aggregated use of neurons: sets unioned one by one, independent tokens at their null, windows never over a gap."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
Keep = Callable[..., None]
DENSE, INSIDE = "blocks.0.mlp.hook_post", "blocks.0.mlp.experts.hook_post"


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3).filter(lambda lengths: max(lengths) > 1),
    width=st.sampled_from([1, 5, 9]),
    inside=st.booleans(),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15)
def test_windows_agree_with_unions_of_sets(
    plant: Plant, planted: ModuleType, keep_vectors: Keep, lengths: list[int], width: int, inside: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    tokens, experts = sum(lengths), 4
    k = 2 if inside else 1
    values = generator.integers(-1, 2, (tokens * k, width)).astype(float)
    token = np.repeat(np.arange(tokens), k)
    chosen = np.concatenate([generator.permutation(experts)[:k] for _ in range(tokens)])
    run = plant(lengths=lengths, routers=[planted.Router(chosen.reshape(tokens, k), experts)])
    keep_vectors(run, INSIDE if inside else DENSE, values, token=token, expert=chosen if inside else None, shards=2)
    active: list[set[tuple[int, int]]] = [set() for _ in range(tokens)]
    for row, (t, e) in enumerate(zip(token, chosen, strict=True)):
        active[t] |= {(int(e) if inside else 0, i) for i in range(width) if values[row, i] != 0}
    size = width * (experts if inside else 1)
    frame = analyze(run, "neuron_reuse", cett=0.0, longest=4, draws=3).df()
    starts = np.cumsum([0, *lengths])
    for window in (1, 2, 4):
        places = [s + i for s, n in zip(starts, lengths, strict=False) for i in range(n - window + 1)]
        use = frame[(frame["metric"] == "aggregated use") & (frame["window"] == window)]
        assert len(use) == (len(places) > 0)
        if not places:
            continue
        unions = [set().union(*active[p : p + window]) for p in places]
        assert use["n"].item() == len(places)
        assert use["value"].item() == pytest.approx(np.mean([len(u) / size for u in unions]))
        if window > 1:
            added = [
                len(u) - len(set().union(*active[p : p + window - 1])) for p, u in zip(places, unions, strict=True)
            ]
            row = frame[(frame["metric"] == "added by the last token") & (frame["window"] == window)]
            assert row["value"].item() == pytest.approx(np.mean(added) / size)
        if window == 2:
            pairs = [(active[p], active[p + 1]) for p in places if active[p] | active[p + 1]]
            reuse = frame[frame["metric"] == "reuse"]
            assert len(reuse) == (len(pairs) > 0)
            if pairs:
                assert reuse["value"].item() == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))


def test_independent_tokens_lie_at_the_null(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = plant(lengths=[50] * 10, streams={0: planted.Stream(np.ones(500))})
    keep_vectors(run, DENSE, (np.random.default_rng(0).random((500, 200)) < 0.1).astype(float))
    frame = analyze(run, "neuron_reuse", cett=0.0, longest=8).df()
    for row in frame.itertuples():
        assert row.value == pytest.approx(row.null, abs=0.01)
    use = frame[frame["metric"] == "aggregated use"].set_index("window")["value"]
    assert use[8] == pytest.approx(1 - 0.9**8, abs=0.01)
    assert frame.loc[frame["metric"] == "reuse", "value"].item() == pytest.approx(0.01 / 0.19, abs=0.005)


def test_repeating_neurons_are_reused_far_above_the_null(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    """Each document has ten neurons of its own: a window never grows."""
    run = plant(lengths=[20] * 10, streams={0: planted.Stream(np.ones(200))})
    values = np.zeros((200, 100))
    for token in range(200):
        values[token, 10 * (token // 20) : 10 * (token // 20) + 10] = 1
    keep_vectors(run, DENSE, values)
    frame = analyze(run, "neuron_reuse", cett=0.0, longest=16).df()
    use = frame[frame["metric"] == "aggregated use"]
    assert set(use["value"].round(9)) == {0.1}
    assert use["null"].tolist() == pytest.approx([1 - 0.9**w for w in (1, 2, 4, 8, 16)])
    assert frame.loc[frame["metric"] == "reuse", "value"].item() == 1


def test_a_given_threshold_decides_what_is_active(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = plant(lengths=[2], streams={0: planted.Stream(np.ones(2))})
    keep_vectors(run, DENSE, np.array([[0.5, -2.0, 0.0], [3.0, 0.1, 0.0]]))
    frame = analyze(run, "neuron_reuse", threshold=1.0).df()
    use = frame[frame["metric"] == "aggregated use"].set_index("window")["value"]
    assert use[1] == pytest.approx(1 / 3)
    assert use[2] == pytest.approx(2 / 3)


def test_gaps_between_sampled_tokens_are_refused(plant: Plant, planted: ModuleType, keep_vectors: Keep) -> None:
    run = plant(lengths=[6], streams={0: planted.Stream(np.ones(6))})
    keep_vectors(run, DENSE, np.ones((3, 2)), token=[0, 2, 4])
    with pytest.raises(InputError, match=r"two consecutive tokens.*--sample 1"):
        analyze(run, "neuron_reuse")
