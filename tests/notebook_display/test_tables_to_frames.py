"""Wherever there is a table, pandas, polars and Arrow get the same rows."""

from __future__ import annotations

from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

import moescope as ms


@pytest.fixture(scope="module")
def tables(hostile_run: Any, demo_model: Any) -> dict[str, Any]:
    return {
        "result": ms.analyze(hostile_run, "load"),
        "coverage": hostile_run.coverage,
        "anatomy": demo_model.anatomy,
        "plan": ms.plan(demo_model, ["Hello world."], progress=False),
    }


@pytest.mark.parametrize("name", ["result", "coverage", "anatomy", "plan"])
def test_three_libraries_get_the_same_rows(name: str, tables: dict[str, Any]) -> None:
    thing = tables[name]
    arrow, frame, polars = thing.arrow(), thing.df(), thing.polars()
    assert isinstance(arrow, pa.Table)
    assert isinstance(frame, pd.DataFrame)
    assert isinstance(polars, pl.DataFrame)
    assert list(frame.columns) == polars.columns == arrow.column_names
    assert len(frame) == len(polars) == arrow.num_rows > 0
    assert polars.to_arrow().to_pylist() == arrow.to_pylist()


def test_relations_of_a_run_and_of_a_store_go_out_the_same_way(hostile_run: Any) -> None:
    own = hostile_run.table("routing")
    of_store = hostile_run.store.sql("SELECT * EXCLUDE (run_id) FROM routing")
    for relation in (own, of_store):
        arrow = relation.to_arrow_table()
        assert isinstance(relation.pl(), pl.DataFrame)
        assert len(relation.df()) == len(relation.pl()) == arrow.num_rows == hostile_run.rows("routing")
        assert relation.pl()["experts"].to_list() == arrow["experts"].to_pylist()
        assert relation.df()["token"].tolist() == arrow["token"].to_pylist()


def test_anatomy_has_a_row_for_every_sublayer(demo_model: Any) -> None:
    frame = demo_model.anatomy.df()
    config = demo_model.module.config
    routers = frame[frame["kind"] == "moe"]
    assert len(frame) == 2 * config.num_hidden_layers
    assert set(routers["n_experts"]) == {config.num_experts}
    assert set(routers["top_k"]) == {config.num_experts_per_tok}
