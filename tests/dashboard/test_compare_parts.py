"""The comparison's parts: tokens laid side by side against a reading of the tables, settings, and what cannot be said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.dashboard.answers import Answers
from moescope.dashboard.compare import configuration, grounds, measures, side_by_side, texts
from moescope.dashboard.pages import compare
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.store import Store


@pytest.fixture
def two(store_of: Callable[..., Store], Plan: Any) -> Any:
    """Two runs of the same texts whose routers and likelihoods were drawn apart."""
    store = store_of(Plan(name="first"), Plan(name="second", seed=5))
    return store.run("first"), store.run("second")


def components(tree: Any) -> list[Any]:
    if isinstance(tree, (list, tuple)):
        return [c for part in tree for c in components(part)]
    return [tree, *components(getattr(tree, "children", None))] if hasattr(tree, "_namespace") else []


def _grid(tree: Any, name: str) -> Any:
    return next(c for c in components(tree) if getattr(c, "id", None) == name)


def _decisions(run: Any, sequence: int) -> dict[tuple[int, int], set[int]]:
    rows = run.store.fetch(
        "SELECT t.position, r.layer, r.experts FROM routing r JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token "
        "WHERE r.run_id = ? AND t.sequence_id = ?",
        [run.run_id, sequence],
    )
    return {(position, layer): set(experts) for position, layer, experts in rows}


def test_switched_decisions_are_those_whose_sets_differ(two: Any) -> None:
    run, other = two
    for sequence in range(3):
        pairs = side_by_side.pairs_of(run, other, sequence)
        first, second = _decisions(run, sequence), _decisions(other, sequence)
        told = {(p.position, layer): moved for p in pairs for (layer, _), moved in p.moved.items()}
        truth = {
            place: (sorted(first[place] - second[place]), sorted(second[place] - first[place]))
            for place in first
            if first[place] != second[place]
        }
        assert told == truth
        assert truth, "the planted routers were drawn apart"


def test_lost_and_gained_are_predictions_right_in_one_run_only(two: Any) -> None:
    run, other = two
    rows = run.store.fetch(
        """
        WITH said AS (
            SELECT run_id, sequence_id, position, token_id,
                lag(predicted_id) OVER (PARTITION BY run_id, sequence_id ORDER BY position) = token_id AS correct
            FROM tokens
        )
        SELECT a.position, a.correct, b.correct
        FROM said a
        JOIN said b ON b.sequence_id = a.sequence_id AND b.position = a.position AND b.run_id = $other
        WHERE a.run_id = $run AND a.sequence_id = 0 AND a.position > 0
        """,
        {"run": run.run_id, "other": other.run_id},
    )
    pairs = side_by_side.pairs_of(run, other, 0)
    assert {p.position for p in pairs if p.fits("lost")} == {p for p, a, b in rows if a and not b}
    assert {p.position for p in pairs if p.fits("gained")} == {p for p, a, b in rows if b and not a}
    assert {p.position for p in pairs if p.fits("changed")} == {p.position for p in pairs if p.moved}
    assert len([p for p in pairs if p.fits("all")]) == 8


def test_the_grid_tints_only_what_changed_and_leads_to_both_runs(two: Any) -> None:
    run, other = two
    state = ViewState(run="first", other="second", sequence=0)
    grid = _grid(side_by_side.side_by_side(run, other, state), "cmp-tokens")
    pairs = {p.position: p for p in side_by_side.pairs_of(run, other, 0)}
    routers = [c for c in grid.columnDefs if c["field"].startswith("r") and c["field"][1:].isdigit()]
    assert [c["headerName"] for c in routers] == ["L0", "L1"]
    for row in grid.rowData:
        moved = pairs[row["position"]].moved
        for layer in (0, 1):
            assert bool(row[f"r{layer}"]) == ((layer, "mlp") in moved)
        assert decode(row["piece_href"].partition("?")[2]).token == pairs[row["position"]].token
        there = decode(row["in_other_href"].partition("?")[2])
        assert (there.run, there.token) == ("second", pairs[row["position"]].other)


def test_a_switch_is_written_with_the_experts_lost_and_gained() -> None:
    assert side_by_side._switch([5], [9]) == "E5 → E9"
    assert side_by_side._switch([1, 2], []) == "E1, E2 → —"


def test_texts_are_listed_by_how_much_their_likelihood_changed(two: Any) -> None:
    run, other = two
    rows = texts.changed_texts(run, other)
    means = [
        dict(
            run.store.fetch("SELECT sequence_id, avg(nll::DOUBLE) FROM tokens WHERE run_id = ? GROUP BY 1", [r.run_id])
        )
        for r in two
    ]
    truth = {s: means[1][s] - means[0][s] for s in means[0]}
    assert {row["sequence_id"]: row["change"] for row in rows} == pytest.approx(truth)
    assert [abs(row["change"]) for row in rows] == sorted(map(abs, truth.values()), reverse=True)


def test_measures_show_the_analysis(two: Any) -> None:
    run, other = two
    answers = Answers(run.store)
    result = answers.ask({"analysis": "compare_measures", "runs": ["first", "second"], "given": {}})
    grid = _grid(measures.measures(answers, run, other), "cmp-measures")
    for row, line in zip(grid.rowData, result.table.to_pylist(), strict=True):
        assert row["metric"] == line["metric"]
        assert row["first"] == f"{line['value_a']:,.4g}"
        outside = line["ci_low"] is not None and not line["ci_low"] <= 0 <= line["ci_high"]
        assert row["apart"] == (outside and abs(line["relative"]) > 1e-6)


def test_settings_that_differ_are_told_and_times_are_not_among_them(two: Any, store_of: Any, Plan: Any) -> None:
    run, other = two
    changed = {s.name for s in configuration.settings(run, other) if s.changed and s.matters}
    assert changed == {"seed"}
    every = {s.name for s in configuration.settings(run, other)}
    assert {"model", "revision", "corpus fingerprint", "recorded", "version of moescope", "routers"} <= every
    shown = str(configuration.configuration_table(run, other, every=False))
    assert "seed" in shown
    assert "planted-model" not in shown
    assert "planted-model" in str(configuration.configuration_table(run, other, every=True))
    assert "Nothing" in str(configuration.configuration_table(run, run, every=False))


def test_grounds_of_runs_of_the_same_texts(two: Any) -> None:
    known = grounds.grounds(*two)
    assert [g.holds for g in known.told] == ["yes"] * 4
    assert (known.pairs, known.likelihoods, known.routed) == (3, True, True)


def test_grounds_name_what_is_missing(store_of: Callable[..., Store], Plan: Any, Text: Any) -> None:
    other_texts = [Text("x", [b"<bos>", b"a"]), Text("x", [b"<bos>", b"b", b"c"])]
    store = store_of(
        Plan(name="moe"), Plan(name="dense", moe=False), Plan(name="else", texts=other_texts, status="failed")
    )
    dense = grounds.grounds(store.run("moe"), store.run("dense"))
    assert not dense.routed
    assert "No decisions in dense" in dense.told[3].words
    apart = grounds.grounds(store.run("moe"), store.run("else"))
    assert apart.pairs == 0
    assert apart.told[0].holds == "no"
    assert any("else is failed" in g.words for g in apart.told)
    able, unable = grounds.comparisons(store.run("moe"), store.run("dense"))
    assert "compare_routing" not in {a.name for a in able}
    assert any("dense has no routing (--probe routing)" in why for _, why in unable)


def test_the_body_leaves_out_what_cannot_be_aligned(store_of: Callable[..., Store], Plan: Any, Text: Any) -> None:
    store = store_of(Plan(name="moe"), Plan(name="else", texts=[Text("x", [b"<bos>", b"a"])]))
    shown = compare.body(store.run("moe"), store.run("else"), ViewState(run="moe", other="else"))
    ids = [c.id for c in components(shown) if isinstance(getattr(c, "id", None), str)]
    assert "cmp-text-list" not in ids
    assert "cmp-measured" in ids


def test_long_runs_wait_for_a_word_before_every_decision_is_read(two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare.findings_list, "DECISIONS", 10)
    state = ViewState(run="first", other="second")
    assert "These figures read all 84 decisions" in str(compare.body(*two, state))
    assert "These figures read" not in str(compare.body(*two, state.with_rest(ask="all")))


def test_a_sequence_that_is_not_in_both_is_refused(two: Any) -> None:
    with pytest.raises(InputError, match="sequence 77"):
        side_by_side.pairs_of(*two, 77)
    with pytest.raises(InputError, match="show="):
        side_by_side.shown(ViewState().with_rest(show="everything"))
    with pytest.raises(InputError, match="no page 4"):
        side_by_side.side_by_side(*two, ViewState(run="first", other="second", sequence=0, page=4))


def test_candidates_of_the_same_texts_come_first(store_of: Callable[..., Store], Plan: Any, Text: Any) -> None:
    store = store_of(Plan(name="a"), Plan(name="b"), Plan(name="c"))
    store.connection.execute("UPDATE runs SET corpus_fingerprint = 'x' WHERE name = 'c'")
    links = [c.href for c in components(compare.candidates(store.run("a"))) if hasattr(c, "href")]
    assert [decode(href.partition("?")[2]).other for href in links] == ["b", "c"]
