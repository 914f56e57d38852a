from __future__ import annotations

import importlib.util
import json
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dash.development.base_component import Component

from moescope.analysis_api import analyze
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.dashboard.answers import Answers
from moescope.dashboard.pages import phenomena
from moescope.dashboard.phenomena_page.answers_shown import head_table, super_expert_table, token_shown
from moescope.dashboard.phenomena_page.expert_links import linked_experts
from moescope.dashboard.phenomena_page.head_card import head_card, mask_edit
from moescope.dashboard.phenomena_page.head_masking import masking
from moescope.dashboard.phenomena_page.head_roles import roles
from moescope.dashboard.phenomena_page.head_scores import Head, find_head, scores_of
from moescope.dashboard.phenomena_page.recorded import recorded
from moescope.dashboard.phenomena_page.verdicts import verdict
from moescope.dashboard.url_state import Layer, ViewState
from moescope.store.run import Run
from moescope.store.store import Store

_SPEC = importlib.util.spec_from_file_location("planted_records", Path(__file__).parents[1] / "routing" / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
records: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted_records"] = records
_SPEC.loader.exec_module(records)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with Store(tmp_path_factory.mktemp("phenomena") / "runs.duckdb") as store:
        yield store


@pytest.fixture(scope="module")
def full(opened: Store) -> Run:
    """Records of every kind, three layers."""
    plan = records.Plan(**records.everything(layers=3, n_experts=6, labels=["a", "b"] * 2))
    run: Run = records.plant(opened, plan, name="full")
    return run


def everything_in(component: Any) -> list[Any]:
    """A component, and all that stands in it."""
    if isinstance(component, (list, tuple)):
        return [inner for each in component for inner in everything_in(each)]
    children = getattr(component, "children", None) if isinstance(component, Component) else None
    return [component, *(everything_in(children) if children is not None else [])]


def text_of(component: Any) -> str:
    return " ".join(part for part in everything_in(component) if isinstance(part, str))


def hrefs(component: Any) -> list[str]:
    return [part.href for part in everything_in(component) if getattr(part, "href", None)]


ROW = {"value": 0.2, "ci_low": 0.1, "ci_high": 0.3, "null": 1.0, "null_low": 0.9, "null_high": 1.1}


@pytest.mark.parametrize(
    ("change", "share", "expected"),
    [
        ({}, True, "lost: less remains than under any random cut, and the interval lies below 100 %"),
        ({"ci_high": 1.2}, True, "less remains than under any random cut, but the interval reaches 100 %"),
        (
            {"ci_low": 1.1, "ci_high": 1.2},
            True,
            "less remains than under any random cut, and the interval lies above 100 %",
        ),
        ({"value": 0.95}, True, "within the range of random cuts"),
        ({"null_low": None, "null_high": None}, True, "no random cuts beside it, so no verdict"),
        ({"null_low": float("nan")}, True, "no random cuts beside it, so no verdict"),
        ({"ci_low": None}, True, "less remains than under any random cut; no interval"),
        ({"value": None}, True, "not measured"),
        (
            {"value": 2.0, "ci_low": 1.5, "ci_high": 2.5},
            False,
            "more than under any random cut, and the interval lies above 0",
        ),
        (
            {"value": 2.0, "ci_low": -0.5, "ci_high": 2.5},
            False,
            "more than under any random cut, but the interval reaches 0",
        ),
        ({"value": 0.1, "ci_low": 0.05}, False, "less than under any random cut, and the interval lies above 0"),
    ],
)
def test_a_verdict_is_no_more_than_interval_and_controls_allow(
    change: dict[str, Any], share: bool, expected: str
) -> None:
    assert verdict({**ROW, **change}, share=share) == expected


def test_names_of_experts_become_links_and_other_text_stays() -> None:
    shown = linked_experts("L1·E3, L2 attn·E10 and <b>", "a&b")
    assert [part if isinstance(part, str) else part.children for part in shown] == [
        "L1·E3",
        ", ",
        "L2 attn·E10",
        " and <b>",
    ]
    assert hrefs(shown) == ["/experts?run=a%26b&layer=1&expert=3", "/experts?run=a%26b&layer=2.attn&expert=10"]
    assert linked_experts("L1·H3", "a&b") == ["L1·H3"]


def test_scores_of_a_head_are_those_of_the_table_with_their_ranks(full: Run) -> None:
    found = {row["metric"]: row for row in scores_of(full, Head(1, "attn", 2))}
    stored = full.store.fetch(
        """
        SELECT metric, value, (SELECT count(*) + 1 FROM heads o WHERE o.run_id = h.run_id AND o.metric = h.metric
            AND o.condition = h.condition AND o.value > h.value)
        FROM heads h
        WHERE run_id = ? AND layer = 1 AND head = 2
        """,
        [full.run_id],
    )
    assert {metric: (row["value"], row["rank"]) for metric, row in found.items()} == {m: (v, r) for m, v, r in stored}
    assert found["sink_alpha_0"]["value"] == pytest.approx(1.0)


def test_the_table_of_leading_heads_follows_the_measure_of_the_address(full: Run) -> None:
    answers = Answers(full.store)
    shown = head_table(answers, full.name, ViewState().with_rest(measure="induction"))
    rows = next(part for part in everything_in(shown) if hasattr(part, "rowData")).rowData
    frame = analyze(full, "head_map", metric="induction").df().sort_values("value", ascending=False)
    assert [row["value"] for row in rows] == frame["value"].tolist()
    first = frame.iloc[0]
    assert rows[0]["id"] == f"{first['layer']}|{first['head']}"
    assert "has no wit" in str(head_table(answers, full.name, ViewState().with_rest(measure="wit")))


@pytest.mark.parametrize(
    "state", [ViewState(head=2), ViewState(layer=Layer(9), head=0), ViewState(layer=Layer(1), head=99)]
)
def test_a_head_that_is_not_there_is_refused_with_what_is(full: Run, state: ViewState) -> None:
    with pytest.raises(InputError) as refused:
        find_head(full, state)
    assert refused.value.found or refused.value.expected
    assert refused.value.fix


def test_roles_follow_their_published_thresholds_and_count_overlaps(full: Run) -> None:
    called = {c.rule.role: c for c in roles(full, Head(0, "attn", 2))}
    sink = called["attention sink"]
    assert (sink.value, sink.called, sink.count, sink.heads) == (pytest.approx(1.0), True, 6, 9)
    values = dict(
        full.store.fetch(
            "SELECT layer * 10 + head, value FROM heads WHERE run_id = ? AND metric = 'induction'", [full.run_id]
        )
    )
    induction = called["induction head"]
    assert induction.called == (values[2] >= 0.3)
    assert (induction.count, induction.heads) == (sum(v >= 0.3 for v in values.values()), 12)
    both = sum(values[10 * layer + head] >= 0.3 for layer in range(3) for head in (1, 2))
    assert sink.both["induction head"][0] == both


def test_masking_a_head_is_told_with_its_controls_alone_before_together(full: Run) -> None:
    lone, group = str(uuid.UUID(int=1 << 90)), str(uuid.UUID(int=3 << 90))
    given = {
        lone: {"name": None, "edits": [{"kind": "mask_head", "layer": 1, "heads": [2]}]},
        group: {"name": "chain, heads: L1·H2, L0·H1", "edits": [
            {"kind": "mask_head", "layer": 1, "heads": [0, 2]}, {"kind": "mask_head", "layer": 0, "heads": [1]}]},
    }  # fmt: skip
    for effect, intervention in given.items():
        for kind, draw, value in (("target", None, 0.4), ("control", 0, 0.01), ("control", 1, 0.03)):
            full.store.connection.execute(
                """
                INSERT INTO effects BY NAME
                SELECT ?::UUID AS effect_id, ?::UUID AS base_run_id, ?::JSON AS intervention, ? AS kind, ? AS draw, 'all' AS group_kind,
                    'delta_nll' AS metric, ? AS value, 0.3 AS ci_low, 0.5 AS ci_high, 100 AS n, 'nats' AS unit
                """,
                [effect, full.run_id, json.dumps(intervention), kind, draw, value],
            )
    found = masking(full, Head(1, "attn", 2))
    assert [(m.effect, m.heads, m.value, m.controls, m.null_low, m.null_high) for m in found] == [
        (lone, 1, 0.4, 2, 0.01, 0.03),
        (group, 3, 0.4, 2, 0.01, 0.03),
    ]
    assert [m.effect for m in masking(full, Head(0, "attn", 1))] == [group]
    assert masking(full, Head(1, "attn.1", 2)) == []
    card = text_of(head_card(full, Head(1, "attn", 2), ViewState(run="full"), None))
    assert "L1·H2 alone" in card
    assert "3 heads together, L1·H2 among them" in card


def test_heads_are_counted_in_every_layer_and_other_edits_apart(full: Run) -> None:
    head = {"kind": "mask_head", "layer": 2, "heads": [1]}
    edits = {
        "with others": [head, {"kind": "ablate", "layer": 0, "experts": [1, 2]}, {"kind": "skip", "layer": 1}],
        "layers": [{"kind": "mask_head", "layer": [1, 2], "heads": [0, 1]}],
        "everywhere": [{"kind": "mask_head", "layer": None, "heads": [1]}],
    }
    full.store.add_layers(
        full, [{"layer": n, "block": "attn", "stack": "decoder", "kind": "attention"} for n in range(3)]
    )
    for number, (name, several) in enumerate(edits.items()):
        full.store.connection.execute(
            """
            INSERT INTO effects BY NAME
            SELECT ?::UUID AS effect_id, ?::UUID AS base_run_id, ?::JSON AS intervention, 'target' AS kind, 'all' AS group_kind,
                'delta_nll' AS metric, 0.4 AS value, 100 AS n, 'nats' AS unit
            """,
            [str(uuid.UUID(int=(9 + number) << 90)), full.run_id, json.dumps({"name": name, "edits": several})],
        )
    found = {m.name: (m.heads, m.others) for m in masking(full, Head(2, "attn", 1))}
    assert found == {"with others": (1, 2), "layers": (4, 0), "everywhere": (3, 0)}
    card = text_of(head_card(full, Head(2, "attn", 1), ViewState(run="full"), None))
    assert "L2·H1 and 2 other edits" in card
    assert "L2·H1 alone" not in card
    assert "4 heads together, L2·H1 among them" in card


def test_the_lab_gets_an_edit_that_it_can_read_beside_those_there_were(full: Run) -> None:
    state = ViewState(run="full", edits=("ablate layer=3 experts=5",))
    card = head_card(full, Head(1, "attn", 2), state, [0, 1, 2])
    [lab] = [href for href in hrefs(card) if href.startswith("/lab")]
    assert lab.endswith("&edits=ablate+layer=3+experts=5;mask_head+layer=1+heads=2")
    assert read_edit(mask_edit(Head(1, "attn.1", 2))).block == "attn.1"  # type: ignore[attr-defined]  # of this kind


def test_super_experts_are_told_by_rule_with_links_to_card_and_token(full: Run) -> None:
    grid = next(p for p in everything_in(super_expert_table(Answers(full.store), full.name)) if hasattr(p, "rowData"))
    frame = analyze(full, "super_experts").df()
    first = frame[frame["round"] == 0]
    assert len(grid.rowData) == len(first)
    assert sum(row["called"] == "yes" for row in grid.rowData) == int(first["super_expert"].sum())
    row = grid.rowData[0]
    assert row["expert_href"].startswith("/experts?run=full&layer=")
    assert row["token_href"].startswith("/tokens?run=full&token=")


def test_a_token_is_shown_with_its_text_and_its_size_at_every_layer(full: Run) -> None:
    shown = token_shown(full, 7)
    assert "At each of 3 layers" in text_of(shown)
    assert hrefs(shown) == ["/tokens?run=full&token=7"]
    assert "not recorded" in text_of(token_shown(full, 10**9))


def test_a_run_without_phenomena_says_what_would_be_here_and_which_runs_have_some(opened: Store, full: Run) -> None:
    bare = records.plant(opened, records.Plan(lengths=[4]), name="bare <b>'; rm")
    page = phenomena.layout(bare, ViewState())
    assert "moescope phenomena planted --store" in text_of(page)
    assert "full" in text_of(page)
    assert "/phenomena?run=full" in hrefs(page)
    assert recorded(bare).nothing
    assert recorded(full).protocols["induction_heads"] == "full"


def test_a_dense_run_with_the_stream_alone_shows_that_and_says_what_is_missing(opened: Store) -> None:
    import numpy as np

    run = records.plant(
        opened, records.Plan(lengths=[6], streams={0: records.Stream(np.ones(6), median=np.ones(1))}), name="dense"
    )
    page = text_of(phenomena.layout(run, ViewState()))
    assert "has no experts" in page
    assert "--probe tokens,attention" in page
