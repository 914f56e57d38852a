"""Decisions as arrays: what lies in the tables, token by token, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.core.errors import InputError
from moescope.routing.trace import read_trace
from moescope.store.importing.import_trace import import_trace
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]


def _fields(planted: ModuleType, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    lengths = [5, 1, 4]
    tokens = sum(lengths)
    narrow = np.stack([generator.permutation(4)[:1] for _ in range(tokens)])
    wide = np.stack([generator.permutation(300)[:3] for _ in range(tokens)])
    weights = generator.uniform(size=wide.shape).astype(np.float32)
    return {
        "lengths": lengths,
        "documents": [7, 7, 3],
        "labels": ["b", "b", None],
        "routers": [planted.Router(narrow, 4), planted.Router(wide, 298, layer=2, n_null=2, weights=weights)],
        "predicted": list(range(tokens)),
        "decode": [False] * 4 + [True] + [False] * 5,
    }


def test_arrays_are_what_the_tables_hold(plant: Plant, planted: ModuleType) -> None:
    fields = _fields(planted)
    trace = read_trace(plant(**fields))
    narrow, wide = trace.routers
    assert [(r.layer, r.block, r.n_experts, r.n_null, r.top_k, r.name) for r in trace.routers] == [
        (0, "mlp", 4, 0, 1, "L0"),
        (2, "mlp", 300, 2, 3, "L2"),
    ]
    np.testing.assert_array_equal(narrow.experts, fields["routers"][0].experts)
    np.testing.assert_array_equal(wide.experts, fields["routers"][1].experts)
    np.testing.assert_array_equal(trace.weights(wide), fields["routers"][1].weights)
    assert trace.starts.tolist() == [0, 5, 6, 10]
    assert trace.position.tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3]
    assert trace.sequence.tolist() == [0] * 5 + [1] + [2] * 4
    assert trace.document.tolist() == [1] * 6 + [0] * 4
    assert trace.n_documents == 2
    assert trace.label.tolist() == [0] * 6 + [-1] * 4
    assert trace.label_names == ("b",)
    assert trace.predicted_id.tolist() == list(range(10))
    assert np.flatnonzero(trace.decode).tolist() == [4]
    assert (trace.tokens, trace.decisions, trace.dropped, trace.notes) == (10, 40, 0, ())


def test_tokens_without_a_whole_decision_in_range_are_left_out_and_said(plant: Plant, planted: ModuleType) -> None:
    run = plant(**_fields(planted), status="incomplete")
    run.store.connection.execute(
        "UPDATE routing SET experts = [999, 1, 2]::USMALLINT[] WHERE run_id = ? AND layer = 2 AND token = 3",
        [run.run_id],
    )
    run.store.connection.execute("DELETE FROM routing WHERE run_id = ? AND layer = 0 AND token = 6", [run.run_id])
    run.store.connection.execute(
        "UPDATE routing SET experts = [1]::USMALLINT[] WHERE run_id = ? AND layer = 2 AND token = 9", [run.run_id]
    )
    run.store.connection.execute(
        "INSERT INTO routing SELECT * FROM routing WHERE run_id = ? AND layer = 0 AND token = 0", [run.run_id]
    )
    trace = read_trace(run)
    assert trace.token.tolist() == [0, 1, 2, 4, 5, 7, 8]
    assert trace.starts.tolist() == [0, 4, 5, 7]
    assert trace.dropped == 3
    assert trace.notes == ("3 tokens without a whole decision are left out.",)
    rows = run.store.fetch(
        "SELECT token, experts FROM routing WHERE run_id = ? AND layer = 2 ORDER BY token", [run.run_id]
    )
    chosen = dict(rows)
    assert trace.routers[1].experts.tolist() == [chosen[token] for token in trace.token.tolist()]
    assert trace.weights(trace.routers[1]).shape == (7, 3)


def test_what_an_imported_trace_lacks_is_said(store: Store) -> None:
    rows = {"sequence_id": [0, 0], "position": [0, 1], "layer": [4, 4], "experts": [[1, 0], [2, 1]]}
    run = import_trace(store, pa.table(rows), name="without weights", n_experts=3)
    trace = read_trace(run)
    assert trace.routers[0].experts.tolist() == [[1, 0], [2, 1]]
    assert np.isnan(trace.weights(trace.routers[0])).all()
    assert trace.token_id.tolist() == trace.predicted_id.tolist() == [-1, -1]
    with pytest.raises(InputError, match="no routing weights"):
        trace.require_weights()
    with pytest.raises(InputError, match=r"no labels.*--label-field"):
        trace.require_labels()


def test_a_run_without_decisions_is_refused(plant: Plant) -> None:
    with pytest.raises(InputError, match=r"no decisions of routers.*probe routing"):
        read_trace(plant(lengths=[3]))


def test_a_finished_run_is_read_once_and_a_running_one_anew(plant: Plant, planted: ModuleType) -> None:
    run = plant(**_fields(planted))
    assert read_trace(run).token is read_trace(run).token
    running = plant(**_fields(planted), status="running")
    before = read_trace(running)
    running.store.connection.execute("DELETE FROM routing WHERE run_id = ? AND token = 0", [running.run_id])
    assert (before.tokens, read_trace(running).tokens) == (10, 9)
