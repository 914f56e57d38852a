from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.dashboard.app import create_app
from moescope.dashboard.pages.sql import example_link, layout
from moescope.dashboard.sql.box import SqlBox
from moescope.dashboard.sql.chart import Choice, chart_of, completed
from moescope.dashboard.sql.examples import EXAMPLES
from moescope.dashboard.sql.one_select import one_select
from moescope.dashboard.sql.outcome import Outcome
from moescope.dashboard.sql.result_view import found, table
from moescope.dashboard.sql.tables import rows_of, schema_of
from moescope.dashboard.url_state import ViewState, decode
from moescope.store.schema import TABLES
from moescope.store.store import Store
from moescope.store.views import VIEWS

OWN = {"Host": "127.0.0.1:8050", "Origin": "http://127.0.0.1:8050"}


@pytest.fixture
def locked(store_of: Callable[..., Store], Plan: Any) -> Iterator[Store]:
    store = store_of(Plan())
    store.close()
    with Store(store.path, locked=True) as again:
        yield again


@pytest.fixture
def ask(locked: Store) -> Callable[[str], Outcome]:
    box = SqlBox(locked)
    return lambda sql: box.run(one_select(sql), {})


def test_the_page_stands_without_a_run() -> None:
    assert "sql-text" in str(layout(None, ViewState()))


def test_an_example_is_a_link_that_shows_it() -> None:
    class Named:
        name = "base"

    for example in EXAMPLES:
        state = decode(example_link(example, Named()).removeprefix("/sql"))  # type: ignore[arg-type]  # only its name is read
        assert state.run == "base"
        assert state.given("sql") == example.sql
        assert {name: state.given(name) for name in example.view} == dict(example.view)


def test_the_schema_names_every_table_with_its_meaning(locked: Store) -> None:
    shown = {entry["name"]: entry for group in schema_of(locked) for entry in group["tables"]}
    for entry in (*TABLES, *VIEWS):
        assert shown[entry.name]["meaning"] == entry.comment
        assert [(c[0], c[2]) for c in shown[entry.name]["columns"]] == [(c.name, c.comment) for c in entry.columns]


def test_tables_of_ones_own_are_in_the_schema_too(store_of: Callable[..., Store]) -> None:
    store = store_of()
    store.connection.execute('CREATE TABLE "<b>mine" ("</script>" INTEGER)')
    own = next(group for group in schema_of(store) if group["title"] == "Your own")
    assert own["tables"][0] == {"name": "<b>mine", "meaning": "", "columns": [["</script>", "INTEGER", ""]]}


def test_counts_are_rows_of_the_run(locked: Store) -> None:
    run = locked.run("planted")
    counts = rows_of(run)
    assert counts["tokens"] == run.rows("tokens") == 21
    assert counts["effects"] == 0
    assert "effect_sequences" not in counts


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("SELECT 1 AS a", "1 row"),
        ("SELECT 1 AS a WHERE false", "No rows"),
        ("SELECT * FROM range(1000)", "1,000 rows"),
        ("SELECT * FROM range(1001)", "The first 1,000 of 1,001 rows"),
        ("SELECT * FROM range(20000)", "The first 1,000 of more than 10,000 rows"),
    ],
)
def test_what_was_found_is_said_in_words(ask: Callable[[str], Outcome], sql: str, words: str) -> None:
    assert f"'{words}'" in str(found(ask(sql)))


def test_the_grid_holds_the_first_thousand_rows(locked: Store, ask: Callable[[str], Outcome]) -> None:
    grid = table(ask("SELECT range AS n FROM range(3000)"), locked, run="planted")
    assert [row["c0"] for row in grid.rowData] == list(range(1000))


def test_columns_that_name_things_lead_to_them(locked: Store, ask: Callable[[str], Outcome]) -> None:
    outcome = ask("SELECT run_id, layer, block, expert, tokens, share FROM expert_load")
    grid = table(outcome, locked, run="planted")
    linked = {column["headerName"] for column in grid.columnDefs if column.get("cellRenderer") == "SqlLink"}
    assert linked == {"run_id", "layer", "expert", "tokens"}
    links = grid.columnDefs[0]["cellRendererParams"]["links"]
    assert links["roles"] == {"run_id": "c0", "layer": "c1", "block": "c2", "expert": "c3"}
    assert links["runs"] == {locked.run("planted").run_id: "planted"}


def test_a_chart_chooses_columns_that_fit(ask: Callable[[str], Outcome]) -> None:
    outcome = ask("SELECT layer, expert, share FROM expert_load")
    assert completed(outcome, Choice("heat")) == ("layer", "expert", "share")
    assert completed(outcome, Choice("bar")) == ("layer", "share", "")
    assert completed(outcome, Choice("bar", x="share", y="layer")) == ("share", "layer", "")


@pytest.mark.parametrize("kind", ["bar", "line", "scatter", "heat"])
def test_every_kind_of_chart_holds_the_rows(ask: Callable[[str], Outcome], kind: Any) -> None:
    outcome = ask("SELECT layer, expert, share FROM expert_load ORDER BY share")
    figure = chart_of(
        outcome,
        Choice(kind, x="expert", y="layer" if kind == "heat" else "share", z="share" if kind == "heat" else ""),
        sql="",
    ).figure()
    truth = {(row[1], row[0]): row[2] for row in outcome.rows}
    if kind == "heat":
        drawn = {
            (int(x), int(y)): figure.data[0].z[j][i]
            for i, x in enumerate(figure.data[0].x)
            for j, y in enumerate(figure.data[0].y)
        }
        assert drawn == truth
    else:
        assert sorted(zip(figure.data[0].x, figure.data[0].y, strict=True)) == sorted(
            (e, v) for (e, _), v in truth.items()
        )


def test_a_chart_colours_at_most_seven_and_says_how_many_others(ask: Callable[[str], Outcome]) -> None:
    outcome = ask("SELECT range AS n, 'g' || (range % 12) AS g, range * 2 AS v FROM range(240)")
    figure = chart_of(outcome, Choice("bar", x="n", y="v", z="g"), sql="").figure()
    assert len(figure.data) == 7
    assert figure.data[-1].name == "6 others"
    assert sum(len(trace.x) for trace in figure.data) == 240


def test_hostile_names_are_letters_in_a_chart(ask: Callable[[str], Outcome]) -> None:
    outcome = ask("""SELECT '<img src=x onerror=alert(1)>' AS "<b>x", 1 AS "<i>y", '</script>' AS z""")
    figure = chart_of(outcome, Choice("bar", x="<b>x", y="<i>y", z="z"), sql="").figure().to_json()
    assert "<img" not in figure
    assert "<i>" not in figure


@pytest.mark.parametrize(
    ("sql", "choice", "said"),
    [
        ("SELECT 1 AS a WHERE false", Choice("bar"), "no rows"),
        ("SELECT 1 AS a", Choice("bar", x="b"), "no column 'b'"),
        ("SELECT 'x' AS a, 'y' AS b", Choice("bar", x="a", y="b"), "no numbers"),
        ("SELECT 1 AS a, 2 AS b, 3 AS c UNION ALL SELECT 1, 2, 4", Choice("heat"), "twice"),
        ("SELECT range AS a, range AS b, range AS c FROM range(1000)", Choice("heat"), "too many"),
    ],
)
def test_what_cannot_be_drawn_is_said(ask: Callable[[str], Outcome], sql: str, choice: Choice, said: str) -> None:
    with pytest.raises(InputError, match=said):
        chart_of(ask(sql), choice, sql=sql).figure()


def test_a_file_is_fetched_by_a_post_of_the_own_page(locked: Store) -> None:
    client = create_app(locked).server.test_client()
    asked = {
        "ask": {"sql": "SELECT count(*) AS n FROM tokens WHERE run_id = $run", "given": {}, "who": "t"},
        "run": "planted",
    }
    answer = client.post("/sql/file", json={**asked, "kind": "csv"}, headers=OWN)
    assert answer.get_data(as_text=True).split() == ['"n"', "21"]
    assert "query.csv" in answer.headers["Content-Disposition"]
    assert (
        client.post(
            "/sql/file", json={**asked, "kind": "csv"}, headers={**OWN, "Origin": "http://evil.example"}
        ).status_code
        == 403
    )
    assert (
        client.get("/sql/file", headers=OWN).status_code != 200
        or b"n" not in client.get("/sql/file", headers=OWN).data[:3]
    )


NONSENSE: list[Any] = [
    None,
    [],
    {},
    {"kind": "exe", "ask": {}},
    {"kind": "csv", "ask": 3},
    {"kind": "csv", "ask": {"sql": "DROP TABLE runs", "who": ""}},
    {"kind": "csv", "ask": {"who": ""}},
    {"kind": "csv", "ask": {"sql": 3}},
    {"kind": "csv", "ask": {"sql": "SELECT 1", "given": ["a"]}},
    {"kind": "csv", "ask": {"sql": "SELECT 1", "given": "a"}},
    {"kind": "csv", "ask": {"sql": "SELECT '\ud800'"}},
    {"kind": "csv", "ask": {"sql": "SELECT $a", "given": {"a": "\ud800"}}},
    {"kind": "parquet", "ask": {"sql": "SELECT $a AS x", "given": {"a": "[" * 500 + "1" + "]" * 500}}},
    {"kind": "csv", "ask": {"sql": "SELECT $run"}, "run": "\ud800"},
    {"kind": "csv", "ask": {"sql": "SELECT $run"}, "run": ["planted"]},
]


@pytest.mark.parametrize("body", NONSENSE)
def test_a_file_of_nonsense_is_refused_in_words(locked: Store, body: Any) -> None:
    answer = create_app(locked).server.test_client().post("/sql/file", json=body, headers=OWN)
    assert answer.status_code == 400
    assert answer.get_json()["problem"]
