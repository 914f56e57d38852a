"""The shared DeepSeek-V2-Lite trace, imported: what its README states comes out of the store by SQL."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from moescope.store.importing.import_trace import import_trace
from moescope.store.run import Run
from moescope.store.store import Store

FOLDER = Path(__file__).parents[4] / "shared" / "data" / "deepseek_v2_lite_routing"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"{FOLDER} is not here")

# Windows of m tokens slide by one within a sequence; a threshold on an expert's count in a window calls it always on or
# never on there, and SRP is the best F1 of that, over all experts and layers (arXiv 2505.16056).
_SRP = """
    WITH used AS (
        SELECT t.sequence_id, t.position, r.layer, unnest(r.experts) AS expert
        FROM routing r JOIN tokens t USING (run_id, token)
        WHERE run_id = $run
    ),
    lengths AS (SELECT sequence_id, max(position) + 1 AS length FROM tokens WHERE run_id = $run GROUP BY sequence_id),
    windows AS (
        SELECT sequence_id, layer, expert, start, count(*) AS c
        FROM (
            SELECT *, unnest(range(greatest(position - $m + 1, 0), least(position, length - $m) + 1)) AS start
            FROM used JOIN lengths USING (sequence_id)
        )
        GROUP BY ALL
    ),
    histogram AS (SELECT c, count(*) AS n FROM windows GROUP BY c),
    thresholds AS (
        SELECT low.c AS threshold, sum(high.c * high.n) AS hits, $m * sum(high.n) AS called
        FROM histogram low JOIN histogram high ON high.c >= low.c
        GROUP BY low.c
    )
    SELECT max(2 * hits / (called + (SELECT sum(c * n) FROM histogram))) FROM thresholds
"""
# ESFT by token score: experts in order of their share of choices until p = 0.2 is reached.
_RELEVANT = """
    WITH shares AS (
        SELECT layer, expert, sum(tokens) / sum(sum(tokens)) OVER (PARTITION BY layer) AS share
        FROM loads WHERE run_id = $run GROUP BY layer, expert
    ),
    before AS (
        SELECT layer, sum(share) OVER (PARTITION BY layer ORDER BY share DESC ROWS UNBOUNDED PRECEDING) - share AS sum
        FROM shares
    )
    SELECT avg(n) FROM (SELECT count(*) AS n FROM before WHERE sum < 0.2 GROUP BY layer)
"""
_CO_ACTIVATION = """
    WITH used AS (SELECT layer, token, unnest(experts) AS expert FROM routing WHERE run_id = $run),
    pairs AS (
        SELECT layer, a.expert AS i, count(*) AS n
        FROM used a JOIN used b USING (layer, token)
        WHERE a.expert <> b.expert
        GROUP BY ALL
    )
    SELECT DISTINCT n / l.tokens
    FROM pairs p JOIN loads l ON l.run_id = $run AND l.layer = p.layer AND l.expert = p.i
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    with Store(tmp_path_factory.mktemp("deepseek") / "runs.duckdb") as store:
        yield {
            name: import_trace(store, FOLDER / f"{name}.parquet", name=name, n_experts=64, label=name)
            for name in ("law", "summary")
        }


@pytest.mark.parametrize(("name", "sequences", "tokens"), [("law", 33, 8327), ("summary", 13, 8479)])
def test_both_files_are_whole(runs: dict[str, Run], name: str, sequences: int, tokens: int) -> None:
    run = runs[name]
    assert run.status == "complete", run.coverage.df()
    assert (run.rows("sequences"), run.rows("tokens"), run.rows("routing")) == (sequences, tokens, 26 * tokens)
    layers = run.sql("SELECT layer, n_experts, top_k FROM layers WHERE run_id = $run ORDER BY layer").fetchall()
    assert layers == [(layer, 64, 6) for layer in range(1, 27)]
    assert run.sql("SELECT sum(tokens) FROM loads WHERE run_id = $run").fetchall() == [(26 * tokens * 6,)]


@pytest.mark.parametrize("name", ["law", "summary"])
def test_loads_are_those_of_the_file(runs: dict[str, Run], name: str) -> None:
    query = """
        SELECT layer, expert, count(*), sum(weight)
        FROM (SELECT layer, unnest(experts) AS expert, unnest(weights) AS weight FROM read_parquet($path))
        GROUP BY layer, expert ORDER BY layer, expert
    """
    expected = duckdb.execute(query, {"path": str(FOLDER / f"{name}.parquet")}).fetchall()
    found = runs[name].sql(
        "SELECT layer, expert, tokens, weight_sum FROM loads WHERE run_id = $run AND tokens > 0 ORDER BY layer, expert"
    )
    rows = found.fetchall()
    assert [row[:3] for row in rows] == [row[:3] for row in expected]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in expected], rel=1e-12)


def test_slots_and_order_are_those_of_the_file(runs: dict[str, Run]) -> None:
    query = """
        SELECT count(*)
        FROM read_parquet($path) f
        JOIN tokens t ON t.run_id = $run AND t.sequence_id = f.sequence_id AND t.position = f.position
        JOIN routing r ON r.run_id = $run AND r.token = t.token AND r.layer = f.layer
        WHERE r.weights = f.weights AND list_sort(r.experts) = list_sort(f.experts::USMALLINT[])
    """
    assert runs["law"].sql(query, {"path": str(FOLDER / "law.parquet")}).fetchall() == [(26 * 8327,)]


@pytest.mark.parametrize(
    ("name", "m", "value"),
    [
        ("law", 4, 0.5386),
        ("law", 16, 0.3917),
        ("law", 64, 0.3075),
        ("summary", 4, 0.5372),
        ("summary", 16, 0.3940),
        ("summary", 64, 0.3269),
    ],
)
def test_local_consistency(runs: dict[str, Run], name: str, m: int, value: float) -> None:
    assert runs[name].sql(_SRP, {"m": m}).fetchall()[0][0] == pytest.approx(value, abs=5e-5)


def test_baseline_and_balanced_null_follow_from_the_layers(runs: dict[str, Run]) -> None:
    r = runs["law"].sql("SELECT avg(top_k / n_experts) FROM layers WHERE run_id = $run").fetchall()[0][0]
    assert 2 * r / (1 + r) == pytest.approx(0.1714, abs=5e-5)
    for m, value in ((4, 0.4472), (16, 0.2810), (64, 0.2103)):
        chance = [math.comb(m, c) * r**c * (1 - r) ** (m - c) for c in range(m + 1)]
        best = max(
            2 * sum(c * chance[c] for c in range(low, m + 1)) / (m * sum(chance[low:]) + m * r) for low in range(m + 1)
        )
        assert best == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize(("name", "value"), [("law", 5.88), ("summary", 4.92)])
def test_relevant_experts_of_a_layer(runs: dict[str, Run], name: str, value: float) -> None:
    assert runs[name].sql(_RELEVANT).fetchall()[0][0] == pytest.approx(value, abs=5e-3)


def test_every_expert_is_chosen_with_five_others(runs: dict[str, Run]) -> None:
    assert runs["law"].sql(_CO_ACTIVATION).fetchall() == [(5.0,)]


def _lru(sequences: list[list[list[int]]], size: int, *, preload: bool) -> float:
    """Hit rate of a cache of `size` experts for each sequence, filled slot by slot after each token.

    With preload the first `size` different experts of a sequence count as hits.
    """
    hits = choices = 0
    for tokens in sequences:
        cache: list[int] = []
        seen: set[int] = set()
        for experts in tokens:
            hits += sum(e in cache for e in experts)
            if preload:
                hits += min(max(0, size - len(seen)), sum(e not in seen for e in experts))
            for e in experts:
                cache = [*(c for c in cache if c != e), e][-size:]
            seen |= set(experts)
            choices += len(experts)
    return hits / choices


@pytest.mark.parametrize(
    ("size", "with_preload", "without"), [(6, 0.2494, 0.2454), (12, 0.3798, 0.3719), (24, 0.5966, 0.5807)]
)
def test_an_lru_cache_over_the_stored_decisions(
    runs: dict[str, Run], size: int, with_preload: float, without: float
) -> None:
    query = """
        SELECT list(r.experts ORDER BY token)
        FROM routing r JOIN tokens t USING (run_id, token)
        WHERE run_id = $run AND layer IN (1, 13, 26)
        GROUP BY layer, sequence_id
    """
    sequences = [tokens for (tokens,) in runs["law"].sql(query).fetchall()]
    assert _lru(sequences, size, preload=True) == pytest.approx(with_preload, abs=5e-5)
    assert _lru(sequences, size, preload=False) == pytest.approx(without, abs=5e-5)
