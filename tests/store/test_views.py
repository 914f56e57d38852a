"""The views: what they give against loops written for reading, in any client, and without reading more than asked."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.schema import TABLES
from moescope.store.store import Store
from moescope.store.views import VIEWS

PAGE = Path(__file__).parents[2] / "docs" / "store.md"
LABELS = ["english", "", None, "quo'te"]
EXPERTS = 5


def _plant(store: Store, name: str, seed: int) -> dict[str, Any]:
    """A run of four documents in six sequences; gives what was planted, as plain Python."""
    random = np.random.default_rng(seed)
    run = store.begin_run(name=name, model="demo", summary={"tokens": 1, "seconds": 2.5, "stopped": None})
    insert = store.connection.execute
    planted: dict[str, Any] = {"run": run, "tokens": [], "routing": [], "norms": {}, "logits": [], "sequences": []}
    pieces = dict(enumerate(["The", " cat", "\ufffd", "", "\n🧪"]))
    for token_id, text in pieces.items():
        insert("INSERT INTO vocabulary VALUES (?, ?, ?, ?)", [run.run_id, token_id, text.encode(), text])
    for sequence, document in enumerate([0, 0, 1, 2, 2, 3]):
        size = int(random.integers(2, 5))
        row = [sequence, document, 0, LABELS[document], "s", "text", size, "h", None]
        planted["sequences"].append(row)
        insert("INSERT INTO sequences VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", [run.run_id, *row])
        for position in range(size):
            token = len(planted["tokens"])
            row = [token, sequence, position, int(random.integers(0, 6)), "prefill", None, int(random.integers(0, 6))]
            planted["tokens"].append(row)
            insert("INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?, ?, false, 'word')", [run.run_id, *row])
            for layer in range(2):
                _decide(run, planted, random, token, layer, LABELS[document])
    return planted


def _decide(
    run: Run, planted: dict[str, Any], random: np.random.Generator, token: int, layer: int, label: str | None
) -> None:
    insert = run.store.connection.execute
    slots = int(random.integers(0, 4))
    experts = random.choice(EXPERTS, slots, replace=False).tolist()
    weights = None if token % 5 == 4 else [0.5 / (n + 1) for n in range(slots)]
    planted["routing"].append((token, layer, "mlp", label, experts, weights))
    insert(
        "INSERT INTO routing VALUES (?, ?, ?, 'mlp', ?, ?, NULL, NULL)", [run.run_id, token, layer, experts, weights]
    )
    if token % 2 == 0:
        norms = [float(n + token) for n in range(slots)]
        planted["norms"][token, layer] = norms
        insert("INSERT INTO expert_outputs VALUES (?, ?, ?, 'mlp', ?)", [run.run_id, token, layer, norms])
    logits = random.normal(size=EXPERTS).astype(np.float32).tolist()
    planted["logits"].append((token, layer, logits))
    insert("INSERT INTO router_logits VALUES (?, ?, ?, 'mlp', ?)", [run.run_id, token, layer, logits])


def _loads(planted: dict[str, Any], labels: list[str | None]) -> None:
    counts: Counter[tuple[int, str | None, int]] = Counter()
    weights: dict[tuple[int, str | None, int], float] = defaultdict(float)
    for _, layer, _, label, experts, given in planted["routing"]:
        for slot, expert in enumerate(experts):
            counts[layer, label, expert] += 1
            weights[layer, label, expert] += given[slot] if given else 0.0
    planted["counts"], planted["weights"] = counts, weights
    run = planted["run"]
    insert = "INSERT INTO loads VALUES (?, ?, 'mlp', ?, 'prefill', ?, ?, ?)"
    for layer in range(2):
        for label in labels:
            for expert in range(EXPERTS):
                key = layer, label, expert
                run.store.connection.execute(insert, [run.run_id, layer, label, expert, counts[key], weights[key]])
        shared = [run.run_id, layer, None, -1, 999, 1.0]
        run.store.connection.execute(insert, shared)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with Store(tmp_path_factory.mktemp("views") / "runs.duckdb") as store:
        first = _plant(store, "first", 0)
        _loads(first, LABELS)
        _loads(_plant(store, "second", 1), LABELS)
        yield first


def _rows(planted: dict[str, Any], view: str) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = planted["run"].table(view).fetchall()
    return rows


def test_decisions_are_the_slots_of_routing(planted: dict[str, Any]) -> None:
    expected = [
        (token, layer, block, slot, expert, weights[slot] if weights else None)
        for token, layer, block, _, experts, weights in planted["routing"]
        for slot, expert in enumerate(experts)
    ]
    found = sorted(_rows(planted, "decisions"))
    assert [row[:5] for row in found] == sorted(row[:5] for row in expected)
    by_key = {row[:5]: row[5] for row in expected}
    for row in found:
        assert row[5] == (None if by_key[row[:5]] is None else pytest.approx(by_key[row[:5]], rel=1e-6))
    assert any(row[5] is None for row in found)


def test_decision_outputs_add_the_norm_where_it_was_measured(planted: dict[str, Any]) -> None:
    expected = sorted(
        (token, layer, slot, expert, planted["norms"][token, layer][slot])
        for token, layer, _, _, experts, _ in planted["routing"]
        if (token, layer) in planted["norms"]
        for slot, expert in enumerate(experts)
    )
    found = sorted((t, layer, slot, e, norm) for t, layer, _, slot, e, _, norm in _rows(planted, "decision_outputs"))
    assert found == expected
    assert expected


def test_router_scores_are_the_logits_by_expert(planted: dict[str, Any]) -> None:
    expected = sorted((t, n, e, logit) for t, n, logits in planted["logits"] for e, logit in enumerate(logits))
    assert sorted((t, n, e, logit) for t, n, _, e, logit in _rows(planted, "router_scores")) == expected


def test_token_text_has_every_token_once_with_its_text_or_none(planted: dict[str, Any]) -> None:
    texts = dict(planted["run"].sql("SELECT token_id, text FROM vocabulary WHERE run_id = $run").fetchall())
    sequences = {row[0]: row for row in planted["sequences"]}
    expected = [
        (t, s, sequences[s][1], sequences[s][3], position, phase, i, texts.get(i), nll, texts.get(predicted))
        for t, s, position, i, phase, nll, predicted in planted["tokens"]
    ]
    assert sorted(row[:10] for row in _rows(planted, "token_text")) == expected
    assert any(row[7] is None for row in expected), "an id that is not in the vocabulary is planted"
    assert any(row[7] == "" for row in expected)


def test_token_text_keeps_tokens_where_there_is_no_vocabulary(store: Store, run: Run) -> None:
    store.connection.execute("INSERT INTO tokens (run_id, token, sequence_id) VALUES (?, 0, 0)", [run.run_id])
    assert store.fetch("SELECT token, text, label FROM token_text") == [(0, None, None)]


def test_expert_load_is_counted_from_the_decisions(planted: dict[str, Any]) -> None:
    totals = Counter({(layer, e): 0 for layer in range(2) for e in range(EXPERTS)})
    for (layer, _, expert), count in planted["counts"].items():
        totals[layer, expert] += count
    found = _rows(planted, "expert_load")
    assert len(found) == 2 * EXPERTS, "shared experts see every token: they have no load"
    for layer, block, expert, tokens, _, share, fair, relative in found:
        all_of_layer = sum(totals[layer, e] for e in range(EXPERTS))
        assert (block, tokens) == ("mlp", totals[layer, expert])
        assert share == pytest.approx(totals[layer, expert] / all_of_layer)
        assert fair == pytest.approx(1 / EXPERTS)
        assert relative == pytest.approx(share * EXPERTS)


def test_expert_load_agrees_with_the_analysis(planted: dict[str, Any]) -> None:
    import moescope as ms

    analysed = ms.analyze(planted["run"], "load", allow_incomplete=True).df()
    by_key = {(row[0], row[2]): row for row in _rows(planted, "expert_load")}
    for row in analysed.itertuples():
        assert by_key[row.layer, row.expert][5] == pytest.approx(row.share)


def test_expert_load_by_label_is_counted_from_the_decisions(planted: dict[str, Any]) -> None:
    counts = planted["counts"]
    found = _rows(planted, "expert_load_by_label")
    assert len(found) == 2 * len(LABELS) * EXPERTS, "the empty label and none are two"
    for layer, _, label, expert, tokens, weight, share, overall, lift in found:
        of_label = sum(counts[layer, label, e] for e in range(EXPERTS))
        of_layer = sum(counts[layer, other, e] for other in LABELS for e in range(EXPERTS))
        of_expert = sum(counts[layer, other, expert] for other in LABELS)
        assert tokens == counts[layer, label, expert]
        assert weight == pytest.approx(planted["weights"][layer, label, expert])
        assert share == (pytest.approx(tokens / of_label) if of_label else None)
        assert overall == pytest.approx(of_expert / of_layer)
        assert lift == (pytest.approx(share / overall) if of_label and of_expert else None)


def test_labels_count_documents_sequences_and_tokens(planted: dict[str, Any]) -> None:
    expected = {}
    for label in LABELS:
        own = [row for row in planted["sequences"] if row[3] == label]
        expected[label] = (len({row[1] for row in own}), len(own), sum(row[6] for row in own))
    assert {row[0]: row[1:] for row in _rows(planted, "labels")} == expected


def test_shares_are_null_not_nan_where_a_router_chose_nobody(store: Store, run: Run) -> None:
    insert = "INSERT INTO loads VALUES (?, 0, 'mlp', NULL, 'prefill', ?, 0, 0)"
    for expert in range(2):
        store.connection.execute(insert, [run.run_id, expert])
    assert store.fetch("SELECT share, fair_share, relative_load FROM expert_load") == [(None, 0.5, None)] * 2
    assert store.fetch("SELECT share, overall_share, lift FROM expert_load_by_label") == [(None, None, None)] * 2


def test_run_overview_reads_the_summary(store: Store) -> None:
    summary = {"tokens": 21, "generated_tokens": 3, "sequences": 4, "seconds": 2.0, "tokens_per_second": 10.5}
    store.begin_run(name="whole", model="m", summary={**summary, "documents": 2, "stopped": None})
    store.begin_run(name="cut", model="m", summary={"stopped": "ctrl-c"})
    store.begin_run(name="bare")
    columns = "name, status, tokens, generated_tokens, sequences, documents, seconds, tokens_per_second, stopped"
    assert store.fetch(f"SELECT {columns} FROM run_overview ORDER BY name") == [
        ("bare", "running", *[None] * 7),
        ("cut", "running", *[None] * 6, "ctrl-c"),
        ("whole", "running", 21, 3, 4, 2, 2.0, 10.5, None),
    ]


def test_gaps_name_what_is_missing_and_nothing_else(store: Store, run: Run) -> None:
    rows = [("a", 5, 5, "complete"), ("b", 5, 3, "short"), ("c", 5, 6, "excess")]
    for site, expected, recorded, status in rows:
        insert = "INSERT INTO coverage VALUES (?, ?, ?, ?, ?, 'why')"
        store.connection.execute(insert, [run.run_id, site, expected, recorded, status])
    found = store.fetch("SELECT name, site, missing, status, detail FROM gaps ORDER BY site")
    assert found == [("base", "b", 2, "short", "why"), ("base", "c", -1, "excess", "why")]


def test_vector_sites_sum_up_the_shards(store: Store, run: Run) -> None:
    insert = "INSERT INTO activations (run_id, site, path, rows, width, dtype, shard, tokens) VALUES (?, ?, ?, ?, 8, 'float32', ?, ?)"
    for site, shard, rows, tokens in (("a", 0, 10, 5), ("a", 1, 4, 2), ("b", 0, 1, 1)):
        store.connection.execute(insert, [run.run_id, site, f"{site}{shard}", rows, shard, tokens])
    found = sorted(run.table("vector_sites").fetchall())
    assert found == [("a", 2, 14, 8, "float32", 7), ("b", 1, 1, 8, "float32", 1)]


def test_runs_limit_views_to_themselves(planted: dict[str, Any]) -> None:
    run = planted["run"]
    assert run.rows("decisions") == sum(len(row[4]) for row in planted["routing"])
    assert "run_id" not in run.table("decisions").columns
    assert run.store.fetch("SELECT count(*) FROM decisions")[0][0] > run.rows("decisions")
    with pytest.raises(InputError, match=r"no table 'decision'.*decisions"):
        run.table("decision")


_PLAIN_CLIENT = """
import sys, duckdb
with duckdb.connect(sys.argv[1], read_only=True) as connection:
    for view in sys.argv[2:]:
        print(view, len(connection.execute(f'SELECT * FROM "{view}"').fetchall()))
"""


def test_any_duckdb_client_reads_them_in_a_store_opened_for_reading(planted: dict[str, Any], tmp_path: Path) -> None:
    store = planted["run"].store
    copy = tmp_path / "copy.duckdb"
    store.connection.execute(f"ATTACH '{copy}' AS copy")
    store.connection.execute(f"COPY FROM DATABASE {store.path.stem} TO copy")
    store.connection.execute("DETACH copy")
    names = [view.name for view in VIEWS]
    done = subprocess.run(
        [sys.executable, "-c", _PLAIN_CLIENT, str(copy), *names], capture_output=True, text=True, check=True
    )
    counts = dict(line.split() for line in done.stdout.splitlines())
    assert list(counts) == names
    for name in names:
        assert int(counts[name]) == store.fetch(f'SELECT count(*) FROM "{name}"')[0][0]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_view_and_columns_are_typed_and_commented_as_the_data_says(store: Store, view: Any) -> None:
    assert store.fetch("SELECT comment FROM duckdb_views() WHERE view_name = ?", [view.name]) == [(view.comment,)]
    query = "SELECT column_name, data_type, comment FROM duckdb_columns() WHERE table_name = ? ORDER BY column_index"
    expected = [(column.name, column.type, column.comment) for column in view.columns]
    assert store.fetch(query, [view.name]) == expected


def test_no_view_has_the_name_of_a_table() -> None:
    assert not {view.name for view in VIEWS} & {table.name for table in TABLES}


def _nodes(planted: dict[str, Any], query: str) -> list[tuple[str, str]]:
    """Name and filters of every step of the plan for a query of one of two runs."""
    plan = json.loads(planted["run"].sql(f"EXPLAIN (FORMAT json) {query}").fetchall()[0][1])
    found, waiting = [], list(plan)
    while waiting:
        node = waiting.pop()
        found.append((node["name"], str(node.get("extra_info", {}).get("Filters"))))
        waiting += node["children"]
    return found


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_no_view_sorts_and_every_table_below_is_read_for_the_run_alone(planted: dict[str, Any], view: Any) -> None:
    if view.name in ("gaps", "vector_sites"):
        insert = "INSERT INTO coverage SELECT run_id, 'a', 5, 3, 'short', 'x' FROM runs"
        planted["run"].store.connection.execute(insert)
        insert = "INSERT INTO activations (run_id, site) SELECT run_id, 'a' FROM runs"
        planted["run"].store.connection.execute(insert)
    nodes = _nodes(planted, f'SELECT * FROM "{view.name}" WHERE run_id = $run')
    assert not {name for name, _ in nodes} & {"ORDER_BY", "TOP_N"}
    scans = [filters for name, filters in nodes if name == "SEQ_SCAN"]
    assert scans
    for filters in scans:
        assert planted["run"].run_id in filters


def test_a_layer_is_chosen_before_decisions_are_unrolled(planted: dict[str, Any]) -> None:
    nodes = _nodes(planted, "SELECT expert FROM decisions WHERE run_id = $run AND layer = 1")
    (scan,) = [filters for name, filters in nodes if name == "SEQ_SCAN"]
    assert "layer = 1" in scan
    assert "FILTER" not in {name for name, _ in nodes}


def _documented() -> dict[str, tuple[str, list[tuple[str, str, str]]]]:
    """Name → what a row is, and the rows of its table, as the page has them."""
    found: dict[str, tuple[str, list[tuple[str, str, str]]]] = {}
    for part in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, rest = part.partition("\n")
        rows = [line[2:-2].split(" | ") for line in rest.splitlines() if line.startswith("| `")]
        comment = next(line for line in rest.splitlines() if line)
        found[name.strip("`")] = comment, [(c.strip("`"), t, m) for c, t, m in rows]
    return found


def test_the_page_of_tables_and_columns_is_what_the_store_is_made_of() -> None:
    documented = _documented()
    assert list(documented) == [entry.name for entry in (*TABLES, *VIEWS)]
    for entry in (*TABLES, *VIEWS):
        comment, rows = documented[entry.name]
        assert comment == f"{entry.comment[0].upper()}{entry.comment[1:]}."
        assert rows == [(c.name, c.type, c.comment.replace("|", "\\|")) for c in entry.columns], (
            "write it again: python -m moescope.store.page > docs/store.md"
        )


def test_the_page_is_written_by_the_command_it_names() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "moescope.store.page"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert done.stdout == PAGE.read_text(encoding="utf-8")


def test_every_query_on_the_page_runs(planted: dict[str, Any]) -> None:
    queries = re.findall(r"```sql\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(queries) >= 4
    for query in queries:
        for statement in filter(str.strip, query.split(";")):
            planted["run"].store.fetch(statement)
