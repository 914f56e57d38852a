"""Several tokens served together: the cache is asked once for each of their different experts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.store.run import Run

Plant = Callable[..., Run]
LENGTHS = [9, 1, 14, 6]


def steps(sequence: list[list[int]], batch: int, experts: int) -> list[list[int]]:
    """Different experts of each `batch` tokens, in order of first use."""
    found = []
    for begin in range(0, len(sequence), batch):
        united = dict.fromkeys(expert for token in sequence[begin : begin + batch] for expert in token)
        found.append([expert for expert in united if expert < experts])
    return found


@pytest.mark.parametrize("policy", ["lru", "lfu", "fifo", "lifo", "look_ahead", "belady"])
@pytest.mark.parametrize("batch", [1, 2, 5, 50])
def test_steps_are_replayed_as_tokens_are(
    plant: Plant, planted: ModuleType, brute: ModuleType, policy: str, batch: int
) -> None:
    generator = np.random.default_rng(1)
    chosen = np.argsort(generator.random((sum(LENGTHS), 8)), axis=1)[:, :3]
    run = plant(lengths=LENGTHS, routers=[planted.Router(chosen, 7, n_null=1)])
    frame = analyze(run, "expert_cache", policy=policy, batch=batch, preload=False, horizon=3, draws=2).df()
    frame = frame[frame["layer"].notna()]
    asked = [steps(part.tolist(), batch, 7) for part in np.split(chosen, np.cumsum(LENGTHS)[:-1])]
    uses = sum(len(step) for sequence in asked for step in sequence)
    assert set(frame["n"]) == {uses}
    for row in frame.to_dict("records"):
        hits = sum(brute.hits(sequence, policy, row["size"], experts=7, horizon=3)[0] for sequence in asked)
        assert row["value"] == pytest.approx(hits / uses)
        assert row["transfers"] == pytest.approx((uses - hits) / sum(LENGTHS)), "experts brought in for each token"


def test_a_cache_of_all_experts_misses_only_first_uses(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[40], routers=[planted.Router(np.arange(80).reshape(40, 2) % 5, 5)])
    frame = analyze(run, "expert_cache", policy="lru", batch=8, preload=False).df()
    largest = frame[frame["layer"].notna()].iloc[-1]
    assert largest["value"] == pytest.approx(1 - 5 / 25)
    assert largest["realisable"]


def test_one_pool_for_all_layers_serves_tokens_one_by_one(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], routers=[planted.Router(np.zeros((4, 1), int), 3)])
    with pytest.raises(InputError, match="batch=1"):
        analyze(run, "expert_cache", pool="model", batch=2)
