"""Analyses of heads on planted records: values, thresholds, ranks, roles, and what they say where something is missing."""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.analysis_api import analyze
from moescope.core.errors import InputError
from moescope.routing.phenomena.head_roles import roles_of
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
_NUMBERS = itertools.count()  # the store may be shared
RETRIEVAL_NULLS = {
    "retrieval score": "even choice of key",
    "retrieval score, each place once": "even choice of key, each place once",
    "retrieval activation": "even choice of key, activation",
    "retrieval score, answer given": "even choice of key, answer given",
}
INDUCTION_NULLS = {
    "induction": "other offset",
    "echo": "other offset",
    "previous token": "other offset, one key",
    "induction, mean over copies": "other offset, mean over copies",
    "echo, mean over copies": "other offset, mean over copies",
}


@pytest.fixture(scope="module")
def plant_head_scores() -> Callable[..., None]:
    """`plant_head_scores` of `tests/routing/planted_head_scores.py`."""
    spec = importlib.util.spec_from_file_location(
        "planted_head_scores", Path(__file__).parents[1] / "planted_head_scores.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: Callable[..., None] = module.plant_head_scores
    return made


@pytest.fixture
def plant(store: Store) -> Plant:
    """`plant({metric: [sequence, layer, head] means}, n=…, facts=[…], summary={…})`: a run of such records."""

    def make(
        metrics: dict[str, Any],
        *,
        n: int = 1,
        facts: list[dict[str, Any]] | None = None,
        summary: dict[str, Any] | None = None,
    ) -> Run:
        run = store.begin_run(name=f"planted {next(_NUMBERS)}", model="none", settings={})
        connection = store.connection
        sequences = len(next(iter(metrics.values()))) if metrics else len(facts or [])
        for number in range(sequences):
            fact = json.dumps(facts[number]) if facts else None
            connection.execute(
                "INSERT INTO sequences (run_id, sequence_id, document_id, metadata) VALUES (?, ?, ?, ?)",
                [run.run_id, number, number, fact],
            )
        rows = [
            {
                "sequence_id": number, "layer": layer, "block": "attn", "metric": metric, "condition": "base",
                "sums": (values * n).tolist(), "n": n,
            }
            for metric, means in metrics.items()
            for number, layers in enumerate(np.asarray(means, float))
            for layer, values in enumerate(layers)
        ]  # fmt: skip
        connection.register("planted_rows", pa.Table.from_pylist(rows))
        connection.execute(
            "INSERT INTO head_sequences BY NAME SELECT ?::UUID AS run_id, * FROM planted_rows", [run.run_id]
        )
        connection.unregister("planted_rows")
        connection.execute(
            "UPDATE runs SET status = 'complete', summary = ? WHERE run_id = ?", [json.dumps(summary or {}), run.run_id]
        )
        return store.run(run.name)

    return make


def trials(count: int, counted: int) -> list[dict[str, Any]]:
    return [{"counted": number < counted, "exact": False, "recall": 1.0} for number in range(count)]


def scored(scores: np.ndarray, null: float = 0.01) -> dict[str, np.ndarray]:
    found = {}
    for metric, chance in RETRIEVAL_NULLS.items():
        found |= {metric: scores, chance: np.full_like(scores, null)}
    return found


def test_retrieval_heads_are_those_over_the_threshold_by_their_mean_over_trials(plant: Plant) -> None:
    """Head L0·H1 scores 0 and 0.2 by turns: 0.1 on average, at the threshold; L1·H0 always 0.6."""
    scores = np.zeros((6, 2, 3))
    scores[::2, 0, 1] = 0.2
    scores[:, 1, 0] = 0.6
    scores[:, 1, 2] = 0.09
    result = analyze(plant(scored(scores), facts=trials(6, 6)), "retrieval_heads")
    table = result.df()
    main = table[table["metric"] == "retrieval score"].set_index(["layer", "head"])
    assert main["value"].to_dict()[0, 1] == pytest.approx(0.1, abs=1e-6)
    assert main["retrieval_head"].sum() == 2
    assert main["strong"].sum() == 1
    assert main.loc[(1, 0), "ci_low"] == pytest.approx(0.6)
    assert main.loc[(0, 1), "ci_low"] < 0.1 < main.loc[(0, 1), "ci_high"]
    assert (main["null"] - 0.01).abs().max() < 1e-6
    shares = table[(table["metric"] == "share of retrieval heads") & (table["of"] == "retrieval score")].iloc[0]
    assert shares["value"] == pytest.approx(2 / 6)
    assert shares["null"] == 0
    assert result.title.startswith("2 of 6 heads (33.3%) are retrieval heads, 6 of 6 trials counting: L1·H0 0.60")
    assert result.figure().data


def test_halves_of_equal_trials_agree_and_halves_of_noise_do_not(plant: Plant) -> None:
    random = np.random.default_rng(0)
    fixed = np.repeat(random.random((1, 4, 8)), 10, axis=0)
    table = analyze(plant(scored(fixed), facts=trials(10, 10)), "retrieval_heads").df()
    row = table[(table["metric"] == "split-half correlation") & (table["of"] == "retrieval score")].iloc[0]
    assert row["value"] == pytest.approx(1, abs=1e-5)
    table = analyze(plant(scored(random.random((10, 10, 40))), facts=trials(10, 10)), "retrieval_heads").df()
    row = table[(table["metric"] == "split-half correlation") & (table["of"] == "retrieval score")].iloc[0]
    assert abs(row["value"]) < 0.2


def test_a_withheld_score_is_not_told_and_its_trials_are_counted_in_words(plant: Plant) -> None:
    scores = np.full((4, 1, 2), 0.3)
    given = {name: values for name, values in scored(scores).items() if "given" in name}
    summary = {"withheld": {"retrieval score": "1 of 4 trials counted: fewer than 5"}}
    result = analyze(plant(given, facts=trials(4, 1), summary=summary), "retrieval_heads")
    assert result.title.startswith(
        "No retrieval score: 1 of 4 trials counted; with the answer given, 2 of 2 heads reach 0.1"
    )
    assert set(result.df()["metric"]) & {"retrieval score", "retrieval activation"} == set()
    assert any("fewer than 5" in note for note in result.notes)


def test_runs_of_another_kind_are_refused_with_what_to_run(plant: Plant) -> None:
    run = plant({name: np.full((2, 1, 2), 0.5) for name in (*INDUCTION_NULLS, *INDUCTION_NULLS.values())})
    with pytest.raises(InputError, match=r"no retrieval score of any head.*no needle trials"):
        analyze(run, "retrieval_heads")
    with pytest.raises(InputError, match="has no recovered mass"):
        analyze(run, "head_roles")
    with pytest.raises(InputError, match="thresholds must rise"):
        analyze(run, "retrieval_heads", threshold=0.6, strong=0.5)
    with pytest.raises(InputError, match="a share, 0 to 1"):
        analyze(run, "induction_heads", induction_share=14.0)


def test_protected_heads_are_the_first_share_of_key_value_heads_by_their_largest_query_head(plant: Plant) -> None:
    """2 layers × 4 heads sharing keys in pairs: 4 key-value heads; half by induction are 2, a hundredth by echo is 1."""
    values = np.array([[[0.9, 0.0, 0.1, 0.2], [0.3, 0.05, 0.0, 0.0]]]).repeat(3, axis=0)
    means = dict.fromkeys(INDUCTION_NULLS, values) | dict.fromkeys(INDUCTION_NULLS.values(), values * 0 + 0.01)
    run = plant(means, n=10, summary={"key_value_heads": {"0 attn": 2, "1 attn": 2}})
    result = analyze(run, "induction_heads", induction_share=0.5)
    table = result.df()
    protected = table[(table["metric"] == "induction") & table["protected"].fillna(False)]
    assert sorted(zip(protected["layer"], protected["head"], strict=True)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    echo = table[(table["metric"] == "echo") & table["protected"].fillna(False)]
    assert sorted(zip(echo["layer"], echo["head"], strict=True)) == [(0, 0), (0, 1)]
    alone = analyze(run, "induction_heads", induction_share=0.25, grouped=False).df()
    single = alone[(alone["metric"] == "induction") & alone["protected"].fillna(False)]
    assert sorted(zip(single["layer"], single["head"], strict=True)) == [(0, 0), (1, 0)]
    assert result.title.startswith("2 of 8 heads have induction ≥ 0.3 (L0·H0 0.90, L1·H0 0.30")
    assert "90× chance" in result.title
    assert result.figure().data


def test_roles_are_the_cheapest_sets_and_shares_sum_to_one(plant: Plant) -> None:
    """Three heads: one needs special tokens alone, one the nearest, one everything; the second is another in one text of four."""
    special = np.array([[[0.97, 0.1, 0.1]]]).repeat(4, axis=0)
    local = np.array([[[1.0, 0.97, 0.5]]]).repeat(4, axis=0)
    frequent = special.copy()
    frequent[3, 0, 1] = 0.96
    masses = {"special": special, "+ punctuation": special, "+ frequent": frequent, "+ local": local}
    means = {f"recovered mass, {name}": values for name, values in masses.items()}
    means |= {f"even attention, {name}": np.full((4, 1, 3), 0.2) for name in masses}
    run = plant(means, n=50)
    result = analyze(run, "head_roles")
    table = result.df()
    heads = table[table["metric"] == "recovered mass, special"].set_index("head")
    assert heads["role"].to_dict() == {0: "special", 1: "+ local", 2: "all"}
    assert heads["stability"].to_dict() == {0: 1.0, 1: 0.75, 2: 1.0}
    shares = table[table["metric"] == "heads with the role"].set_index("role")
    assert shares["value"].sum() == pytest.approx(1)
    assert shares["null"].to_dict()["all"] == 1, "even attention recovers a fifth: nothing but all keys would do"
    assert result.figure().data
    with pytest.raises(InputError, match="mass"):
        analyze(run, "head_roles", mass=0.0)


def test_roles_of_ties_and_of_none() -> None:
    masses = np.array([[0.95, 0.0, 0.2], [0.95, 0.0, 0.96], [0.99, 0.5, 0.97]])
    assert roles_of(masses, 0.95).tolist() == [0, 3, 1]


@pytest.mark.parametrize("layers", [1, 3])
def test_analyses_of_heads_stand_the_tests_of_every_analysis(
    planted: ModuleType, store: Store, plant_head_scores: Callable[..., None], layers: int
) -> None:
    """On the run that every analysis is tried on, once it has scores of heads too."""
    fields = planted.everything(layers=layers, n_experts=4, labels=list(planted.HOSTILE), tokens=36)
    run = planted.plant(store, planted.Plan(**fields), name=f"{planted.HOSTILE[0]} {layers}")
    plant_head_scores(run, sequences=len(planted.HOSTILE), layers=layers)
    for name in ("retrieval_heads", "induction_heads", "head_roles"):
        result = analyze(run, name)
        columns = result.table.column_names
        assert {"metric", "value", "ci_low", "ci_high", "null"} <= set(columns)
        assert {column.split("[")[0] for column in result.units} <= set(columns)
        assert len(store.sql(result.sql, result.sql_parameters).df())
        assert len(json.loads(json.dumps(result.as_json(), default=str))["table"]) == result.table.num_rows
        figure = result.figure()
        assert f"n = {result.n:,}" in figure.layout.title.subtitle.text
        assert len(figure.to_json()) < 8_000_000


def test_overlap_of_two_rankings_is_that_of_their_tops_against_chance(plant: Plant) -> None:
    """The other run ranks the first 10 of 40 heads alike, and the rest turned round."""
    one = np.linspace(1, 0, 40)
    two = np.concatenate([one[:10], one[10:][::-1]])
    first = plant({"retrieval score": np.tile(one, (3, 1, 1))})
    second = plant({"induction": np.tile(two, (3, 1, 1))})
    result = analyze([first, second], "head_overlap", other_metric="induction", top=10)
    table = result.df().set_index("metric")
    top = table.loc["overlap of the top 10"]
    assert (top["value"], top["ci_low"], top["ci_high"]) == (1, 1, 1)
    # Two random tens of forty share 2.5 heads on average.
    assert top["null"] == pytest.approx(2.5 / 17.5, abs=0.03)
    ranks = np.arange(40)
    turned = np.concatenate([ranks[:10], ranks[10:][::-1]])
    assert table.loc["rank correlation", "value"] == pytest.approx(
        1 - 6 * ((ranks - turned) ** 2).sum() / (40 * (40**2 - 1))
    )
    assert result.figure().data
    with pytest.raises(InputError, match="not of the same heads"):
        analyze([first, plant({"induction": np.ones((2, 2, 40))})], "head_overlap", other_metric="induction")
    with pytest.raises(InputError, match="has no echo"):
        analyze([first, second], "head_overlap", other_metric="echo")
