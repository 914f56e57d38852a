"""Two runs and many: what changed, differences, a leaderboard that claims nothing it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.core.result import Result
from moescope.report.before_after import effects_blocks, stored_effects
from moescope.report.compose import compose
from moescope.report.document import Document, Grid, Heading, Paragraph
from moescope.report.leaderboard import labels_of, leaderboard_blocks
from moescope.report.summary import at_the_median
from moescope.routing.findings import finding
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]


@pytest.fixture(scope="module")
def plant(planted: ModuleType, store: Store) -> Plant:
    def make(name: str, nll: Any, *, status: str = "complete", lengths: tuple[int, ...] = (20,) * 8) -> Run:
        values = np.broadcast_to(np.asarray(nll, float), (sum(lengths),))
        return planted.plant(store, planted.Plan(lengths=list(lengths), nll=values), name=name, status=status)

    return make


@pytest.fixture(scope="module")
def noisy() -> np.ndarray:
    return np.random.default_rng(0).exponential(1, 160)


def _marks(data: list[dict[str, Any]], metric: str) -> dict[str, str]:
    return {row["run"]: row["mark"] for row in data if row["metric"] == metric}


def _grid(document: Document, heading: str) -> Grid:
    at = next(n for n, b in enumerate(document.blocks) if isinstance(b, Heading) and b.text == heading)
    return next(b for b in document.blocks[at:] if isinstance(b, Grid))


def test_best_is_marked_only_apart_from_all_others(plant: Plant, noisy: np.ndarray) -> None:
    clear = [plant("far better", noisy), plant("worse", noisy + 9), plant("worst", noisy + 20)]
    assert _marks(leaderboard_blocks(clear)[1], "mean NLL") == {"far better": "●", "worse": "", "worst": ""}
    close = [plant("one", noisy), plant("other", noisy + 0.001), plant("third", noisy + 9)]
    assert _marks(leaderboard_blocks(close)[1], "mean NLL") == {"one": "≈", "other": "", "third": ""}
    equal = [plant("twin", noisy), plant("its like", noisy), plant("beyond both", noisy + 9)]
    assert _marks(leaderboard_blocks(equal)[1], "mean NLL") == {"twin": "≈", "its like": "≈", "beyond both": ""}


def test_only_runs_of_the_same_tokens_are_ranked(plant: Plant, noisy: np.ndarray) -> None:
    """Another cut of as many tokens, or a run that does not tell its texts, is on other ground."""
    other_cut = plant("other cut", noisy, lengths=(40,) * 4)
    untold = [plant(f"untold {n}", noisy) for n in range(2)]
    no_corpus = [plant(f"no corpus {n}", noisy) for n in range(2)]
    connection = other_cut.store.connection
    for run in untold:
        connection.execute("UPDATE sequences SET content_hash = NULL WHERE run_id = ?", [run.run_id])
    for run in no_corpus:
        connection.execute("UPDATE runs SET corpus_fingerprint = NULL WHERE run_id = ?", [run.run_id])
    runs = [plant("this cut", noisy + 5), plant("this too", noisy + 50), other_cut, *untold, *no_corpus]
    data = leaderboard_blocks(runs)[1]
    assert {row["run"] for row in data if row["same_texts"]} == {"this cut", "this too"}
    assert {name for name, mark in _marks(data, "mean NLL").items() if mark} == {"this cut"}


def test_leaderboard_tells_means_and_intervals_that_hold_them(plant: Plant, noisy: np.ndarray) -> None:
    run = plant("told", noisy)
    (row,) = [
        r
        for r in leaderboard_blocks([run, plant("beside", noisy)])[1]
        if r["run"] == "told" and r["metric"] == "mean NLL"
    ]
    known = run.sql(
        "SELECT avg(nll::DOUBLE), count(nll) FROM tokens WHERE run_id = $run AND nll IS NOT NULL"
    ).fetchall()
    assert (row["value"], row["n"]) == (pytest.approx(known[0][0]), known[0][1])
    assert row["ci_low"] < row["value"] < row["ci_high"]
    assert row["better"] == "less"


def test_runs_of_other_texts_are_flagged_and_not_ranked(plant: Plant, noisy: np.ndarray) -> None:
    runs = [plant("long", noisy), plant("long too", noisy + 5), plant("short", 0.1, lengths=(9, 9))]
    blocks, data = leaderboard_blocks(runs)
    assert _marks(data, "mean NLL") == {"long": "●", "long too": "", "short": ""}
    assert {row["run"] for row in data if not row["same_texts"]} == {"short"}
    assert any(isinstance(b, Paragraph) and b.tone == "warning" and "not comparable" in b.text for b in blocks)
    grid = next(b for b in blocks if isinstance(b, Grid))
    assert ["other texts" in row[2].text for row in grid.rows] == [False, False, True]


def test_equal_names_of_two_stores_are_told_apart(
    planted: ModuleType, plant: Plant, noisy: np.ndarray, tmp_path: Path
) -> None:
    mine = plant("same", noisy)
    with Store(tmp_path / "other.duckdb") as other:
        theirs = planted.plant(other, planted.Plan(lengths=[20] * 8, nll=noisy), name="same")
        labels = {row["run"] for row in leaderboard_blocks([mine, theirs])[1]}
    assert labels == {"same (runs.duckdb)", "same (other.duckdb)"}


def test_equal_names_of_equal_files_are_told_apart_everywhere(
    planted: ModuleType, noisy: np.ndarray, tmp_path: Path
) -> None:
    for folder in ("p", "q", "p/deep/q"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        with Store(tmp_path / folder / "runs.duckdb") as made:
            planted.plant(made, planted.Plan(lengths=[20] * 8, nll=noisy), name="same")
            made.connection.execute("UPDATE runs SET seed = ?", [len(folder)])
    with (
        Store(tmp_path / "p" / "runs.duckdb", read_only=True) as p,
        Store(tmp_path / "q" / "runs.duckdb", read_only=True) as q,
        Store(tmp_path / "p" / "deep" / "q" / "runs.duckdb", read_only=True) as deep,
    ):
        runs = [p.run("same"), q.run("same"), deep.run("same")]
        assert labels_of(runs) == ["same (p/runs.duckdb)", "same (q/runs.duckdb)", "same (2)"]
        document = compose([runs[0], runs[2]]).document
    told = ["same (p/runs.duckdb)", "same (q/runs.duckdb)"]
    assert list(_grid(document, "What changed in configuration").columns)[1:] == told
    assert list(_grid(document, "Measures before and after").columns)[1:3] == told


def test_two_runs_begin_with_what_changed(plant: Plant, noisy: np.ndarray) -> None:
    first, second = plant("before", noisy), plant("after", noisy + 0.5)
    cut = '{"format": 1, "edits": [{"kind": "ablate", "layer": 0, "experts": [1], "how": "route_around"}]}'
    second.store.connection.execute("UPDATE runs SET intervention = ? WHERE run_id = ?", [cut, second.run_id])
    document = compose([first, second]).document
    first_grid = next(block for block in document.blocks if isinstance(block, Grid))
    assert first_grid is _grid(document, "What changed in configuration")
    assert [row[0].text for row in first_grid.rows] == ["intervention"]
    measures = _grid(document, "Measures before and after")
    (nll,) = [row for row in measures.rows if row[0].text == "mean NLL"]
    assert nll[3].order == pytest.approx(0.5, abs=1e-6)
    assert "leaves 0 out" in nll[6].text
    before = (
        _grid(document, "Findings before and after")
        if any(isinstance(b, Heading) and b.text == "Findings before and after" for b in document.blocks)
        else None
    )
    assert before is None or all(len(row) == len(before.columns) for row in before.rows)


def test_effects_are_told_with_the_mean_and_range_of_their_controls(planted: ModuleType, store: Store) -> None:
    fields = planted.everything(layers=1, n_experts=4, labels=["a", "b"], tokens=10)
    base = planted.plant(store, planted.Plan(**fields), name="with effects")
    known = {
        effect: (mean, low, high)
        for effect, mean, low, high in store.fetch(
            """
            SELECT effect_id::VARCHAR, avg(value), min(value), max(value)
            FROM effects
            WHERE base_run_id = ? AND kind = 'control' AND group_kind = 'all' AND metric = 'delta_nll'
            GROUP BY effect_id
            """,
            [base.run_id],
        )
    }
    told = [row for row in stored_effects(base) if row["metric"] == "delta_nll" and row["effect_id"] in known]
    assert len(told) == len(known) > 0
    for row in told:
        assert (row["control"], row["control_low"], row["control_high"]) == pytest.approx(known[row["effect_id"]])
    grid = next(block for block in effects_blocks(base) if isinstance(block, Grid))
    for row, line in zip(stored_effects(base), grid.rows, strict=False):
        outside = bool(row["controls"]) and not row["control_low"] <= row["value"] <= row["control_high"]
        assert ("outside" in line[6].text) == outside


def test_incomplete_run_is_said_at_the_top(plant: Plant, noisy: np.ndarray) -> None:
    runs = [plant("whole one", noisy), plant("half", noisy, status="incomplete"), plant("whole too", noisy)]
    document = compose(runs).document
    warnings = [block.text for block in document.blocks[:4] if isinstance(block, Paragraph) and block.tone == "warning"]
    assert any("half is incomplete" in text for text in warnings)


def test_every_link_of_a_report_leads_somewhere(plant: Plant, noisy: np.ndarray) -> None:
    from moescope.report.document import Answer

    document = compose([plant("x", noisy), plant("y", noisy + 1), plant("z", noisy + 2)]).document
    anchors = {b.anchor for b in document.blocks if isinstance(b, (Heading, Answer))}
    links = {c.to for b in document.blocks if isinstance(b, Grid) for row in b.rows for c in row if c.to}
    assert links
    assert links <= anchors


def test_finding_is_told_with_the_interval_that_was_judged() -> None:
    """Three rows of one value and chance level: the widest, the middle and the narrowest interval, and one without any."""
    rows = {
        "metric": ["share"] * 4,
        "layer": [0, 1, 2, 3],
        "value": [0.5] * 4,
        "null": [0.1] * 4,
        "ci_low": [None, 0.1, 0.49, 0.4],
        "ci_high": [None, 0.9, 0.51, 0.6],
    }
    found = finding(Result("Half", pa.table(rows), "share", {}, 4, "tokens"))
    middle = at_the_median(found)
    assert middle is not None
    assert (middle["layer"], middle["ci_low"], middle["ci_high"]) == (3, 0.4, 0.6)
    assert found.distance == pytest.approx(4)
