from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

import moescope as ms
from moescope.core.result import Result
from moescope.dashboard import panel, panel_tools
from moescope.dashboard.panel_table import MOST_ROWS, result_table
from moescope.dashboard.panel_text import literal, python_of, query_with_values


def components(tree: Any) -> Any:
    if isinstance(tree, (list, tuple)):
        for one in tree:
            yield from components(one)
    elif hasattr(tree, "_namespace"):
        yield tree
        yield from components(getattr(tree, "children", None))


def grid_of(tree: Any) -> Any:
    return next(c for c in components(tree) if type(c).__name__ == "AgGrid")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("load", {}),
        ("router_entropy", {"draws": 100, "seed": 3}),
        ("router_margin", {"by": "layer"}),
        ("passages", {"top": 2, "length": 2}),
    ],
)
def test_the_python_runs_and_gives_the_same_result(run: Any, tmp_path: Path, name: str, given: dict[str, Any]) -> None:
    known = {key: value for key, value in given.items() if key in ms_parameters(name)}
    shown = ms.analyze(run, name, **known)
    text = python_of(shown, run.store.path)
    run.store.close()
    names: dict[str, Any] = {}
    exec(compile(text, "copied", "exec"), names)
    assert names["result"].table.equals(shown.table)
    assert names["result"].title == shown.title


def ms_parameters(name: str) -> dict[str, Any]:
    from moescope.core.analysis import analyses

    return analyses[name].parameters


def test_the_python_names_only_what_differs_from_the_defaults(run: Any) -> None:
    plain = python_of(ms.analyze(run, "router_entropy"), run.store.path)
    assert 'ms.analyze(store.run("planted"), "router_entropy")'.replace('"', "'") in plain
    changed = python_of(ms.analyze(run, "router_entropy", seed=3), run.store.path)
    assert "seed=3" in changed
    assert "draws" not in changed


def test_the_python_of_an_incomplete_run_says_so_and_runs(store_of: Any, Plan: Any) -> None:
    store = store_of(Plan(status="incomplete", name='it\'s "odd"'))
    shown = ms.analyze(store.runs()[0], "load", allow_incomplete=True)
    text = python_of(shown, store.path)
    assert "allow_incomplete=True" in text
    store.close()
    exec(compile(text, "copied", "exec"), names := {})
    assert names["result"].incomplete


@pytest.mark.parametrize("name", ["load", "router_entropy", "nll", "passages"])
def test_the_query_with_its_values_gives_what_the_bound_one_gives(run: Any, name: str) -> None:
    result = ms.analyze(run, name, **({"length": 2} if name == "passages" else {}))
    assert result.sql is not None
    bound = run.store.fetch(result.sql, dict(result.sql_parameters))
    text = query_with_values(result.sql, result.sql_parameters)
    assert "$" not in text
    assert repr(sorted(run.store.fetch(text), key=repr)) == repr(sorted(bound, key=repr))


def test_values_in_a_query_are_quoted_and_texts_and_comments_left_alone(run: Any) -> None:
    hostile = "x'); DROP TABLE runs; --"
    text = query_with_values("SELECT $a AS a, '$a' AS b -- $a\n, $b AS c", {"a": hostile, "b": [1.5, None]})
    assert run.store.fetch(text) == [(hostile, "$a", [1.5, None])]
    assert literal(float("inf")) == "'inf'::DOUBLE"
    assert run.store.fetch(f"SELECT {literal(-1e-30)}, {literal(True)}, {literal(10**12)}")[0] == (-1e-30, True, 10**12)


def test_rows_lead_to_the_expert_the_label_and_the_tokens(run: Any) -> None:
    rows = grid_of(result_table("t", ms.analyze(run, "load"), run.store)).rowData
    row = next(r for r in rows if (r["layer"], r["expert"]) == (1, 2))
    assert row["expert_href"] == "/experts?run=planted&layer=1&expert=2"
    assert row["layer_href"] == "/experts?run=planted&layer=1"
    passages = grid_of(result_table("t", ms.analyze(run, "passages", length=2), run.store)).rowData
    assert passages[0]["sequence_id_href"] == f"/tokens?run=planted&sequence={passages[0]['sequence_id']}"
    assert all(row["label_href"].startswith("/tokens?run=planted&label=") for row in passages if row["label"])


def planted_result(table: pa.Table, run: Any, **more: Any) -> Result:
    return Result(
        title="x",
        table=table,
        definition="d",
        units={},
        n=1,
        n_unit="tokens",
        name="load",
        provenance=run.provenance,
        **more,
    )


def test_a_long_table_is_cut_and_says_so(run: Any) -> None:
    shown = result_table("t", planted_result(pa.table({"value": list(range(5000))}), run), run.store)
    assert len(grid_of(shown).rowData) == MOST_ROWS
    assert "first 2,000 of 5,000 rows" in str(shown)


def test_values_that_json_lacks_stay_apart_from_each_other(run: Any) -> None:
    table = pa.table(
        {"value": [float("nan"), float("inf"), -float("inf"), None, 0.0], "flag": [True, False, None, True, True]}
    )
    rows = grid_of(result_table("t", planted_result(table, run), run.store)).rowData
    assert [row["value"] for row in rows] == [None, "∞", "−∞", None, 0.0]
    assert [row["flag"] for row in rows] == ["yes", "no", None, "yes", "yes"]


def test_a_head_in_layer_0_has_a_link_and_no_expert_has_one_where_no_router_is(run: Any) -> None:
    table = pa.table({"layer": [0, 77], "head": [3, 3], "expert": [1, 1]})
    rows = grid_of(result_table("t", planted_result(table, run), run.store)).rowData
    assert rows[0]["head_href"] == "/phenomena?run=planted&layer=0&head=3"
    assert rows[1]["expert_href"] is None


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_files_hold_the_whole_table_and_are_named_after_analysis_and_run(run: Any, ending: str) -> None:
    result = ms.analyze(run, "load")
    sent = panel_tools.file_of(result, ending)
    assert sent["filename"] == f"load-planted.{ending}"
    content = io.BytesIO(base64.b64decode(sent["content"]))
    read = pd.read_csv(content) if ending == "csv" else pd.read_parquet(content)
    assert len(read) == result.table.num_rows
    assert read["value"].sum() == pytest.approx(result.df()["value"].sum())


def test_a_file_of_an_oddly_named_run_has_a_plain_name(store_of: Any, Plan: Any) -> None:
    store = store_of(Plan(name="../<b>x\u202e/\x00"))
    name = panel_tools.file_name(ms.analyze(store.runs()[0], "load"), "csv")
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz-.")
    assert not name.startswith(".")


def test_how_to_read_it_tells_all_facts(run: Any) -> None:
    result = ms.analyze(run, "router_entropy")
    text = str(panel_tools.detail("how", "x", result, run.store))
    for words in result.facts().values():
        assert words in text or repr(words)[1:-1] in text


def test_notes_and_incompleteness_stand_under_the_heading(store_of: Any, Plan: Any) -> None:
    store = store_of(Plan(status="incomplete"))
    result = ms.analyze(store.runs()[0], "load", allow_incomplete=True)
    assert "incomplete" in str(panel.heading(result))
    noted = Result(title="x", table=result.table, definition="", units={}, n=1, n_unit="", notes=("word " * 100,))
    assert "all under “How to read it”" in str(panel.heading(noted))


def test_a_result_without_a_figure_is_shown_as_its_table(run: Any) -> None:
    shown = panel.body("x", ms.analyze(run, "passages", length=2), store=run.store)
    assert grid_of(shown) is not None
    assert not any(type(c).__name__ == "Graph" for c in components(shown))


def test_graphs_never_offer_to_send_the_figure_away(run: Any) -> None:
    graph = next(
        c for c in components(panel.body("x", ms.analyze(run, "load"), store=run.store)) if type(c).__name__ == "Graph"
    )
    assert graph.config["plotlyServerURL"] == ""
    assert "sendDataToCloud" in graph.config["modeBarButtonsToRemove"]


def test_a_figure_carries_its_title_for_the_saved_picture(run: Any) -> None:
    result = ms.analyze(run, "load")
    graph = next(c for c in components(panel.body("x", result, store=run.store)) if type(c).__name__ == "Graph")
    assert graph.figure.layout.title.text is None
    assert graph.figure.layout.meta["title"]["text"].replace("<br>", " ") == result.title
    assert f"n = {result.n:,}" in graph.figure.layout.meta["title"]["subtitle"]["text"]
