"""Stores and runs: names of any spelling, refusals that name what there is, queries limited to a run."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moescope.core.errors import InputError, StoreError
from moescope.store.run import Run
from moescope.store.store import Store

NAMES = (
    "base", "Robert'); DROP TABLE runs;--", 'dou"ble', "🧪 ﷽ 日本語", "line one\nline two\r\n", "\ttab", "$run ? %s {x}", "a" * 5000,
    "<script>alert(1)</script>", "[bold]rich[/bold]", "\u202egnp.exe", "trailing ", "NULL", "nan", "0", "-1",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_run_of_any_name_is_found_again_under_it(store: Store, name: str) -> None:
    store.begin_run(name="another")
    run = store.begin_run(name=name)
    assert store.run(name).run_id == run.run_id
    assert store.run(name).info["name"] == name
    assert [r.name for r in store.runs()] == ["another", name]


@pytest.mark.parametrize("name", NAMES)
def test_taken_name_is_refused_and_leaves_one_run(store: Store, name: str) -> None:
    store.begin_run(name=name)
    with pytest.raises(InputError, match="already has a run called"):
        store.begin_run(name=name)
    assert len(store.runs()) == 1


def test_taken_name_is_refused_with_its_state_and_age(store: Store) -> None:
    store.begin_run(name="base")
    with pytest.raises(InputError, match=rf"running, begun {datetime.now(UTC):%Y-%m-%d}"):
        store.begin_run(name="base")


@pytest.mark.parametrize("name", ["", " ", "\n\t"])
def test_name_without_a_character_to_see_is_refused(store: Store, name: str) -> None:
    with pytest.raises(InputError, match="needs a name"):
        store.begin_run(name=name)
    assert store.runs() == []


@pytest.mark.parametrize("name", ["a\udcff", "\ud800"])
def test_name_that_is_no_unicode_is_refused_not_crashed_on(store: Store, name: str) -> None:
    with pytest.raises(InputError):
        store.begin_run(name=name)


def test_unknown_run_is_refused_with_the_runs_there_are(store: Store) -> None:
    with pytest.raises(InputError, match=r"no run called 'basis'.*none yet"):
        store.run("basis")
    store.begin_run(name="base")
    store.begin_run(name="cut")
    with pytest.raises(InputError, match=r"no run called 'basis'.*base, cut"):
        store.run("basis")


def test_run_is_found_by_its_id_too(store: Store, run: Run) -> None:
    assert store.run(run.run_id).name == "base"
    uuid.UUID(run.run_id)


def test_runs_come_oldest_first(store: Store) -> None:
    start = datetime(2026, 1, 1)
    for name, day in (("third", 3), ("first", 1), ("second", 2)):
        store.begin_run(name=name, started_at=start + timedelta(days=day))
    assert [run.name for run in store.runs()] == ["first", "second", "third"]


def test_what_a_run_was_begun_with_comes_back(store: Store) -> None:
    settings = {"probes": ["tokens"], "text": "ünï '\"\n🧪", "nested": {"a": [1, None, True]}}
    run = store.begin_run(
        name="base", model="m", seed=-5, settings=settings, versions={"torch": "2"}, anatomy={"n_layers": 2}
    )
    info = run.info
    assert info["settings"] == settings
    assert (info["model"], info["seed"], info["status"], info["versions"]) == ("m", -5, "running", {"torch": "2"})
    assert info["finished_at"] is None
    assert abs(info["started_at"] - datetime.now(UTC).replace(tzinfo=None)) < timedelta(minutes=1)
    assert run.provenance["run"] == "base"
    assert run.provenance["versions"] == {"torch": "2"}


def test_layers_come_back_as_they_were_entered(store: Store, run: Run) -> None:
    rows = [
        {
            "layer": 0,
            "block": "mlp",
            "kind": "moe",
            "n_experts": 8,
            "top_k": 2,
            "routing_rule": json.dumps({"score": "softmax"}),
        },
        {"layer": 1, "block": "attn.1", "kind": "attention"},
    ]
    store.add_layers(run, rows)
    found = run.table("layers").order("layer").df()
    assert found["block"].tolist() == ["mlp", "attn.1"]
    assert found["n_experts"].iloc[0] == 8
    assert found["top_k"].isna().tolist() == [False, True]


def _token(run: Run, token: int) -> None:
    run.store.connection.execute(
        "INSERT INTO tokens (run_id, token, sequence_id) VALUES (?, ?, 0)", [run.run_id, token]
    )


def test_table_and_rows_are_limited_to_the_run(store: Store, run: Run) -> None:
    other = store.begin_run(name="other")
    for token in range(3):
        _token(run, token)
    _token(other, 99)
    assert sorted(token for (token,) in run.table("tokens").select("token").fetchall()) == [0, 1, 2]
    assert "run_id" not in run.table("tokens").columns
    assert (run.rows("tokens"), other.rows("tokens"), other.rows("routing")) == (3, 1, 0)


def test_query_of_a_run_knows_its_id(store: Store, run: Run) -> None:
    store.begin_run(name="other")
    query = "SELECT name, $more FROM runs WHERE run_id = $run"
    assert run.sql(query, {"more": "'; DROP TABLE runs; --"}).fetchall() == [("base", "'; DROP TABLE runs; --")]


@pytest.mark.parametrize(
    "name", ["nope", "", "tokens; DROP TABLE runs", 'tokens" --', "store_info", "effect_sequences", "Tokens"]
)
def test_unknown_table_is_refused_with_the_known_ones(run: Run, name: str) -> None:
    for ask in (run.table, run.rows):
        with pytest.raises(InputError, match=r"there is no table.*runs, .*routing"):
            ask(name)


@pytest.mark.parametrize(
    "query", ["SELEC 1", "SELECT * FROM nowhere", "SELECT nope FROM runs", "SELECT $missing", "SELECT 1 +"]
)
def test_query_that_is_wrong_is_bad_input(store: Store, query: str) -> None:
    with pytest.raises(InputError, match="the query failed"):
        store.sql(query)
    with pytest.raises(InputError, match="the query failed"):
        store.fetch(query)


def test_query_that_fails_on_the_way_is_bad_input(store: Store, run: Run) -> None:
    with pytest.raises(InputError, match="the query failed"):
        store.fetch("SELECT CAST(name AS INTEGER) FROM runs")


def test_failed_query_leaves_the_store_usable(store: Store, run: Run) -> None:
    with pytest.raises(InputError):
        store.sql("SELEC 1")
    assert store.sql("SELECT 1 AS one").fetchall() == [(1,)]


def test_relation_gives_pandas_arrow_and_polars(store: Store) -> None:
    relation = store.sql("SELECT 7 AS seven")
    assert relation.df()["seven"].tolist() == [7]
    assert relation.to_arrow_table()["seven"].to_pylist() == [7]
    assert relation.pl()["seven"].to_list() == [7]


def test_closed_store_says_so_and_closes_twice(path: Path) -> None:
    store = Store(path)
    run = store.begin_run(name="base")
    store.close()
    store.close()
    asks = [store.runs, store.cursor, lambda: store.sql("SELECT 1"), lambda: store.run("base"), lambda: run.status]
    for ask in asks:
        with pytest.raises(StoreError, match=r"is closed.*open it again"):
            ask()
    assert "closed" in repr(store)
    assert "closed" in store._repr_html_()


def test_store_is_closed_after_with_even_on_error(path: Path) -> None:
    def fail() -> None:
        with Store(path) as store:
            raise ZeroDivisionError(repr(store))

    with pytest.raises(ZeroDivisionError):
        fail()
    Store(path, read_only=True).close()


@pytest.mark.parametrize("change", ["begin", "sql"])
def test_store_open_for_reading_refuses_changes(path: Path, change: str) -> None:
    Store(path).close()
    with Store(path, read_only=True) as store:
        with pytest.raises(InputError, match="read"):
            store.begin_run(name="x") if change == "begin" else store.sql("INSERT INTO store_info VALUES ('a', 'b')")
        assert store.runs() == []


def test_run_that_was_deleted_says_so(store: Store, run: Run) -> None:
    store.connection.execute("DELETE FROM runs WHERE run_id = ?", [run.run_id])
    with pytest.raises(InputError, match="'base' is no longer in"):
        _ = run.info


def test_repr_lists_runs_and_states(store: Store, run: Run) -> None:
    assert "base (running)" in repr(store)
    assert repr(run) == "Run('base', running, demo)"


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>'])
def test_notebook_views_show_hostile_names_as_text(store: Store, name: str) -> None:
    run = store.begin_run(name=name, model=name, architecture=name, revision=name, settings={"x": name})
    for view in (store._repr_html_(), run._repr_html_()):
        assert "<script" not in view
        assert "<img" not in view
        assert "&lt;" in view
