from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import plotly.utils
import pyarrow as pa
import pytest

from moescope.analysis_api import analyze
from moescope.core.analysis import analyses
from moescope.core.errors import InputError
from moescope.dashboard import shell
from moescope.dashboard.answers import Answers
from moescope.dashboard.records import routers
from moescope.dashboard.routing_page import body, way_tokens
from moescope.dashboard.routing_page.card_data import Range, size
from moescope.dashboard.routing_page.simulators import SIMULATORS, cards_of
from moescope.dashboard.routing_page.tabs import TABS
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.run import Run
from moescope.store.store import Store


def shown(store: Store, search: str = "") -> str:
    """The JSON of the page at an address."""
    return json.dumps(shell.frame(store, "/routing", search), cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)


def components(tree: Any) -> Iterator[Any]:
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from components(part)
    elif hasattr(tree, "_namespace"):
        yield tree
        yield from components(getattr(tree, "children", None))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """One store with a short run, `planted`, and one with documents enough to halve, `longer`."""
    planted = sys.modules["planted"]
    path = tmp_path_factory.mktemp("routing") / "runs.duckdb"
    plans = planted.Plan(), planted.Plan(name="longer", texts=planted.Plan().texts * 12)
    store = planted.planted_store(path, *plans)
    yield store
    store.close()


@pytest.fixture(scope="module")
def run(stores: Store) -> Run:
    return stores.run("planted")


@pytest.fixture(scope="module")
def longer(stores: Store) -> Run:
    return stores.run("longer")


def cards_at(run: Run, name: str, address: str = "", **more: Any) -> dict[str, Any]:
    kind = SIMULATORS[name]
    known = routers(run)
    ask = {"analysis": kind.analysis, "runs": [run.name], "given": {**kind.given(known), **more}}
    return dict(cards_of(Answers(run.store), run, decode(address), kind, ask))


@pytest.mark.parametrize("tab", [tab.name for tab in TABS if tab.needs is None])
def test_every_tab_reads_only_analyses_and_parameters_there_are(run: Run, tab: str) -> None:
    chosen = next(each for each in TABS if each.name == tab)
    fields = {control.name for control in chosen.controls}
    for panel in chosen.panels:
        known = set(analyses[panel.analysis].parameters)
        assert {*panel.controls, *panel.given} <= known
        sliders = {kind.parameter for kind in SIMULATORS.values()}
        assert set(panel.controls) <= fields | sliders
    tree = body.tab_body(run, ViewState(run=run.name), chosen, set())
    ids = [json.dumps(c.id) for c in components(tree) if getattr(c, "id", None) is not None]
    assert len(ids) == len(set(ids)), "no id twice"


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_a_choice_offers_only_what_its_analyses_take(tab: Any) -> None:
    for control in tab.controls:
        readers = [panel for panel in tab.panels if control.name in panel.controls]
        for panel in readers:
            parameter = analyses[panel.analysis].parameters[control.name]
            for value in control.options:
                assert parameter.parse(value) is not None
            if control.start != "":
                taken = body.starts(panel).get(control.name, parameter.default)
                assert parameter.parse(str(control.start)) == parameter.parse(str(taken)), (
                    panel.analysis,
                    control.name,
                )


def test_a_dense_run_gets_an_empty_state_with_the_command(store_of: Callable[..., Store], Plan: Any) -> None:
    page = shown(store_of(Plan(moe=False)))
    assert "No routers" in page
    assert "moescope profile demo" in page


@pytest.mark.parametrize(
    ("search", "words"),
    [("?tab=nothing", "there is no tab"), ("?tab=routers", "needs records"), ("?tab=%3Cb%3E", "<b>")],
)
def test_a_tab_that_cannot_be_had_is_refused(stores: Store, search: str, words: str) -> None:
    assert words in shown(stores, search).replace("There is no tab", "there is no tab").replace("The tab", "the tab")


def test_what_was_not_recorded_is_said_in_place_of_its_panel(run: Run) -> None:
    tab = next(tab for tab in TABS if tab.name == "certainty")
    tree = body.tab_body(run, ViewState(run=run.name), tab, set())
    said = json.dumps(tree, cls=plotly.utils.PlotlyJSONEncoder)
    assert "Not recorded" in said
    assert '"routing-router-information"' not in said
    assert '"routing-router-entropy"' in said


def test_an_imported_trace_has_the_page(stores: Store) -> None:
    rows = {"sequence_id": [0] * 6 + [1] * 6, "position": [*range(6)] * 2, "layer": [0] * 12}
    trace = pa.table(rows | {"experts": [[0, 1], [0, 2], [1, 3], [1, 0], [1, 2], [2, 3]] * 2})
    run = stores.import_trace(trace, name="traced", n_experts=4)
    page = shown(stores, "?run=traced&tab=cache")
    assert "routing-expert-cache" in page
    assert cards_at(run, "cache")["at"]["lru"]["2"][3]["detail"].endswith("size not recorded")


def test_a_panel_that_takes_long_is_asked_for_first(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "choices", lambda run: 50_000_000)
    tab = next(tab for tab in TABS if tab.name == "cache")
    state = ViewState(run=run.name)
    said = json.dumps(body.tab_body(run, state, tab, set()), cls=plotly.utils.PlotlyJSONEncoder)
    assert "Compute (about 20 s)" in said
    assert '"data-panel": "routing-expert-cache"' not in said
    assert '"data-panel": "routing-cache-budget"' in said, "what is quick comes by itself"
    again = json.dumps(body.tab_body(run, state, tab, {"expert_cache"}), cls=plotly.utils.PlotlyJSONEncoder)
    assert '"data-panel": "routing-expert-cache"' in again


def test_cache_cards_are_the_analysis_at_each_size(longer: Run) -> None:
    cards = cards_at(longer, "cache")
    assert set(cards["at"]) == {"lru", "lfu", "fifo", "lifo", "look_ahead", "belady"}
    for policy in ("lru", "belady"):
        frame = analyze(longer, "expert_cache", policy=policy).df()
        for row in frame[frame["layer"].isna()].to_dict("records"):
            first = cards["at"][policy][str(row["size"])][0]
            assert first["value"] == f"{100 * row['value']:.1f} %".replace("100.0", "100.0")
    lowest = cards["at"]["lru"]["2"][5]
    run, layer, expert = (f"{name}=" in lowest["href"] for name in ("run", "layer", "expert"))
    assert run
    assert layer
    assert expert


def test_bytes_follow_the_size_that_the_address_gives(longer: Run) -> None:
    moved = analyze(longer, "expert_cache", policy="lru").df()
    moved = moved[moved["layer"].isna() & (moved["size"] == 3)]["transfers"].iloc[0]
    card = cards_at(longer, "cache", "?expert_bytes=2000000")["at"]["lru"]["3"][3]
    assert card["value"] == size(moved * 2_000_000)
    assert "of 2 MB" in card["detail"]


def test_capacity_cards_are_the_analysis_at_each_factor(longer: Run) -> None:
    cards = cards_at(longer, "capacity", minimum=0)["at"][""]
    for factor in ("0.5", "1", "1.7"):
        frame = analyze(longer, "capacity", factor=float(factor), minimum=0).df()
        whole = frame[frame["layer"].isna()].set_index("metric")["value"]
        value = f"{100 * whole['dropped']:.1f} %" if whole["dropped"] else "0 %"
        assert cards[factor][0]["value"] == value
    worst = cards["0.5"][4]
    _, found = worst["detail"].rsplit(" ", 1)
    layer, expert = found[1:].split("·E")
    rows = longer.store.fetch(
        """
        SELECT expert
        FROM loads
        WHERE run_id = ? AND layer = ? AND expert >= 0
        GROUP BY expert
        ORDER BY sum(tokens) DESC, expert
        LIMIT 1
        """,
        [longer.run_id, int(layer)],
    )
    assert rows == [(int(expert),)]


@pytest.mark.parametrize("name", ["placement", "replication", "prefetch"])
def test_every_position_of_a_slider_has_its_cards(longer: Run, name: str) -> None:
    kind = SIMULATORS[name]
    span = kind.span(routers(longer))
    cards = cards_at(longer, name)
    position = span.least
    while position <= span.most:
        key = f"{2**position if span.power else position:g}"
        for choice in cards["at"].values():
            if name == "prefetch" and position < 2:
                continue  # a cache smaller than what is prefetched is not in the answer
            assert len(choice[key]) == kind.cards
            assert all("nan" not in card["value"] + card["detail"] for card in choice[key])
        position += span.step


def test_placement_cards_are_the_analysis_at_each_number_of_devices(longer: Run) -> None:
    cards = cards_at(longer, "placement", batch=16)
    frame = analyze(longer, "placement", devices=2, batch=16).df()
    rows = frame[frame["placement"] == "affinity"].set_index("metric")["value"]
    shown_cards = cards["at"]["affinity"]["2"]
    assert shown_cards[0]["value"] == f"{rows['busiest ÷ mean device']:.2f}×"
    assert shown_cards[3]["value"] == f"{rows['crossings a token']:.2f}"


def test_a_run_of_one_document_is_told_why_there_are_no_cards(store_of: Callable[..., Store], Plan: Any) -> None:
    run = store_of(Plan(texts=Plan().texts[:1])).run("planted")
    assert "documents" in cards_at(run, "prefetch")["problem"]


@pytest.mark.parametrize(
    ("text", "position"),
    [("", 2.0), ("8", 3.0), ("5", pytest.approx(2.32, abs=0.01)), ("x", 2.0), ("inf", 2.0), ("-3", 1)],
)
def test_a_slider_stands_where_the_address_says(text: str, position: float) -> None:
    assert Range(1, 4, 1, 4, (), power=True).position(text) == position


def test_tokens_of_a_way_are_those_whose_first_choices_took_it(longer: Run) -> None:
    first, second, expected = longer.store.fetch(
        """
        SELECT a.experts[1], b.experts[1], count(*) AS n
        FROM routing a
        JOIN routing b ON b.run_id = a.run_id AND b.token = a.token AND b.layer = 1
        WHERE a.run_id = ? AND a.layer = 0
        GROUP BY ALL
        ORDER BY n DESC
        LIMIT 1
        """,
        [longer.run_id],
    )[0]
    title, card = way_tokens.way_card(longer, f"0:{first}-1:{second}")
    said = json.dumps(card, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)
    assert title == f"L0·E{first} → L1·E{second}"
    assert f'"{expected:,}"' in said
    assert ("The first 40" in said) == (expected > 40)
    assert f"/tokens?run=longer&layer=1&expert={second}&sequence=" in said


@pytest.mark.parametrize("way", ["", "x", "0:9", "7:1", "0:1-", "0:1;DROP", "-".join(["0:1"] * 9)])
def test_what_is_no_way_is_refused(longer: Run, way: str) -> None:
    with pytest.raises(InputError):
        way_tokens.way_card(longer, way)


def test_the_commonest_paths_lead_to_their_tokens(longer: Run) -> None:
    result = analyze(longer, "paths", length=2)
    rows = way_tokens.path_table(result, longer).rowData
    assert len(rows) == len([row for row in result.table.to_pylist() if row["path"]])
    for row in rows[:3]:
        way = decode("?" + row["tokens_href"].split("?", 1)[1]).given("way")
        _, card = way_tokens.way_card(longer, way)
        assert f'"{row["tokens"]:,}"' in json.dumps(card, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)


def test_a_path_through_a_layer_of_two_routers_leads_to_the_routers_it_names(tmp_path: Path) -> None:
    """The analysis goes through `attn` before `mlp`; an address without a block means `mlp`."""
    planted = sys.modules["planted"]
    with planted.planted_store(tmp_path / "two.duckdb", planted.Plan()) as store:
        store.connection.execute("UPDATE layers SET block = 'attn', layer = 1 WHERE layer = 0")
        store.connection.execute("UPDATE routing SET block = 'attn', layer = 1 WHERE layer = 0")
        two = store.run("planted")
        result = analyze(two, "paths", length=2)
        row = way_tokens.path_table(result, two).rowData[0]
        way = decode("?" + row["tokens_href"].split("?", 1)[1]).given("way")
        assert [router.block for router, _ in way_tokens.read_way(two, way)] == ["attn", "mlp"]
        _, card = way_tokens.way_card(two, way)
        assert f'"{row["tokens"]:,}"' in json.dumps(card, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)


def test_a_count_of_a_way_is_no_link_to_more_tokens_than_it_counts(longer: Run) -> None:
    first, second = longer.store.fetch(
        """
        SELECT a.experts[1], b.experts[1]
        FROM routing a
        JOIN routing b ON b.run_id = a.run_id AND b.token = a.token AND b.layer = 1
        WHERE a.run_id = ? AND a.layer = 0
        LIMIT 1
        """,
        [longer.run_id],
    )[0]
    _, card = way_tokens.way_card(longer, f"0:{first}-1:{second}")
    anchors = [part for part in components(card) if "&piece=" in (getattr(part, "href", None) or "")]
    assert anchors
    assert {part.children for part in anchors} == {f"all of L1·E{second}"}
    said = json.dumps(card, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)
    assert "on this way or another" in said


def test_sliders_end_where_the_answers_of_real_experts_end(tmp_path: Path) -> None:
    """Six experts and two null ones: nobody holds, moves, copies or places a null expert."""
    planted = sys.modules["planted"]
    with planted.planted_store(tmp_path / "null.duckdb", planted.Plan(texts=planted.Plan().texts * 12)) as store:
        store.connection.execute("UPDATE layers SET n_experts = 6, n_null = 2")
        run = store.run("planted")
        known = routers(run)
        assert [(router.experts, router.real) for router in known] == [(8, 6)] * 2
        for name in ("cache", "placement", "replication"):
            span = SIMULATORS[name].span(known)
            cards = cards_at(run, name)
            positions = range(int(span.least), int(span.most) + 1)
            keys = [f"{2**position if span.power else position}" for position in positions]
            assert all(list(choice) == keys for choice in cards["at"].values()), name
        held = cards_at(run, "cache")["at"]["lru"]["6"][4]
        assert held["detail"] == "12 of 12 experts"
        assert cards_at(run, "cache")["words"]["6"] == "6 of 6 experts of a layer"
        assert cards_at(run, "replication")["at"][""]["3"][3]["detail"] == "6 copies beside 12 experts"


def test_time_waited_is_said_of_all_devices(longer: Run) -> None:
    waited = cards_at(longer, "placement")["at"]["contiguous"]["2"][2]
    assert (waited["label"], waited["detail"]) == (
        "Time waited",
        "of all devices' time, the busiest included, if work is all there is",
    )
