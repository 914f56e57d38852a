"""An imported run passes the same ledger: what is missing or wrong makes it incomplete, and is told with its row."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

N_EXPERTS = 16


def _at(rows: Any, layer: int) -> int:
    return next(n for n, row in enumerate(rows.rows) if row["layer"] == layer)


def test_a_decision_that_is_missing_is_short_by_k(store: Store, random_trace: Any, gaps: Any) -> None:
    rows = random_trace()
    run = import_trace(store, rows.without(_at(rows, 2)), name="trace", n_experts=N_EXPERTS)
    assert run.status == "incomplete"
    found = gaps(run)
    assert set(found) == {"blocks.2.mlp.hook_expert_indices", "blocks.2.mlp.hook_expert_weights"}
    status, detail = found["blocks.2.mlp.hook_expert_indices"]
    assert status == "short"
    assert "3 events are missing" in detail


@pytest.mark.parametrize(
    ("changed", "status", "says"),
    [
        ({"experts": [1, 2, 16]}, "invalid", "ids outside of 0 to 15"),
        ({"weights": [0.5, float("nan"), 0.25]}, "invalid", "NaN or infinite"),
        ({"weights": [0.5, float("inf"), 0.25]}, "invalid", "NaN or infinite"),
        ({"experts": [3, 3, 4]}, "invalid", "the same expert twice"),
        ({"experts": [1, -1, 2]}, "short", "ids below 0"),
        ({"experts": [1, 2], "weights": [0.5, 0.25]}, "short", "not 3 experts"),
        ({"experts": [1, 2, 3, 4], "weights": [0.5, 0.25, 0.125, 0.125]}, "excess", None),
    ],
)
def test_what_is_wrong_with_a_decision_is_told_with_its_row(
    store: Store, random_trace: Any, gaps: Any, changed: dict[str, Any], status: str, says: str | None
) -> None:
    rows = random_trace()
    number = _at(rows, 5)
    run = import_trace(store, rows.but(number, **changed), name="trace", n_experts=N_EXPERTS)
    assert run.status == "incomplete"
    found = gaps(run)
    assert all(site.startswith("blocks.5.mlp.") for site in found)
    assert found["blocks.5.mlp.hook_expert_indices"][0] == status
    if says is not None:
        assert says in found["blocks.5.mlp.hook_expert_indices"][1]
        assert f"row {number} " in found["blocks.5.mlp.hook_expert_indices"][1]


def test_two_slots_of_one_expert_are_fine_where_one_has_no_weight(store: Store, random_trace: Any) -> None:
    rows = random_trace()
    changed = rows.but(4, experts=[3, 3, 4], weights=[0.5, 0.0, 0.25])
    assert import_trace(store, changed, name="trace", n_experts=N_EXPERTS).status == "complete"


def test_ids_below_0_are_not_stored(store: Store, random_trace: Any) -> None:
    rows = random_trace()
    run = import_trace(store, rows.but(4, experts=[1, -1, 2]), name="trace", n_experts=N_EXPERTS)
    assert run.rows("routing") == len(rows.rows) - 1
    assert run.rows("tokens") == 20


def test_weights_of_some_rows_only_are_short(store: Store, random_trace: Any, gaps: Any) -> None:
    rows = random_trace()
    run = import_trace(store, rows.but(_at(rows, 1), weights=None), name="trace", n_experts=N_EXPERTS)
    assert run.status == "incomplete"
    assert set(gaps(run)) == {"blocks.1.mlp.hook_expert_weights"}


def test_positions_missing_inside_a_sequence_are_a_gap(store: Store, random_trace: Any, gaps: Any) -> None:
    rows = random_trace()
    gone = [n for n, row in enumerate(rows.rows) if row["sequence_id"] == 2 and row["position"] == 6]
    run = import_trace(store, rows.without(*gone), name="trace", n_experts=N_EXPERTS)
    assert run.status == "incomplete"
    assert "missing inside" in gaps(run)["tokens"][1]


def test_sequences_that_begin_late_are_complete_and_said(store: Store, random_trace: Any) -> None:
    rows = random_trace()
    table = pa.Table.from_pylist([{**row, "position": row["position"] + 30} for row in rows.rows])
    run = import_trace(store, table, name="trace", n_experts=N_EXPERTS)
    assert run.status == "complete"
    assert "3 sequences begin after position 0" in run.info["summary"]["notes"]


def test_k_is_the_commonest_unless_given(store: Store, random_trace: Any, gaps: Any) -> None:
    rows = random_trace()
    assert import_trace(store, rows.table, name="a", n_experts=N_EXPERTS).info["settings"]["top_k"] == 3
    run = import_trace(store, rows.table, name="b", n_experts=N_EXPERTS, top_k=4)
    assert run.status == "incomplete"
    assert gaps(run)["blocks.1.mlp.hook_expert_indices"][0] == "short"
