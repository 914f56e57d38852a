from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.dashboard.kept import Kept, forget_all
from moescope.dashboard.records import routers
from moescope.dashboard.token_changes import changes, partners, shown
from moescope.dashboard.token_colours import painted
from moescope.dashboard.token_features import feature_on_tokens, firing_on
from moescope.dashboard.token_table import table_rows
from moescope.dashboard.token_view import NO_LABEL, find_part
from moescope.dashboard.token_window import in_sight
from moescope.dashboard.url_state import Layer, ViewState
from moescope.store.store import Store

SAE = "00000000-0000-0000-0000-000000000001"


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Tests change rows of complete runs, which nothing else does."""
    forget_all()


@pytest.fixture
def read(run: Any) -> Any:
    """The planted run with one autoencoder, of whose feature 7 two windows were kept."""
    connection = run.store.connection
    connection.execute("INSERT INTO saes (sae_id, name, site) VALUES (?, 'small', 'blocks.1.hook_resid_post')", [SAE])
    connection.execute(
        "INSERT INTO features (sae_id, run_id, feature, active, tokens) VALUES (?, ?, 7, 3, 20)", [SAE, run.run_id]
    )
    connection.execute(
        """
        INSERT INTO feature_contexts (sae_id, run_id, feature, stratum, rank, sequence_id, position, value, first_position, activations)
        VALUES (?, ?, 7, 0, 0, 0, 3, 2.5, 2, [0, 2.5, NULL]), (?, ?, 7, 0, 1, 2, 1, 1.5, 0, [0.5, 1.5, 0])
        """,
        [SAE, run.run_id, SAE, run.run_id],
    )
    return run


def test_only_what_was_kept_of_a_feature_has_a_value(read: Any) -> None:
    found = feature_on_tokens(read, find_part(read, ViewState()), None, 7)
    expected = np.full(21, math.nan)
    expected[2:4] = [0, 2.5]
    expected[15:18] = [0.5, 1.5, 0]
    np.testing.assert_array_equal(found.values, expected)
    assert (found.contexts, found.active, found.tokens) == (2, 3, 20)


def test_a_feature_that_was_not_read_is_refused(read: Any) -> None:
    with pytest.raises(InputError, match="no feature 8"):
        feature_on_tokens(read, find_part(read, ViewState()), "small", 8)
    legend = painted(read, ViewState(mode="feature")).legend
    assert "needs a feature" in str(legend)


def test_the_features_of_a_token_are_those_of_kept_windows(read: Any) -> None:
    assert firing_on(read, 0, 3) == [("small", 7, 2.5)]
    assert firing_on(read, 0, 2) == [], "zero is silent"
    assert firing_on(read, 0, 4) == [], "null is not known"
    assert firing_on(read, 1, 3) == []


def test_only_sequences_with_a_kept_example_are_left(read: Any) -> None:
    part = find_part(read, ViewState(feature=7).with_rest(only="feature"))
    assert [sequence for sequence, _, _ in part.sequences] == [0, 2]


def test_only_sequences_that_use_an_expert_are_left(run: Any) -> None:
    run.store.connection.execute("UPDATE routing SET experts = [0, 1] WHERE layer = 1 AND token NOT IN (9, 12)")
    run.store.connection.execute("UPDATE routing SET experts = [0, 3] WHERE layer = 1 AND token IN (9, 12)")
    state = ViewState(layer=Layer(1), expert=3).with_rest(only="expert")
    assert [sequence for sequence, _, _ in find_part(run, state).sequences] == [1]
    with pytest.raises(InputError, match="only"):
        find_part(run, ViewState(layer=Layer(1), expert=2).with_rest(only="expert"))
    with pytest.raises(InputError, match=r"only=.nonsense"):
        find_part(run, ViewState().with_rest(only="nonsense"))


def test_texts_without_a_label_are_a_filter(run: Any) -> None:
    assert [label for _, label, _ in find_part(run, ViewState(label=NO_LABEL)).sequences] == [None]


def test_changes_are_those_of_a_comparison_token_by_token(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="one"), Plan(name="two", seed=5))
    one, two = store.run("one"), store.run("two")
    assert partners(one) == ["two"]
    router = routers(one)[1]
    found = changes(one, two, find_part(one, ViewState()), router, 2)
    chosen = {
        name: [set(e) for (e,) in store.fetch(
            "SELECT experts FROM routing JOIN runs USING (run_id) WHERE name = ? AND layer = 1 ORDER BY token", [name]
        )]
        for name in ("one", "two")
    }  # fmt: skip
    pairs = list(zip(chosen["one"], chosen["two"], strict=True))
    assert found.swapped.tolist() == [len(a - b) for a, b in pairs]
    assert shown(found, "lost").tolist() == [2 in b - a for a, b in pairs]
    assert shown(found, "gained").tolist() == [2 in a - b for a, b in pairs]


def test_tokens_that_only_one_run_recorded_are_not_called_the_same(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="one"), Plan(name="two"))
    one, two = store.run("one"), store.run("two")
    store.connection.execute("DELETE FROM routing WHERE run_id = ? AND token = 4", [two.run_id])
    found = changes(one, two, find_part(one, ViewState()), routers(one)[0], None)
    assert np.flatnonzero(found.swapped < 0).tolist() == [4]
    assert found.swapped.max() == 0


def test_runs_over_other_texts_are_not_compared(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="one"), Plan(name="two"))
    two = store.run("two")
    store.connection.execute(
        "UPDATE sequences SET content_hash = 'x' WHERE run_id = ? AND sequence_id = 1", [two.run_id]
    )
    colours, legend, _, _ = painted(store.run("one"), ViewState(mode="changed", other="two"))
    assert colours is None
    assert "read other texts" in str(legend)


def test_lost_without_an_expert_is_refused(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="one"), Plan(name="two"))
    legend = painted(store.run("one"), ViewState(mode="changed").with_rest(change="lost")).legend
    assert "Lost needs an expert" in str(legend)


@pytest.mark.parametrize("column", ["nll", "entropy", "margin", "weight", "position"])
def test_the_table_is_sorted_as_the_records_are(run: Any, column: str) -> None:
    request = {"startRow": 3, "endRow": 9, "sortModel": [{"colId": column, "sort": "desc"}], "filterModel": {}}
    answer = table_rows(run, ViewState(layer=Layer(1)), request)
    value = "weights[1]" if column == "weight" else column
    truth = run.store.fetch(
        f"SELECT t.token FROM tokens t JOIN routing r USING (run_id, token) WHERE layer = 1 ORDER BY {value} DESC NULLS LAST, token"
    )
    assert [int(row["token"]) for row in answer["rowData"]] == [token for (token,) in truth[3:9]]
    assert answer["rowCount"] == 21


def test_the_table_holds_what_the_filters_leave(run: Any) -> None:
    state = ViewState(label="english", layer=Layer(0), expert=1)
    model = {"nll": {"type": "greaterThan", "filter": 1.0}, "class": {"type": "contains", "filter": "WOR"}}
    answer = table_rows(run, state, {"startRow": 0, "endRow": 100, "filterModel": model})
    truth = run.store.fetch(
        """
        SELECT t.token
        FROM tokens t
        JOIN routing r USING (run_id, token)
        WHERE sequence_id = 0 AND layer = 0 AND list_contains(experts, 1) AND nll > 1.0
        ORDER BY token
        """
    )
    assert [int(row["token"]) for row in answer["rowData"]] == [token for (token,) in truth]
    assert answer["rowCount"] == len(truth)


def test_a_request_cannot_bring_its_own_sql(run: Any) -> None:
    request = {
        "startRow": 0,
        "endRow": 5,
        "sortModel": [{"colId": "token; DROP TABLE tokens", "sort": "asc"}],
        "filterModel": {"nll) OR 1=1 --": {"type": "lessThan", "filter": 0}, "text": {"filter": "' OR '1'='1"}},
    }
    assert table_rows(run, ViewState(), request) == {"rowData": [], "rowCount": 0}


def test_the_experts_in_sight_are_those_recorded(run: Any) -> None:
    found = in_sight(run, {"view": "?layer=1", "first": 5, "last": 7})
    assert found is not None
    truth = run.store.fetch("SELECT token, experts FROM routing WHERE layer = 1 AND token BETWEEN 5 AND 7")
    assert {token: experts for token, (experts, _) in found["chosen"].items()} == dict(truth)
    assert in_sight(run, {"view": "?layer=9", "first": 0, "last": 1}) is None


def test_values_of_unfinished_runs_are_not_kept(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="done"), Plan(name="short", status="incomplete"))
    kept: Kept[int] = Kept(1)
    counted = iter(range(10))
    for name, again in (("done", True), ("short", False)):
        first = kept.of(store.run(name), "key", lambda: next(counted))
        assert (kept.of(store.run(name), "key", lambda: next(counted)) == first) is again
