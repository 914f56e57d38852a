from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.csv
import pyarrow.parquet
import pytest

from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard.sql.asking import Asking
from moescope.dashboard.sql.box import Limits, SqlBox
from moescope.dashboard.sql.examples import EXAMPLES, Example
from moescope.dashboard.sql.files import written
from moescope.dashboard.sql.given import PREFIX, read, values_for
from moescope.dashboard.sql.memory_bound import lifted
from moescope.dashboard.sql.one_select import one_select
from moescope.dashboard.work import Work
from moescope.store.store import Store

CROSS = "SELECT count(*) FROM range(100000000) a, range(100000000) b"
PASSWORD = "a variable that no query may see"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with one run, open for writing and locked, as the app has it."""
    planted = sys.modules["planted"]
    path = tmp_path_factory.mktemp("box") / "runs.duckdb"
    planted.planted_store(path, planted.Plan()).close()
    with Store(path, locked=True, memory="512MiB") as locked:
        yield locked


@pytest.fixture
def box(store: Store) -> SqlBox:
    return SqlBox(store, Limits(seconds=20.0, growth=400_000_000))


@pytest.fixture
def brief(store: Store) -> SqlBox:
    return SqlBox(store, Limits(seconds=0.3))


def rows(box: SqlBox, sql: str, **values: Any) -> list[tuple[Any, ...]]:
    return box.run(one_select(sql), values).rows


READING = {
    "plain": ("SELECT 1", [(1,)]),
    "its end marked": ("SELECT 1;", [(1,)]),
    "an end and a remark": ("SELECT 1; -- done", [(1,)]),
    "a remark at its end": ("SELECT 1 -- one", [(1,)]),
    "a semicolon in a text": ("SELECT ';' /* ; */ AS \"a;b\";", [(";",)]),
    "WITH": ("WITH a AS (SELECT 2 AS b) FROM a", [(2,)]),
    "VALUES": ("VALUES (3)", [(3,)]),
    "a recursive WITH": (
        "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t WHERE n < 4) SELECT max(n) FROM t",
        [(4,)],
    ),
    "a table function": ("SELECT * FROM range(2)", [(0,), (1,)]),
    "PIVOT with its values": ("PIVOT (SELECT 1 AS a, 2 AS b) ON a IN (1) USING sum(b)", [(2,)]),
    "order kept": ("SELECT range FROM range(50) ORDER BY hash(range) LIMIT 3", None),
    "settings": ("SELECT count(*) > 10 FROM duckdb_settings()", [(True,)]),
    "one name twice": ("SELECT 1 AS a, 2 AS a", [(1, 2)]),
}


@pytest.mark.parametrize("name", list(READING))
def test_what_only_reads_is_answered(box: SqlBox, name: str) -> None:
    sql, expected = READING[name]
    found = rows(box, sql)
    assert found == (expected if expected is not None else box.store.fetch(sql))


WRITING = [
    "INSERT INTO runs (name) VALUES ('x')",
    "UPDATE runs SET name = 'x'",
    "DELETE FROM runs",
    "MERGE INTO runs USING layers ON true WHEN MATCHED THEN DELETE",
    "CREATE TABLE x (a INTEGER)",
    "CREATE OR REPLACE VIEW runs_view AS SELECT 1",
    "CREATE TEMP MACRO f(a) AS a",
    "DROP TABLE runs",
    "ALTER TABLE runs ADD COLUMN x INTEGER",
    "TRUNCATE runs",
    "COPY runs TO 'out.csv'",
    "COPY (SELECT 1) TO 'out.csv'",
    "EXPORT DATABASE 'out'",
    "IMPORT DATABASE 'out'",
    "ATTACH ':memory:' AS other",
    "DETACH other",
    "USE other",
    "PRAGMA database_list",
    "PRAGMA memory_limit = '1GB'",
    "SET memory_limit = '1GB'",
    "RESET memory_limit",
    "CALL pragma_version()",
    "CHECKPOINT",
    "VACUUM",
    "INSTALL httpfs",
    "LOAD httpfs",
    "UPDATE EXTENSIONS",
    "BEGIN TRANSACTION",
    "COMMIT",
    "PREPARE p AS SELECT 1",
    "EXECUTE p",
    "EXPLAIN ANALYZE SELECT 1",
    "PIVOT runs ON name",
    "SELECT 1; DROP TABLE runs",
    "DROP TABLE runs; SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1 /* */; /* */ DELETE FROM runs --",
    "SELECT 1) ; DELETE FROM runs; SELECT * FROM (SELECT 1",
    "SELECT 1) UNION ALL (SELECT 2",
    "WITH x AS (INSERT INTO runs (name) VALUES ('x') RETURNING *) SELECT * FROM x",
    "WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE runs SET name = 'x' RETURNING *) SELECT * FROM x",
    "WITH x AS (COPY runs TO 'out.csv') SELECT * FROM x",
    "SELECT (WITH x AS (DELETE FROM runs RETURNING *) SELECT count(*) FROM x)",
    "SELECT * FROM query('SELECT 1')",
    "SELECT * FROM query_table('runs')",
    "SELECT * FROM json_execute_serialized_sql(json_serialize_sql('SELECT 1'))",
    "SELECT * FROM checkpoint()",
    "SELECT * FROM force_checkpoint()",
    "SELECT * FROM system.main.checkpoint()",
    'SELECT * FROM "CHECKPOINT"()',
    "SELECT 1 WHERE EXISTS (FROM checkpoint())",
    "SELECT * FROM range(1), LATERAL (SELECT * FROM truncate_duckdb_logs())",
    "SELECT * FROM enable_logging('QueryLog')",
    "SELECT * FROM disable_checkpoint_on_shutdown()",
    "SELECT * FROM create_external_resource('x')",
    "SELECT nextval('x')",
    "SELECT write_log('x')",
    "",
    "   ",
    "-- nothing",
    "SELECT",
    "SELECT '",
    "SELECT 1 /*",
    "SELECT \0 1",
    "\x1b[31mSELECT 1",
    "SELECT $Run",
    "SELECT ?",
    "SELECT $1",
]


@pytest.mark.parametrize("sql", WRITING)
def test_what_is_more_than_one_reading_query_is_refused(box: SqlBox, tmp_path: Path, sql: str) -> None:
    before = box.store.fetch("SELECT * FROM runs")
    files = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(InputError):
        rows(box, sql, Run=1)
    assert box.store.fetch("SELECT * FROM runs") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == files


REACHING = [
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM READ_PARQUET('{file}')",
    "SELECT * FROM read_json('{file}')",
    "SELECT * FROM '{file}'",
    'SELECT * FROM "{file}"',
    "SELECT (SELECT count(*) FROM '{file}')",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM parquet_metadata('{file}')",
    "SELECT * FROM read_csv('http://127.0.0.1:1/x.csv')",
    "SELECT * FROM 'https://example.com/x.parquet'",
    "SELECT * FROM read_duckdb('{file}', table_name = 'runs')",
    "SELECT * FROM sqlite_scan('{file}', 'x')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT getenv('HOME')",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM pandas_scan(1)",
    "SELECT * FROM PASSWORD",
    "SELECT PASSWORD",
    "SELECT * FROM box",
    "SELECT * FROM planted_rows",
]


@pytest.mark.parametrize("sql", REACHING)
def test_nothing_outside_the_store_is_reached(box: SqlBox, tmp_path: Path, sql: str) -> None:
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    with pytest.raises(InputError) as refused:
        rows(box, sql.format(file=file))
    assert PASSWORD not in str(refused.value)


@pytest.mark.parametrize("sql", REACHING[:8])
def test_files_stay_shut_when_the_parser_lets_a_function_through(
    box: SqlBox, tmp_path: Path, sql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moescope.dashboard.sql.one_select._check", lambda node: None)
    file = tmp_path / "secret.csv"
    file.write_text("a\n1\n")
    with pytest.raises(InputError, match=r"outside the store|disabled|does not exist"):
        rows(box, sql.format(file=file))


def test_writing_stays_shut_when_the_parser_lets_it_through(box: SqlBox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moescope.dashboard.sql.one_select._check", lambda node: None)
    with pytest.raises(InputError):
        rows(box, "WITH x AS (DELETE FROM tokens RETURNING *) SELECT * FROM x")
    assert box.store.fetch("SELECT count(*) FROM tokens") == [(21,)]


def test_a_store_without_its_locks_is_not_asked(store_of: Callable[..., Store], Plan: Any) -> None:
    with pytest.raises(InputError, match="without its locks"):
        rows(SqlBox(store_of(Plan())), "SELECT 1")


@pytest.mark.parametrize(
    "sql",
    [
        CROSS,
        "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t",
        "SELECT sum(hash(a.range, b.range)) FROM range(10000000) a, range(10000000) b",
    ],
)
def test_a_query_that_does_not_end_is_ended(brief: SqlBox, box: SqlBox, sql: str) -> None:
    with pytest.raises(InputError, match=r"longer than 0\.3 s"):
        rows(brief, sql)
    assert rows(box, "SELECT 1") == [(1,)], "the store goes on"


def test_a_query_that_heeds_nothing_is_left_behind(brief: SqlBox, box: SqlBox) -> None:
    deaf = "SELECT levenshtein(repeat('a', 30000), repeat('b', 30000) || range) FROM range(4)"
    with pytest.raises(InputError, match="does not heed being stopped"):
        rows(brief, deaf)
    assert rows(box, "SELECT 1") == [(1,)]
    while brief._running:
        time.sleep(0.05)


def test_a_query_can_be_cancelled_by_its_asker(box: SqlBox) -> None:
    patient = SqlBox(box.store, Limits(seconds=60))
    told: list[BaseException] = []

    def ask() -> None:
        try:
            patient.run(one_select(CROSS), {}, who="tab")
        except InputError as refused:
            told.append(refused)

    thread = threading.Thread(target=ask)
    thread.start()
    end = time.monotonic() + 20
    while not patient.cancel("tab") and time.monotonic() < end:
        time.sleep(0.02)
    thread.join(20)
    assert "cancelled" in str(told[0])
    assert patient.cancel("tab") is False


def test_a_new_query_takes_the_place_of_the_one_before(box: SqlBox) -> None:
    patient = SqlBox(box.store, Limits(seconds=60))
    failed = threading.Event()

    def ask() -> None:
        try:
            patient.run(one_select(CROSS), {}, who="tab")
        except InputError:
            failed.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not patient._running:
        time.sleep(0.01)
    assert patient.run(one_select("SELECT 1"), {}, who="tab").rows == [(1,)]
    thread.join(20)
    assert failed.is_set()


HUGE = [
    "SELECT repeat('x', 1000000000)",
    "SELECT length(repeat('x', 1000000000 + range::INTEGER)) FROM range(20)",
    "SELECT range(100000000)",
    "SELECT list(range) FROM range(100000000)",
    "SELECT lpad('x', 2000000000, 'y')",
    "SELECT list_transform(range(20000), lambda x: repeat('y', 20000)) FROM range(1000)",
    "WITH RECURSIVE t AS (SELECT 'x' AS s UNION ALL SELECT s || s FROM t) SELECT max(length(s)) FROM t",
]


@pytest.mark.parametrize("sql", HUGE)
def test_a_huge_result_is_refused_and_does_not_fill_the_memory(box: SqlBox, sql: str) -> None:
    import resource

    with pytest.raises(InputError, match="more memory"):
        rows(box, sql)
    assert rows(box, "SELECT 1") == [(1,)]
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] == resource.RLIM_INFINITY, "the bound is taken away again"


def test_only_the_first_rows_are_kept_and_the_rest_is_told(box: SqlBox) -> None:
    outcome = box.run(one_select("SELECT * FROM range(10001)"), {})
    assert len(outcome.rows) == box.limits.rows == 10_000
    assert outcome.more
    assert not box.run(one_select("SELECT * FROM range(10000)"), {}).more


def test_long_texts_are_cut_and_all_of_them_together_bounded(box: SqlBox) -> None:
    outcome = box.run(one_select("SELECT repeat('é', 100000) AS long, range FROM range(9000)"), {})
    assert outcome.rows[0][0] == "é" * 1000 + "…"
    assert outcome.more
    assert "4 MB" in outcome.why_cut
    assert sum(len(row[0]) for row in outcome.rows) <= 4_100_000


def test_every_type_comes_out_as_something_that_a_page_can_show(box: SqlBox) -> None:
    import json

    found = rows(
        box,
        """
        SELECT NULL, true, 1::UTINYINT, 9007199254740993, 170141183460469231731687303715884105727::HUGEINT, 1.25::DECIMAL(9, 2),
            'nan'::DOUBLE, '-inf'::FLOAT, 'a\u202eb', '\\x00a'::BLOB, uuid(), '{"a": 1}'::JSON, [1, 2], {'a': 1}, MAP {'a': 1},
            DATE '2026-01-02', TIMESTAMP '2026-01-02 03:04:05', INTERVAL 3 DAY, TIMESTAMPTZ '2026-01-02 03:04:05+00'
        """,
    )[0]
    json.dumps(found, allow_nan=False)
    assert found[:8] == (
        None,
        True,
        1,
        "9007199254740993",
        "170141183460469231731687303715884105727",
        1.25,
        "nan",
        "-inf",
    )
    assert found[12:15] == ("[1, 2]", "{'a': 1}", "{a=1}")


def test_an_error_names_the_line_of_the_users_own_text(box: SqlBox) -> None:
    with pytest.raises(InputError, match=r"LINE 2: +nam\n"):
        rows(box, "SELECT\n  nam\nFROM runs")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.title)
def test_every_example_runs_on_a_run(store: Store, example: Example) -> None:
    given = {name.removeprefix(PREFIX): text for name, text in example.view.items() if name.startswith(PREFIX)}
    ask = {"sql": example.sql, "given": given, "who": "t", "again": 0}
    outcome = Asking(store, SqlBox(store)).ask(ask, "planted")
    names = {column.name for column in outcome.columns}
    assert {example.view[axis] for axis in ("x", "y", "z") if axis in example.view} <= names
    not_there = "decision_outputs" in example.sql  # the planted run has no outputs of experts
    assert outcome.rows or not_there or "recorded" in example.title or "least" in example.sql


def test_the_example_of_loads_counts_what_the_loads_count(store: Store) -> None:
    outcome = Asking(store, SqlBox(store)).ask({"sql": EXAMPLES[1].sql, "given": {}, "who": "t"}, "planted")
    truth = store.fetch("SELECT layer, expert, sum(tokens) FROM loads GROUP BY layer, expert")
    assert {row[:3] for row in outcome.rows} == {(layer, expert, int(n)) for layer, expert, n in truth}


def test_parameters_are_bound_and_never_part_of_the_query(box: SqlBox) -> None:
    hostile = "x'; DROP TABLE runs; --"
    assert rows(box, "SELECT $text AS t", text=hostile) == [(hostile,)]


VALUES: list[tuple[str, Any]] = [
    ("3", 3),
    ("-0.5", -0.5),
    ("true", True),
    ("[1, 2]", [1, 2]),
    ("null", None),
    ("code", "code"),
    ('"3"', "3"),
    ("{", "{"),
    ('{"a": 1}', '{"a": 1}'),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_values_are_read_as_what_they_look_like(text: str, value: Any) -> None:
    assert read(text) == value


def test_a_parameter_without_a_value_is_asked_for() -> None:
    with pytest.raises(InputError, match=r"\$layer"):
        values_for(["layer"], {}, run_id=None)
    assert values_for(["run"], {}, run_id="r") == {"run": "r"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_file_holds_the_whole_result(box: SqlBox, kind: Any) -> None:
    query = one_select("SELECT range AS n, 'a,\"b' AS t, [range, 1] AS l, uuid() AS u, 1 AS n FROM range(30000)")
    with written(box, query, {}, kind, who="t") as file:
        table = pyarrow.csv.read_csv(file) if kind == "csv" else pyarrow.parquet.read_table(file)
    assert table.column_names == ["n", "t", "l", "u", "n_1"]
    assert table["n"].to_pylist() == list(range(30000))
    assert table["t"][0].as_py() == 'a,"b'
    assert table["l"][5].as_py() == ("[5, 1]" if kind == "csv" else [5, 1])


def test_a_result_too_large_for_a_file_is_refused_and_not_cut(box: SqlBox) -> None:
    with pytest.raises(InputError, match="at most 100 rows"):
        written(box, one_select("SELECT * FROM range(101)"), {}, "csv", who="t", most_rows=100)


def test_a_refusal_is_one_of_ours(box: SqlBox) -> None:
    for sql in ("SELECT error('planted')", "SELECT 1 // 0 + 'a'::INTEGER", "SELECT * FROM nowhere"):
        with pytest.raises(MoescopeError):
            rows(box, sql)


@pytest.mark.parametrize("sql", ["SELECT " + "+".join(["1"] * 900), "SELECT " + "[" * 400 + "1" + "]" * 400])
def test_a_query_nested_too_deeply_is_refused_in_words(sql: str) -> None:
    with pytest.raises(InputError, match="nested too deeply"):
        one_select(sql)


def test_a_tree_too_deep_to_be_compared_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    class Deep(dict[str, Any]):
        def __eq__(self, _other: object) -> bool:
            raise RecursionError

        __hash__ = None  # type: ignore[assignment]  # as every dict

    monkeypatch.setattr("moescope.dashboard.sql.one_select._tree", lambda _text: Deep())
    with pytest.raises(InputError, match="nested too deeply"):
        one_select("SELECT 1;")


def test_half_a_character_is_refused_in_words() -> None:
    with pytest.raises(InputError, match="half a character"):
        one_select("SELECT '\ud800'")


def test_a_thread_that_cannot_be_started_gives_its_place_back(box: SqlBox, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        for _ in range(box.limits.together + 1):
            with pytest.raises(InputError, match="could not be started"):
                rows(box, "SELECT 1")
    assert rows(box, "SELECT 1") == [(1,)]


def _bound() -> bool:
    import resource

    return resource.getrlimit(resource.RLIMIT_DATA)[0] != resource.RLIM_INFINITY


def test_the_bound_holds_a_query_that_heeds_nothing_until_it_ends(brief: SqlBox) -> None:
    ends = threading.Event()

    def deaf(_cursor: Any) -> bool:
        return ends.wait(20)

    with pytest.raises(InputError, match="does not heed being stopped"):
        brief.with_cursor(deaf, who="", seconds=0.1)
    assert _bound()
    ends.set()
    end = time.monotonic() + 10
    while _bound() and time.monotonic() < end:
        time.sleep(0.01)
    assert not _bound()


def test_the_bound_is_lifted_while_others_work_and_holds_again_afterwards(box: SqlBox) -> None:
    def work(_cursor: Any) -> list[bool]:
        seen = [_bound()]
        with lifted():
            seen.append(_bound())
            with lifted():
                seen.append(_bound())
            seen.append(_bound())
        return [*seen, _bound()]

    assert box.with_cursor(work, who="", seconds=5) == [True, False, False, False, True]
    with lifted():
        assert box.with_cursor(lambda _cursor: _bound(), who="", seconds=5) is False
    assert not _bound()


def test_work_is_not_bound_by_a_query_that_runs(box: SqlBox) -> None:
    def work(_cursor: Any) -> bool:
        seen: list[bool] = []
        job = Work().start("a", lambda _: seen.append(_bound()))
        while not job.over:
            time.sleep(0.005)
        return seen[0]

    assert box.with_cursor(work, who="", seconds=10) is False


@pytest.mark.parametrize("sql", ["SELECT {'a': INTERVAL 3 DAY} AS x", "SELECT union_value(a := 1) AS x"])
def test_what_a_parquet_file_cannot_hold_is_refused_in_words(box: SqlBox, sql: str) -> None:
    with pytest.raises(InputError, match="cannot be written in this form"):
        written(box, one_select(sql), {}, "parquet", who="t")
    with written(box, one_select(sql), {}, "csv", who="t") as file:
        assert file.read()


@pytest.mark.parametrize("failure", [RecursionError, TypeError, ValueError, OverflowError])
def test_values_that_cannot_be_handed_over_are_refused_in_words(box: SqlBox, failure: type[Exception]) -> None:
    def work(_cursor: Any) -> None:
        raise failure("planted")

    with pytest.raises(InputError, match="planted"):
        box.with_cursor(work, who="", seconds=5)
