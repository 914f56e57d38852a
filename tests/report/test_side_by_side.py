"""Two runs and many: what changed, differences, a leaderboard that claims nothing it cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.report.before_after import effects_blocks, stored_effects
from moescope.report.compose import compose
from moescope.report.document import Document, Grid, Heading, Paragraph
from moescope.report.leaderboard import leaderboard_blocks
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
