from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from dash.development.base_component import Component

from moescope.analysis_api import analyze
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.dashboard.features_page.contexts import contexts, examples, step
from moescope.dashboard.features_page.feature_facts import FeatureFacts
from moescope.dashboard.features_page.feature_view import feature_view
from moescope.dashboard.features_page.latents import LatentLists, latent_list, page
from moescope.dashboard.features_page.readings import Reading, chosen_reading, latent_edit, sae_rows
from moescope.dashboard.features_page.tabs import PANELS, TABS, Shown, filled_by, tab
from moescope.dashboard.pages import features
from moescope.dashboard.url_state import Layer, ViewState, decode
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
    with Store(tmp_path_factory.mktemp("features") / "runs.duckdb") as store:
        yield store


@pytest.fixture(scope="module")
def full(opened: Store) -> Run:
    """Records of every kind; the autoencoder `planted sae` was read on it."""
    plan = records.Plan(**records.everything(layers=3, n_experts=6, labels=["a", "b"] * 2))
    run: Run = records.plant(opened, plan, name="full")
    return run


@pytest.fixture(scope="module")
def reading(full: Run) -> Reading:
    found = chosen_reading(sae_rows(full.store), full, ViewState(sae="planted sae"))
    assert found is not None
    return found


def everything_in(component: Any) -> list[Any]:
    if isinstance(component, (list, tuple)):
        return [inner for each in component for inner in everything_in(each)]
    children = getattr(component, "children", None) if isinstance(component, Component) else None
    return [component, *(everything_in(children) if children is not None else [])]


def text_of(component: Any) -> str:
    return " ".join(part for part in everything_in(component) if isinstance(part, str))


def hrefs(component: Any) -> list[str]:
    return [part.href for part in everything_in(component) if getattr(part, "href", None)]


def test_an_autoencoder_is_named_with_the_run_whose_numbers_stand_beside_it(full: Run, reading: Reading) -> None:
    assert (reading.run, reading.read, reading.d_sae) == ("full", True, 12)
    rows = [row for row in sae_rows(full.store) if row["name"] == "planted sae"]
    fvu = full.store.fetch(
        """
        SELECT max(value) FROM sae_measures JOIN saes USING (sae_id)
        WHERE name = 'planted sae' AND metric = 'fvu' AND condition = 'sae' AND group_kind = 'all'
        """
    )
    assert rows[0]["fvu"] == fvu[0][0]


def test_features_of_another_run_are_shown_as_of_that_run(opened: Store, full: Run) -> None:
    other = records.plant(opened, records.Plan(lengths=[4]), name="other")
    chosen = chosen_reading(sae_rows(opened), other, ViewState(sae="planted sae"))
    assert chosen is not None
    assert chosen.run == "full"
    body = features.body(other, ViewState(run="other", sae="planted sae"))
    assert "not from" in text_of(body)
    assert any("run=full" in href for href in hrefs(body))
    with pytest.raises(InputError, match="no autoencoder"):
        chosen_reading(sae_rows(opened), other, ViewState(sae="mine"))


def test_the_list_has_every_latent_with_what_sql_says_of_it(full: Run, reading: Reading) -> None:
    frame = latent_list(full, reading).set_index("feature")
    stored = full.store.fetch(
        "SELECT feature, active / tokens, maximum FROM features WHERE run_id = ? AND sae_id = ? ORDER BY feature",
        [full.run_id, reading.sae_id],
    )
    assert [(int(f), row["density"]) for f, row in frame.iterrows()] == [(f, d) for f, d, _ in stored]
    assert frame["label"].dropna().to_dict() == {0: "a"}
    assert frame.loc[0, "lift"] == 2.0
    peak = full.store.fetch(
        """
        SELECT t.token_id FROM feature_contexts c
        JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id AND t.position = c.position
        WHERE c.run_id = ? AND c.sae_id = ? AND c.feature = 4 AND c.stratum = 0 AND c.rank = 0
        """,
        [full.run_id, reading.sae_id],
    )[0][0]
    assert f"t{peak}" in frame.loc[4, "peaks"]


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature": range(5),
            "density": [0.5, 0.1, 0.2, 0.0, 0.3],
            "score": [0.1, None, 0.9, 0.9, 0.2],
            "label": ["python", None, "the bible", None, "perl"],
            "search": ["the\npython", "[.*", "<script>\nthe bible", "17", "perl"],
        }
    )


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, [2, 3, 4, 0, 1]),
        ({"text": "THE"}, [2, 0]),
        ({"text": ".*"}, [1]),
        ({"text": "<script>"}, [2]),
        ({"text": "3"}, [3]),
        ({"text": "17"}, [3]),
        ({"text": "nothing"}, []),
        ({"sort": [{"colId": "density", "sort": "asc"}]}, [3, 1, 2, 4, 0]),
        ({"sort": [{"colId": "no such column", "sort": "asc"}]}, [2, 3, 4, 0, 1]),
        ({"filters": {"density": {"filterType": "number", "type": "greaterThan", "filter": 0.2}}}, [4, 0]),
        ({"filters": {"density": {"filterType": "number", "type": "inRange", "filter": 0.1, "filterTo": 0.2}}}, [2, 1]),
        ({"filters": {"label": {"filterType": "text", "type": "contains", "filter": "P"}}}, [4, 0]),
        ({"filters": {"label": {"filterType": "text", "type": "blank"}}}, [3, 1]),
        ({"filters": {"search": {"type": "contains", "filter": "perl"}, "x": {}}}, [2, 3, 4, 0, 1]),
        (
            {"filters": {"density": {"operator": "OR", "conditions": [
                {"filterType": "number", "type": "equals", "filter": 0.5}, {"filterType": "number", "type": "lessThan", "filter": 0.1}]}}},
            [3, 0],
        ),
        ({"start": 1, "end": 3}, [3, 4]),
    ],
)  # fmt: skip
def test_search_filters_and_order_are_of_the_whole_list(
    frame: pd.DataFrame, asked: dict[str, Any], expected: list[int]
) -> None:
    found = page(frame, **asked)
    assert [row["feature"] for row in found.rows] == expected
    assert [row["id"] for row in found.rows] == [str(number) for number in expected]
    assert found.found == (5 if "start" in asked else len(expected))
    assert all(
        value is None or not isinstance(value, float) or value == value for row in found.rows for value in row.values()
    )


def test_a_list_is_made_anew_when_the_store_has_changed(full: Run, reading: Reading) -> None:
    lists = LatentLists()
    first = lists.of(full, reading, 0)
    assert lists.of(full, reading, 0) is first
    assert lists.of(full, reading, 1) is not first


def test_examples_have_their_activation_on_the_token_it_belongs_to(full: Run, reading: Reading) -> None:
    found = examples(full, reading.sae_id, 4)
    assert [(e.stratum, e.rank, round(e.value, 6)) for e in found] == [(0, 0, 5.0), (0, 1, 4.9), (1, 0, 4.8)]
    for example in found:
        [peak] = [piece for piece in example.pieces if piece.peak]
        assert (peak.token, round(peak.value or 0, 5)) == (example.token, round(example.value, 5))
        position, text = full.store.fetch(
            """
            SELECT t.position, v.text FROM tokens t JOIN vocabulary v USING (run_id, token_id)
            WHERE t.run_id = ? AND t.token = ?
            """,
            [full.run_id, example.token],
        )[0]
        assert (position, peak.text) == (3, text)
    shown = contexts(full, found, ViewState(run="full"))
    assert [h for h in hrefs(shown) if f"token={found[0].token}" in h]
    assert "quantile 1" in text_of(shown)


def test_few_spans_are_made_however_many_tokens_fire() -> None:
    assert [step(v, 10.0) for v in (None, 0.0, 1.9, 2.0, 9.99, 10.0)] == [0, 0, 1, 2, 5, 5]


def test_a_latents_page_has_its_facts_links_and_edits(full: Run, reading: Reading) -> None:
    state = ViewState(run="full", sae="planted sae", feature=0, edits=("skip layer=0",))
    shown = feature_view(full, reading, 0, state)
    text = text_of(shown)
    assert "100 of 10,000 tokens read" in text
    assert "2.00 [1.60, 2.50]" in text
    assert "1 of 2 labels above 1 at a false-discovery rate of 5 %" in text
    lab = [decode(href.partition("?")[2]) for href in hrefs(shown) if href.startswith("/lab")]
    assert [s.edits[0] for s in lab] == ["skip layer=0"] * 2
    added, out = (read_edit(s.edits[1]) for s in lab)
    assert (added.latents, added.how, added.values, added.sae) == ((0,), "add", (1.0,), "planted sae")  # type: ignore[attr-defined]  # of this kind
    assert (out.how, out.values, out.layer) == ("scale", (0.0,), 0)  # type: ignore[attr-defined]  # of this kind
    assert any(href.startswith("/features") and "feature=1" in href for href in hrefs(shown))
    assert any("label=a" in href and href.startswith("/tokens") for href in hrefs(shown))


def test_a_latent_that_is_not_there_is_refused(full: Run, reading: Reading) -> None:
    with pytest.raises(InputError, match="no latent 99"):
        feature_view(full, reading, 99, ViewState())


@pytest.mark.parametrize(
    ("name", "site"),
    [("a;b", "blocks.0.hook_resid_post"), ("mine", "somewhere"), ("mine", "blocks.0.mlp.experts.hook_post")],
)
def test_no_edit_is_offered_where_none_can_be_read_back(name: str, site: str) -> None:
    assert latent_edit(Reading("", name, site, None, 4, None, True), 1, "add", 2.0) is None


def test_descriptions_stand_with_their_scores_and_nulls(full: Run, reading: Reading) -> None:
    described = str(uuid.UUID(int=5 << 90))
    full.store.connection.execute(
        """
        INSERT INTO descriptions BY NAME
        SELECT ?::UUID AS description_id, ?::UUID AS run_id, ?::UUID AS sae_id, 'latent' AS unit_kind, 7 AS unit,
            '<img src=x onerror=alert(1)>' AS text, 'me' AS describer, now()::TIMESTAMP AS created_at
        """,
        [described, full.run_id, reading.sae_id],
    )
    full.store.connection.execute(
        """
        INSERT INTO description_scores BY NAME
        SELECT ?::UUID AS description_id, 'detection' AS metric, 0.75 AS value, 0.6 AS ci_low, 0.9 AS ci_high, v AS null_value,
            k AS null_kind, 40 AS n, 'judge' AS scorer
        FROM (VALUES (0.5, 'chance'), (0.55, 'another latent')) AS nulls(v, k)
        """,
        [described],
    )
    [row] = FeatureFacts(full, reading, 7).descriptions()
    assert (row["text"], row["value"], row["chance"], row["another"]) == (
        "<img src=x onerror=alert(1)>",
        0.75,
        0.5,
        0.55,
    )
    found = page(latent_list(full, reading), text="onerror")
    assert [r["feature"] for r in found.rows] == [7]


def test_writers_are_told_with_nulls_and_what_taking_them_out_left(full: Run) -> None:
    owner = full.store.fetch(
        "SELECT s.name, e.feature FROM feature_experts e JOIN saes s USING (sae_id) WHERE e.metric = 'ablation_drop' LIMIT 1"
    )
    rows = full.store.fetch(
        """
        SELECT e.expert, e.value, e.null_value FROM feature_experts e JOIN saes s USING (sae_id)
        WHERE s.name = ? AND e.feature = ? AND e.metric = 'writes_excess' ORDER BY e.value DESC, e.expert
        """,
        list(owner[0]),
    )
    chosen = chosen_reading(sae_rows(full.store), full, ViewState(sae=owner[0][0]))
    assert chosen is not None
    facts = FeatureFacts(full, chosen, owner[0][1])
    told = [r for r in facts.experts() if r.get("writes_excess") is not None]
    assert [(r["writes_excess"], r["writes_excess_null"]) for r in told] == [(v, null) for _, v, null in rows]
    assert {r["metric"] for r in facts.ablation()} >= {"ablation_drop", "ablation_drop_control"}


def test_every_tab_shows_panels_where_there_is_something_and_a_command_where_not(
    opened: Store, full: Run, reading: Reading
) -> None:
    bare = records.plant(opened, records.Plan(lengths=[4]), name="bare")
    for name, _ in TABS:
        panels = [part for part in everything_in(tab(name, full, reading)) if getattr(part, "data-panel", None)]
        assert panels, name
        empty = tab(name, bare, reading)
        assert not [part for part in everything_in(empty) if getattr(part, "data-panel", None)]
        for each in PANELS[name]:
            assert filled_by(each, bare, reading) in text_of(empty), each.analysis


@pytest.mark.parametrize("shown", [each for name in PANELS for each in PANELS[name]], ids=lambda each: each.analysis)
def test_the_command_that_fills_a_panel_is_one_that_the_command_line_takes(
    full: Run, reading: Reading, shown: Shown, parsed: Callable[[str], dict[str, Any]]
) -> None:
    read = parsed(filled_by(shown, full, reading))
    assert read["store"] == full.store.path
    if "{sae}" in shown.verb:
        assert read["sae"] in ("planted sae", ["planted sae"])
    if "{model}" in shown.verb:
        assert read["model"] == "planted"
    if shown.analysis == "head_circuit":
        assert "run" not in read, "it records a run of its own"
    else:
        assert read.get("run", read.get("base")) == "full", "it is about the run shown"


def test_a_latent_is_described_by_a_command_that_the_command_line_takes(
    full: Run, reading: Reading, parsed: Callable[[str], dict[str, Any]]
) -> None:
    full.store.connection.execute("BEGIN")
    full.store.connection.execute("DELETE FROM descriptions")
    said = [part for part in everything_in(feature_view(full, reading, 3, ViewState())) if isinstance(part, str)]
    full.store.connection.execute("ROLLBACK")
    read = parsed(next(part for part in said if part.startswith("moescope sae describe")))
    assert (read["sae"], read["run"], read["unit"]) == ("planted sae", "full", [3])


def test_labels_and_rules_of_a_latent_are_those_of_its_analysis(full: Run, reading: Reading) -> None:
    facts = FeatureFacts(full, reading, 2)
    frame = analyze(full, "feature", sae=reading.name, feature=2).df()
    for part, name, mine in (
        ("label", "label", [(row["label"], row["lift"]) for row in facts.labels()]),
        ("score", "metric", [(row["metric"], row["value"]) for row in facts.rules()]),
    ):
        theirs = frame[frame["part"] == part]
        assert mine
        assert mine == list(zip(theirs[name], theirs["value"], strict=True))


def test_all_labels_of_a_latent_are_counted(tmp_path: Path) -> None:
    names = [f"label {number:02}" for number in range(70)]
    with Store(tmp_path / "runs.duckdb") as store:
        run = records.plant(store, records.Plan(**records.everything(layers=1, n_experts=4, labels=names)), name="many")
        found = chosen_reading(sae_rows(store), run, ViewState())
        assert found is not None
        assert {row["label"] for row in FeatureFacts(run, found, 1).labels()} == set(names)


def test_a_store_without_autoencoders_says_how_to_train_one(tmp_path: Path) -> None:
    with Store(tmp_path / "it's.duckdb") as store:
        run = records.plant(store, records.Plan(lengths=[4]))
        text = text_of(features.layout(run, ViewState(layer=Layer(1))))
        assert "moescope sae study planted" in text
        assert "it'\"'\"'s.duckdb" in text
