"""Predictability: routers that a table knows by heart, and every table against plain Python."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.pathways.held_out import halve
from moescope.routing.trace import read_trace
from moescope.store.run import Run

Plant = Callable[..., Run]


def _recall(frame: Any, predictor: str, layer: int = 0, column: str = "value") -> float:
    return float(frame[(frame["predictor"] == predictor) & (frame["layer"] == layer)][column].iloc[0])


def _sets(generator: np.random.Generator, tokens: int, n_experts: int, top_k: int) -> np.ndarray:
    return np.array([generator.permutation(n_experts)[:top_k] for _ in range(tokens)])


def test_token_lookup_router_is_known_from_the_token(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(1)
    ids = generator.integers(20, size=800)
    table = _sets(generator, 20, 16, 2)
    run = plant(lengths=[40] * 20, ids=ids.tolist(), routers=[planted.Router(table[ids], 16)])
    result = analyze(run, "predictability")
    assert _recall(result.df(), "token id") == 1.0
    assert _recall(result.df(), "popularity") < 0.5
    assert _recall(result.df(), "token id", column="null") == pytest.approx(_recall(result.df(), "popularity"))
    assert "The token id names 100.0%" in result.title


def test_permutation_is_known_from_the_layer_before(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(2)
    first = generator.integers(8, size=600)
    routers = [planted.Router(((first * 3 + layer) % 8)[:, None], 8, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[30] * 20, ids=[0] * 600, routers=routers), "predictability").df()
    for name in ("previous layer", "similar paths"):
        assert [_recall(frame, name, layer) for layer in (1, 2)] == [1.0, 1.0]
    assert _recall(frame, "two layers", 2) == 1.0
    assert _recall(frame, "previous token", 1) < 0.4


def test_round_robin_is_known_from_the_token_before(plant: Plant, planted: ModuleType) -> None:
    lengths = [25] * 12
    experts = np.concatenate([(np.arange(25) + start) % 6 for start in range(12)])[:, None]
    frame = analyze(plant(lengths=lengths, ids=[0] * 300, routers=[planted.Router(experts, 6)]), "predictability").df()
    assert _recall(frame, "previous token") >= 24 / 25
    assert _recall(frame, "popularity") < 0.35


def test_domain_experts_are_known_from_similar_sequences(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(3)
    kind = np.repeat(np.arange(20) % 2, 30)
    experts = 4 * kind[:, None] + _sets(generator, 600, 4, 2)
    run = plant(lengths=[30] * 20, ids=[0] * 600, routers=[planted.Router(experts, 8)])
    frame = analyze(run, "predictability", size=4).df()
    assert _recall(frame, "similar sequences") > 0.97  # only first tokens of sequences have nothing to go by
    assert _recall(frame, "popularity") < 0.6


def test_independent_routing_is_predicted_no_better_than_by_popularity(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(4)
    routers = [planted.Router(_sets(generator, 2000, 8, 2), 8, layer=layer) for layer in range(2)]
    result = analyze(plant(lengths=[50] * 40, routers=routers), "predictability")
    frame = result.df()
    assert frame["value"].to_numpy() == pytest.approx(0.25, abs=0.05)
    assert _recall(frame, "popularity", column="null") == 0.25


def test_size_of_all_experts_names_everything(plant: Plant, planted: ModuleType) -> None:
    routers = [planted.Router(_sets(np.random.default_rng(layer), 40, 5, 2), 5, layer=layer) for layer in range(3)]
    frame = analyze(plant(lengths=[10] * 4, routers=routers), "predictability", size=99).df()
    assert (frame["value"] == 1).all()
    assert (frame["size"] == 5).all()


def _best(scores: dict[int, float], experts: int, size: int) -> set[int]:
    return set(sorted(range(experts), key=lambda e: (-scores.get(e, 0.0), e))[:size])


def _brute(run: Run, routers: list[Any], ids: list[int], size: int, seed: int) -> dict[tuple[str, int], float]:
    """Every table, token by token; shares as float32 where they are summed, so that ties are the same ties."""
    trace = read_trace(run)
    halves = halve(trace, seed)
    fitted, judged = halves.fitted.tolist(), halves.judged.tolist()
    found: dict[tuple[str, int], float] = {}
    for number, router in enumerate(routers):
        chosen, experts = router.experts.tolist(), router.n_experts
        popular = Counter(e for t in fitted for e in chosen[t])
        share = {e: float(np.float32(n / popular.total())) for e, n in popular.items()}

        def by_key(
            key: Callable[[int], Any], chosen: Any = chosen, share: Any = share
        ) -> Callable[[int], dict[int, float]]:
            seen: dict[Any, Counter[int]] = defaultdict(Counter)
            for t in fitted:
                seen[key(t)].update(chosen[t])
            return lambda t: {e: seen[key(t)][e] + share.get(e, 0) / 2 for e in range(256)} if key(t) in seen else share

        def summed(before: Callable[[int], list[int] | None], chosen: Any = chosen, share: Any = share) -> Any:
            after: dict[int, Counter[int]] = defaultdict(Counter)
            for t in fitted:
                for i in before(t) or []:
                    after[i].update(chosen[t])

            def totals(t: int) -> dict[int, float]:
                given = before(t)
                if given is None:
                    return share
                total: dict[int, np.float32] = defaultdict(lambda: np.float32(0))
                for i in given:
                    for j, n in after[i].items():
                        total[j] = total[j] + np.float32(n / after[i].total())
                return {j: float(value) for j, value in total.items()}

            return totals

        tables: dict[str, Callable[[int], dict[int, float]]] = {
            "popularity": lambda t, share=share: share,
            "token id": by_key(lambda t: ids[t]),
            "previous token": summed(lambda t, c=chosen: c[t - 1] if trace.position[t] else None),
        }
        if number:
            last = routers[number - 1].experts.tolist()
            tables["previous layer"] = summed(lambda t, last=last: last[t])
        if number > 1:
            earlier = routers[number - 2].experts.tolist()
            tables["two layers"] = by_key(lambda t, a=earlier, b=last: (a[t][0], b[t][0]))
        for name, scores in tables.items():
            hits = sum(len(_best(scores(t), experts, size) & set(chosen[t])) for t in judged)
            found[name, number] = hits / (len(judged) * router.top_k)
    return found


@given(seed=st.integers(0, 99), size=st.integers(1, 3), documents=st.integers(2, 6))
def test_tables_are_what_plain_counting_gives(
    plant: Plant, planted: ModuleType, seed: int, size: int, documents: int
) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 7, size=documents).tolist()
    tokens = sum(lengths)
    ids = generator.integers(4, size=tokens).tolist()
    shapes = [(4, 2), (3, 1), (5, 3)]
    routers = [planted.Router(_sets(generator, tokens, e, k), e, layer=i) for i, (e, k) in enumerate(shapes)]
    run = plant(lengths=lengths, ids=ids, routers=routers)
    frame = analyze(run, "predictability", size=size, seed=seed, draws=2, sample=1).df()
    truth = _brute(run, routers, ids, size, seed)
    tables = frame[~frame["predictor"].isin(["similar paths", "similar sequences"])]
    assert {(row.predictor, row.layer) for row in tables.itertuples()} == set(truth)
    for row in tables.itertuples():
        assert row.value == pytest.approx(truth[row.predictor, row.layer]), row.predictor


def test_neighbours_are_what_plain_search_gives(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(8)
    lengths, shapes = [9, 7, 8, 6, 5], [(6, 2), (5, 1), (4, 2)]
    routers = [planted.Router(_sets(generator, 35, e, k), e, layer=i) for i, (e, k) in enumerate(shapes)]
    run = plant(lengths=lengths, routers=routers)
    frame = analyze(run, "predictability", neighbours=1000, sample=1000).df()
    trace = read_trace(run)
    halves = halve(trace, 0)
    for number, router in enumerate(routers):
        chosen = router.experts.tolist()
        if number:  # all fitted tokens vote: their votes are their popularity
            votes = Counter(e for t in halves.fitted for e in chosen[t])
            named = _best(dict(votes), router.n_experts, router.top_k)
            truth = np.mean([len(named & set(chosen[t])) / router.top_k for t in halves.judged])
            assert _recall(frame, "similar paths", number) == pytest.approx(truth)
        hits = 0
        for t in halves.judged.tolist():
            best, nearest = -1.0, -1
            for sequence in sorted(set(trace.sequence[halves.fitted].tolist())):
                alike = 0.0
                for other in routers:
                    so_far = np.zeros(other.n_experts, np.float32)
                    for u in range(int(trace.starts[trace.sequence[t]]), t):
                        so_far[other.experts[u]] += 1
                    theirs = np.zeros(other.n_experts, np.float32)
                    for u in range(int(trace.starts[sequence]), int(trace.starts[sequence + 1])):
                        theirs[other.experts[u]] += 1
                    if so_far.any():
                        alike += float(so_far @ theirs / np.linalg.norm(so_far) / np.linalg.norm(theirs))
                if alike > best + 1e-6:
                    best, nearest = alike, sequence
            rows = range(int(trace.starts[nearest]), int(trace.starts[nearest + 1]))
            counts = Counter(e for u in rows for e in chosen[u])
            hits += len(_best(dict(counts), router.n_experts, router.top_k) & set(chosen[t]))
        truth = hits / (len(halves.judged) * router.top_k)
        assert _recall(frame, "similar sequences", number) == pytest.approx(truth)


def test_first_choices_are_predicted_from_first_choices(plant: Plant, planted: ModuleType) -> None:
    generator = np.random.default_rng(9)
    first = generator.integers(4, size=200)
    second = np.stack([(first + 1) % 4, generator.integers(4, 8, size=200)], 1)
    routers = [planted.Router(first[:, None], 4), planted.Router(second, 8, layer=1)]
    run = plant(lengths=[20] * 10, routers=routers)
    assert _recall(analyze(run, "predictability", choice="first").df(), "previous layer", 1) == 1.0
    assert 0.5 < _recall(analyze(run, "predictability").df(), "previous layer", 1) < 0.9


def test_halves_share_no_document_and_follow_the_seed(plant: Plant, planted: ModuleType) -> None:
    routers = [planted.Router(np.zeros((20, 1), int), 2)]
    trace = read_trace(plant(lengths=[2] * 10, documents=[0, 0, 1, 1, 2, 2, 3, 4, 5, 6], routers=routers))
    halves = halve(trace, 5)
    sides = [set(trace.document[rows].tolist()) for rows in (halves.fitted, halves.judged)]
    assert sides[0] | sides[1] == set(range(7))
    assert not sides[0] & sides[1]
    assert len(sides[0]) == 3
    assert set(halves.document.tolist()) == set(range(halves.documents)) == set(range(4))
    assert (halve(trace, 5).fitted == halves.fitted).all()
    assert any((halve(trace, s).fitted.tolist() != halves.fitted.tolist()) for s in range(6, 12))


def test_runs_without_token_ids_or_a_second_document(plant: Plant, planted: ModuleType) -> None:
    routers = [planted.Router(np.zeros((8, 1), int), 2)]
    result = analyze(plant(lengths=[4, 4], ids=[-1] * 8, routers=routers), "predictability")
    assert "token id" not in set(result.df()["predictor"])
    assert any("no token ids" in note for note in result.notes)
    with pytest.raises(InputError, match="one document"):
        analyze(plant(lengths=[8], routers=routers), "predictability")
