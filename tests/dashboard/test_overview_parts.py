"""The overview's parts: runs, findings, effects, what is missing, each against SQL or the analysis behind it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from moescope.core.edit_kinds.experts import Ablate
from moescope.core.errors import InputError
from moescope.core.intervention import Intervention
from moescope.dashboard.answers import Answers
from moescope.dashboard.overview import findings_list, runs_grid
from moescope.dashboard.overview.anatomy_section import layer_links
from moescope.dashboard.overview.effects_list import edits_of, effects_section
from moescope.dashboard.overview.provenance import not_recorded
from moescope.dashboard.pages.overview import chosen_finding
from moescope.dashboard.url_state import Layer, ViewState, decode
from moescope.routing.findings import finding
from moescope.store.store import Store

CUT = Intervention([Ablate(layer=0, experts=[1, 2], how="route_around")])


def _plant_effect(store: Store, name: str, *, value: float, controls: list[float]) -> str:
    effect = str(uuid.uuid4())
    rows = [("target", None, value, value - 0.01, value + 0.01)]
    rows += [("control", draw, v, None, None) for draw, v in enumerate(controls)]
    for kind, draw, v, low, high in rows:
        store.connection.execute(
            "INSERT INTO effects VALUES (?, NULL, ?, NULL, ?, ?, ?, 'all', NULL, 'delta_nll', ?, ?, ?, 18, 'nats')",
            [effect, store.run(name).run_id, CUT.to_json(), kind, draw, v, low, high],
        )
    return effect


def components(tree: Any) -> list[Any]:
    if isinstance(tree, (list, tuple)):
        return [c for part in tree for c in components(part)]
    return [tree, *components(getattr(tree, "children", None))] if hasattr(tree, "_namespace") else []


def test_runs_are_listed_newest_first_with_their_state(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="whole"), Plan(name="part", status="incomplete"))
    part, whole = runs_grid.run_rows(store)
    assert (part["name"], whole["name"]) == ("part", "whole")
    assert (part["state"], whole["state"]) == ("▲ incomplete", "✓ complete")
    assert part["why"] == "blocks.0.mlp.hook_expert_indices: 3 events are missing"
    assert whole["why"] is None
    assert decode(part["name_href"].partition("?")[2]).run == "part"


def test_sizes_and_likelihoods_come_from_the_tables(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="one"), Plan(name="two", seed=3))
    truth = dict(store.fetch("SELECT name, avg(nll::DOUBLE) FROM tokens JOIN runs USING (run_id) GROUP BY name"))
    rows = runs_grid.measured(store, "two")
    assert {row["name"]: row["nll"] for row in rows} == pytest.approx(truth)
    assert all(row["bytes"] >= 0 for row in rows)
    assert {row["name"] for row in rows if row["here"]} == {"two"}


def test_an_intervention_is_told_in_words(store_of: Callable[..., Store], Plan: Any) -> None:
    assert runs_grid.intervention_words(CUT.to_json()) == "Removing L0E1, L0E2 (routed around)"
    assert runs_grid.intervention_words(None) == "none"
    assert runs_grid.intervention_words('{"format": 99}') == "of another version"


def test_only_what_the_run_has_records_for_is_asked(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="moe"), Plan(name="dense", moe=False))
    moe, dense = (findings_list.plan(store.run(name)) for name in ("moe", "dense"))
    assert {"load", "router_entropy", "nll", "residual_norms"} <= set(moe["names"])
    assert {"nll", "residual_norms"} <= set(dense["names"])
    assert not {"load", "router_entropy"} & set(dense["names"])
    assert len(dense["names"]) + dense["absent"] == len(moe["names"]) + moe["absent"]
    assert moe["later"] == []


def test_a_long_run_leaves_analyses_of_every_decision_for_later(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = findings_list.plan(run)
    monkeypatch.setattr(findings_list, "DECISIONS", 10)
    part = findings_list.plan(run)
    assert sorted([*part["names"], *part["later"]]) == sorted(whole["names"])
    assert "router_entropy" in part["later"]
    assert {"load", "nll"} <= set(part["names"])
    assert part["decisions"] == 2 * 2 * 21


def test_findings_are_asked_step_by_step_until_the_end(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings_list, "AT_ONCE_S", 0.0)
    answers, names, at = Answers(run.store), ["load", "router_entropy", "passages", "nll"], 0
    seen = []
    while at < len(names):
        part = findings_list.step(answers, run, names, at)
        assert at < part["at"] <= at + 1 + len(part["refused"])
        at = part["at"]
        seen += [row["id"] for row in part["rows"]] + [each["name"] for each in part["refused"]]
    assert seen == names


def test_a_finding_tells_what_the_analysis_found(run: Any) -> None:
    result = Answers(run.store).ask({"analysis": "router_entropy", "runs": [run.name], "given": {}})
    row, found = findings_list.row(finding(result), ViewState(run=run.name)), finding(result)
    assert row["finding"] == result.title
    assert row["distance"] == found.distance
    assert row["cells"] == f"{found.beyond} of {found.cells}"
    assert decode(row["finding_href"].partition("?")[2]).given("finding") == "router_entropy"


def test_findings_within_chance_rank_after_those_beyond(run: Any) -> None:
    names = findings_list.plan(run)["names"]
    rows = []
    at = 0
    while at < len(names):
        part = findings_list.step(Answers(run.store), run, names, at)
        rows, at = rows + part["rows"], part["at"]
    order = [row["verdict"][2:] for row in sorted(rows, key=lambda row: row["rank"])]
    words = ["beyond chance", "in part", "within chance", "no chance level"]
    assert order == sorted(order, key=words.index)


def test_what_was_not_recorded_names_the_probe(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="moe"), Plan(name="dense", moe=False, residual=False))
    probes = {probe for _, _, probe in not_recorded(store.run("moe"), moe=True)}
    assert probes == {"router_logits", "expert_outputs", "attention", "activations"}
    assert {probe for _, _, probe in not_recorded(store.run("dense"), moe=False)} == {
        "residual",
        "attention",
        "activations",
    }


def test_effects_lead_to_the_lab_and_to_their_panel(run: Any) -> None:
    effect = _plant_effect(run.store, run.name, value=0.5, controls=[0.1, 0.2])
    small = _plant_effect(run.store, run.name, value=-0.05, controls=[-0.1, 0.1])
    section = effects_section(Answers(run.store), run)
    grid = next(c for c in components(section) if getattr(c, "id", None) == "ov-effects")
    assert [row["id"] for row in grid.rowData] == [effect, small]
    first, second = grid.rowData
    assert (first["value"], first["outside"], second["outside"]) == (0.5, "● outside", "○ within")
    assert first["controls"] == "+0.1500, +0.1000 to +0.2000"
    assert decode(first["lab_href"].partition("?")[2]).edits == ("ablate layer=0 experts=1,2 how=route_around",)
    shown = decode(first["intervention_href"].partition("?")[2])
    assert (shown.given("finding"), shown.given("effect")) == ("effect", effect)


@pytest.mark.parametrize("text", [None, "", "{}", "not json", json.dumps({"format": 1, "edits": []})])
def test_an_intervention_that_cannot_be_written_has_no_link(text: str | None) -> None:
    assert edits_of(text) is None


def test_a_layer_leads_to_its_pages(run: Any, store_of: Callable[..., Store], Plan: Any) -> None:
    assert layer_links(run, None) is None
    hrefs = [c.href for c in components(layer_links(run, Layer(1))) if hasattr(c, "href")]
    assert {href.partition("?")[0] for href in hrefs} == {"/tokens", "/experts", "/routing", "/phenomena", "/features"}
    dense = store_of(Plan(moe=False)).run("planted")
    hrefs = [c.href for c in components(layer_links(dense, Layer(1))) if hasattr(c, "href")]
    assert {href.partition("?")[0] for href in hrefs} == {"/tokens", "/phenomena", "/features"}
    assert "no layer 7" in str(layer_links(run, Layer(7)))


def test_a_finding_that_is_none_is_refused(run: Any) -> None:
    assert chosen_finding(run, ViewState(run=run.name)) is None
    with pytest.raises(InputError, match="no analysis"):
        chosen_finding(run, ViewState(run=run.name).with_rest(finding="astrology"))
