"""Communities: planted groups come out with the modularity of their closed form, noise does not rise over its shuffles."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.store.run import Run

Plant = Callable[..., Run]
MODULARITY, COMMUNITY = "modularity", "community of the expert"


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_disjoint_groups_have_modularity_1_minus_1_over_their_number(
    plant: Plant, planted: ModuleType, groups: int
) -> None:
    generator = np.random.default_rng(groups)
    # Four experts a group, in shuffled ids; every token takes two of one group.
    ids = generator.permutation(4 * groups).reshape(groups, 4)
    tokens = 960
    own = np.arange(tokens) % groups
    pair = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    experts = np.stack([ids[g][list(pair[(t // groups) % 6])] for t, g in enumerate(own)])
    run = plant(lengths=[tokens], routers=[planted.Router(experts, 4 * groups + 1)])
    result = analyze(run, "expert_communities")
    frame = result.df()
    whole = frame[frame["metric"] == MODULARITY].iloc[0]
    assert whole["value"] == pytest.approx(1 - 1 / groups)
    assert whole["communities"] == groups
    assert whole["null"] < whole["value"] - 0.1
    found = frame[frame["metric"] == COMMUNITY].set_index("expert")["value"]
    assert sorted(found.index) == list(range(4 * groups))  # the last expert is never chosen
    for members in ids:
        assert found[members].nunique() == 1
    assert found.nunique() == groups
    assert result.title.startswith(f"Experts group most in L0: {groups} communities")


def test_communities_are_numbered_by_size(plant: Plant, planted: ModuleType) -> None:
    large = [(a, b) for a in (1, 3, 5, 7) for b in (1, 3, 5, 7) if a < b]
    experts = np.array(([*large] * 40) + [(0, 2), (2, 4), (0, 4)] * 80)
    run = plant(lengths=[len(experts)], routers=[planted.Router(experts, 8)])
    found = analyze(run, "expert_communities").df().query("metric == @COMMUNITY").set_index("expert")["value"]
    assert found.to_dict() == {0: 1, 1: 0, 2: 1, 3: 0, 4: 1, 5: 0, 7: 0}  # 6 is never chosen


def test_random_decisions_stay_at_the_level_of_shuffled_weights(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(3)
    routers = [
        planted.Router(np.stack([generator.permutation(16)[:3] for _ in range(500)]), 16, layer=layer)
        for layer in range(10)
    ]
    frame = analyze(plant(lengths=[500], routers=routers), "expert_communities", shuffles=5).df()
    whole = frame[frame["metric"] == MODULARITY]
    excess = (whole["value"] - whole["null"]).to_numpy()
    assert whole["null"].min() > 0.1  # Louvain finds communities in noise
    assert abs(excess.mean()) < 0.05


def test_pairs_too_rare_to_judge_join_nobody(plant: Plant, planted: ModuleType) -> None:
    experts = np.array([[0, 1], [2, 3], [0, 1], [2, 3]])
    run = plant(lengths=[4], routers=[planted.Router(experts, 4)])
    result = analyze(run, "expert_communities")
    whole = result.df().query("metric == @MODULARITY").iloc[0]
    assert (whole["value"], whole["communities"]) == (0.0, 0)
    assert result.title.startswith("No layer's experts form groups")
    lower = analyze(run, "expert_communities", min_expected=1).df().query("metric == @MODULARITY").iloc[0]
    assert lower["value"] == 0.0  # chance brings each of the six pairs together in two thirds of a token


def test_seed_makes_the_same_communities(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(6)
    experts = np.stack([generator.permutation(32)[:4] for _ in range(400)])
    run = plant(lengths=[400], routers=[planted.Router(experts, 32)])
    first, again = (analyze(run, "expert_communities", seed=4).df() for _ in range(2))
    assert first.equals(again)
