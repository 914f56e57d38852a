from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dash
import plotly.utils
import pytest

from moescope.analysis_api import analyze
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.dashboard import expert_records, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.expert_card import expert_card, part
from moescope.dashboard.expert_compare import comparison, pinned
from moescope.dashboard.expert_findings import SECTIONS, edit_line
from moescope.dashboard.expert_table import MOST, check, ranked
from moescope.dashboard.pages.experts import card
from moescope.dashboard.records import Router, routers
from moescope.dashboard.url_state import decode
from moescope.store.store import Store

HOSTILE = "<script>window.ran=1</script>"


def as_json(tree: Any) -> str:
    return json.dumps(tree, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False)


def words(tree: Any) -> Iterator[str]:
    """Every text of a component tree, as it is read."""
    if isinstance(tree, (list, tuple)):
        for child in tree:
            yield from words(child)
    elif hasattr(tree, "_namespace"):
        for name in ("label", "children"):
            yield from words(getattr(tree, name, None))
    elif isinstance(tree, (str, int, float)):
        yield str(tree)


def links(tree: Any) -> Iterator[tuple[str, str]]:
    """Text and address of every link."""
    if isinstance(tree, (list, tuple)):
        for child in tree:
            yield from links(child)
    elif hasattr(tree, "_namespace"):
        if getattr(tree, "href", None):
            yield "".join(words(tree)), tree.href
        yield from links(getattr(tree, "children", None))


@pytest.fixture
def opened(store_of: Callable[..., Store], Plan: Any) -> Any:
    """A run of some length, its routers, and answers over its store."""
    store = store_of(Plan(texts=Plan().texts * 8))
    run = store.run("planted")
    return run, routers(run), Answers(store)


def ask(run: Any, layer: int, expert: int) -> dict[str, Any]:
    return {"run": run.name, "layer": str(layer), "expert": expert, "wait": False}


def test_load_and_output_are_those_of_the_tables(opened: Any) -> None:
    run, known, _ = opened
    text = " ".join(words(expert_card(run, known[1], known, 2)))
    mine, decisions = run.store.fetch("SELECT sum(tokens) FILTER (expert = 2), sum(tokens) FROM loads WHERE layer = 1")[
        0
    ]
    assert f"{numbers.count(mine)} of {numbers.count(decisions)}" in text
    assert numbers.share(mine, decisions) in text
    assert numbers.ratio(mine / decisions * 4) in text
    assert numbers.share(mine, decisions / 2) in text, "tokens that choose it"
    assert "2.500 in channel 3" in text


def test_label_shares_intervals_and_q_are_those_of_the_analysis(opened: Any) -> None:
    run, _, answers = opened
    shown = " ".join(words(part(run.store, answers, "labels", ask(run, 1, 1))))
    frame = analyze(run, "specialization").df()
    frame = frame[(frame["layer"] == 1) & (frame["expert"] == 1)]
    assert len(frame) == 2
    for row in frame.itertuples():
        assert f"{100 * row.value:.1f} % [{100 * row.ci_low:.1f}, {100 * row.ci_high:.1f}]" in shown
        assert numbers.ratio(row.lift) in shown
        assert f"{round(row.value * row.n):,}/{row.n:,}" in shown


def test_every_label_leads_to_its_tokens(opened: Any) -> None:
    run, _, answers = opened
    found = dict(links(part(run.store, answers, "labels", ask(run, 0, 1))))
    assert found["english"] == "/tokens?run=planted&layer=0&expert=1&label=english"


def test_top_tokens_count_what_sql_counts_and_lead_to_them(opened: Any) -> None:
    run, _, answers = opened
    shown = part(run.store, answers, "tokens", ask(run, 0, 0))
    token_id, n, total = run.store.fetch(
        """
        SELECT t.token_id, count(*) FILTER (list_contains(r.experts, 0)) AS n, count(*)
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.layer = 0
        GROUP BY t.token_id
        ORDER BY n DESC, t.token_id
        LIMIT 1
        """
    )[0]
    first = next(iter(links(shown)))
    assert first == (str(n), f"/tokens?run=planted&layer=0&expert=0&piece={token_id}")
    assert f"{numbers.share(n, total)} of {total}" in " ".join(words(shown))


def test_contexts_are_where_the_weight_is_largest_one_of_each_text(opened: Any) -> None:
    run, _, answers = opened
    shown = part(run.store, answers, "contexts", ask(run, 1, 0))
    at = [int(text) for text, _ in links(shown)]
    best = run.store.fetch(
        """
        SELECT r.token, r.weights[list_position(r.experts, 0)] AS weight, t.sequence_id
        FROM routing r
        JOIN tokens t USING (run_id, token)
        WHERE r.layer = 1 AND list_contains(r.experts, 0)
        ORDER BY weight DESC
        """
    )
    firsts: dict[int, int] = {}
    for token, _, sequence in best:
        firsts.setdefault(sequence, token)
    assert at == list(firsts.values())[:4]


def test_partners_and_paths_are_those_of_the_analyses(opened: Any) -> None:
    run, _, answers = opened
    shown = " ".join(words(part(run.store, answers, "partners", ask(run, 0, 0))))
    frame = analyze(run, "coactivation", layer=0).df()
    frame = frame[(frame["expert"] == 0) & (frame["together"] >= 30)]
    assert len(frame)
    for row in frame.itertuples():
        assert f"{row.together:,}/{row.n:,}" in shown
        assert numbers.ratio(row.over_chance) in shown
    both = {text for text, href in links(part(run.store, answers, "partners", ask(run, 0, 0))) if "&pins=" in href}
    assert both == {"both in the text"}, "the passage shows tokens of either expert: no count of those that choose both"
    frame = analyze(run, "transitions", layer=0).df()
    out = frame[frame["expert"] == 3]
    shown = " ".join(words(part(run.store, answers, "path", ask(run, 0, 3))))
    for row in out.itertuples():
        assert f"{round(row.value * row.n):,}/{row.n:,}" in shown
    back = frame[frame["to_expert"] == 3]
    pairs = (back["value"] * back["n"]).round().astype(int)
    shown = " ".join(words(part(run.store, answers, "path", ask(run, 1, 3))))
    assert f"{pairs.max():,}/{pairs.sum():,}" in shown


def test_ranks_are_those_of_importance(opened: Any) -> None:
    run, _, answers = opened
    shown = list(words(part(run.store, answers, "importance", ask(run, 0, 2))))
    frame = analyze(run, "importance").df()
    for row in frame[(frame["layer"] == 0) & (frame["expert"] == 2)].itertuples():
        place = shown.index(row.metric)
        assert shown[place + 1] == str(row.rank)


def test_what_was_not_recorded_or_measured_says_so_and_what_fills_it(opened: Any) -> None:
    run, _, answers = opened
    latents = " ".join(words(part(run.store, answers, "latents", ask(run, 0, 1))))
    assert latents.startswith("Not recorded for this run")
    assert "moescope sae experts" in latents
    cut = part(run.store, answers, "ablation", ask(run, 0, 1))
    assert "moescope intervene effect planted-model --edit 'ablate layer=0 experts=1' --store" in " ".join(words(cut))
    assert ("/work?run=planted&layer=0&expert=1") in [href for _, href in links(cut)]


def test_a_measured_ablation_is_shown_beside_its_controls(opened: Any) -> None:
    run, _, answers = opened
    edits = [{"kind": "ablate", "layer": 1, "experts": [2, 3]}]
    intervention = json.dumps({"format": 1, "name": None, "anatomy": None, "edits": edits})
    rows = [("target", None, 0.5, 0.25, 0.75), ("control", 0, 0.125, None, None), ("control", 1, 0.375, None, None)]
    for kind, draw, value, low, high in rows:
        run.store.connection.execute(
            "INSERT INTO effects (effect_id, base_run_id, intervention, kind, draw, group_kind, metric, value, ci_low, ci_high, n,"
            " unit) VALUES ('00000000-0000-0000-0000-000000000001', ?, ?, ?, ?, 'all', 'delta_nll', ?, ?, ?, 100, 'nats')",
            [run.run_id, intervention, kind, draw, value, low, high],
        )
    shown = " ".join(words(part(run.store, answers, "ablation", ask(run, 1, 3))))
    assert "0.500 [0.250, 0.750]" in shown
    assert "controls 0.250 [0.125, 0.375], 2 draws" in shown
    assert "Not measured" in " ".join(words(part(run.store, answers, "ablation", ask(run, 0, 3)))), "another layer's"


def test_a_large_run_waits_before_it_reads_everything(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, known, _ = opened
    assert '"wait": true' not in as_json(expert_card(run, known[0], known, 1))
    monkeypatch.setattr(expert_records, "LONG", 10)
    text = as_json(expert_card(run, known[0], known, 1))
    assert text.count('"wait": true') == 5
    assert "reads all 336 decisions" in text


def test_a_sample_of_a_long_run_is_called_one(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, answers = opened
    monkeypatch.setattr(expert_records, "SAMPLE", 21)
    shown = part(run.store, answers, "tokens", ask(run, 0, 0))
    assert "From the first 21 of 168 tokens." in " ".join(words(shown))
    assert all(text.startswith("≥ ") for text, _ in links(shown)), (
        "the link shows the whole run, the count a part of it"
    )
    counted = sum(int(text.removeprefix("≥ ")) for text, _ in links(shown))
    truth = run.store.fetch("SELECT count(*) FROM routing WHERE layer = 0 AND token < 21 AND list_contains(experts, 0)")
    assert counted == truth[0][0]


def test_a_shared_expert_has_a_card_of_its_own(opened: Any) -> None:
    run, _, _ = opened
    run.store.connection.execute("UPDATE layers SET n_shared = 1")
    run.store.connection.execute(
        "INSERT INTO experts SELECT run_id, layer, block, -1, 168, 168.0, 7.5, 7.5 * 168, 9.5, 1, 2, 0.5, 0.25 FROM experts"
        " WHERE expert = 0"
    )
    known = routers(run)
    opened_card = card(run, decode("?layer=1&expert=-1"))
    text = " ".join(words(opened_card[2]))
    assert "7.500" in text
    assert "a shared expert takes part in every one" in text
    assert "expert-lab" not in as_json(opened_card[2]), "no edit takes a shared expert out"
    assert " ".join(words(opened_card[1])) == "L1·S1"
    assert expert_card(run, known[1], known, -1)


@pytest.mark.parametrize("name", [*SECTIONS, "tokens", "contexts"])
def test_every_part_of_an_expert_that_nobody_chose_says_so(store_of: Any, Plan: Any, name: str) -> None:
    store = store_of(Plan())
    store.connection.execute("UPDATE routing SET experts = [0, 1] WHERE list_contains(experts, 3)")
    store.connection.execute("UPDATE loads SET tokens = 0, weight_sum = 0 WHERE expert = 3")
    run = store.run("planted")
    shown = part(store, Answers(store), name, ask(run, 0, 3))
    assert any(words(shown))


def test_labels_and_names_are_only_text(store_of: Any, Plan: Any, Text: Any) -> None:
    texts = [Text(HOSTILE, [b"<bos>", HOSTILE.encode()] * 10), Text("b", [b"<bos>", b"x"] * 10)] * 2
    store = store_of(Plan(name=HOSTILE, texts=texts))
    run = store.run(HOSTILE)
    known = routers(run)
    text = as_json([expert_card(run, known[0], known, 0), part(store, Answers(store), "labels", ask(run, 0, 0))])
    assert "dangerously_allow_html" not in text
    assert HOSTILE in text


def test_the_view_decides_between_panel_and_full_card(opened: Any) -> None:
    run, _, _ = opened
    drawer, _, beside, full, _, main, selected = card(run, decode("?layer=1&expert=2"))
    assert (drawer, full, main) == (True, dash.no_update, {})
    assert "Share of decisions" in " ".join(words(beside))
    assert selected == {"ids": ["1:2"]}
    drawer, _, beside, full, shown, main, _ = card(run, decode("?layer=1&expert=2&view=card"))
    assert (drawer, beside, shown) == (False, dash.no_update, {})
    assert main["visibility"] == "hidden"
    assert "L1·E2" in " ".join(words(full))
    assert card(run, decode("?view=card"))[0] is False, "no expert, no card"


def test_pins_are_read_from_the_address_and_compared(opened: Any) -> None:
    run, known, answers = opened
    found = pinned(run, decode("?pinned=0:1,1:2&pins=1.3&layer=0"), known)
    assert [(router.layer, expert) for router, expert in found] == [(0, 1), (1, 2), (0, 3)]
    shown = list(words(comparison(answers, run, "?pinned=0:1,1:2", known)))
    assert {"L0·E1", "L1·E2"} <= set(shown)
    mine = run.store.fetch("SELECT sum(tokens) FROM loads WHERE layer = 1 AND expert = 2")[0][0]
    assert f"{mine}/168" in shown
    assert not list(words(comparison(answers, run, "", known)))


@pytest.mark.parametrize("search", ["?pinned=x", "?pinned=0:99", "?pinned=9:0", "?pinned=0:1;DROP"])
def test_a_pin_that_is_no_expert_is_refused(opened: Any, search: str) -> None:
    run, known, _ = opened
    with pytest.raises(InputError):
        pinned(run, decode(search), known)


def test_the_table_ranks_by_the_measure_and_filters_by_layer(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run, known, answers = opened
    columns, rows, said = ranked(answers, run, known, "?measure=weight&only=1")
    assert columns[1]["headerName"] == "Mean weight"
    values = [row["value"] for row in rows]
    assert values == sorted(values, reverse=True)
    assert {row["layer"] for row in rows} == {1}
    assert said == "4 experts"
    _, rows, _ = ranked(answers, run, known, "?rank=low")
    assert [row["share_pct"] for row in rows] == sorted(row["share_pct"] for row in rows)
    assert MOST == 1000
    monkeypatch.setattr("moescope.dashboard.expert_table.MOST", 3)
    _, rows, said = ranked(answers, run, known, "")
    assert len(rows) == 3
    assert "highest of 8" in said
    with pytest.raises(InputError, match="no measure"):
        check("?measure=beauty")


def test_the_edit_of_an_expert_can_be_read_back() -> None:
    edit = read_edit(edit_line(Router(3, "attn", 8, 2), 5))
    assert (edit.layers, edit.block, edit.ids) == ((3,), "attn", (5,))


def test_latents_lead_to_the_autoencoder_they_are_of(opened: Any) -> None:
    """The page of features starts with the newest autoencoder, which need not be one that was measured against experts."""
    run, _, answers = opened
    path = Path(__file__).parents[1] / "routing" / "planted_feature_experts.py"
    spec = importlib.util.spec_from_file_location("planted_feature_experts_of_cards", path)
    assert spec is not None
    assert spec.loader is not None
    pairs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pairs)
    pairs.plant_feature_experts(run, layer=1, n_experts=4)
    found = [href for text, href in links(part(run.store, answers, "latents", ask(run, 1, 1))) if text.startswith("F")]
    assert found
    for href in found:
        assert decode("?" + href.split("?", 1)[1]).sae == "planted writers"
