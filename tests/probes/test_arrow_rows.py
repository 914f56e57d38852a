"""Columns made from arrays hold what the arrays hold; slots come in the store's order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.probes.arrow_rows import constant, lists, slot_order, triples


@given(
    st.integers(1, 6).flatmap(
        lambda k: st.lists(
            st.tuples(
                st.permutations(range(8)).map(lambda ids: ids[:k]),
                st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=k, max_size=k),
            ),
            min_size=1,
            max_size=6,
        )
    )
)
def test_slots_are_ordered_by_falling_weight_and_then_by_id(rows: list[tuple[list[int], list[float]]]) -> None:
    ids, weights = np.array([r[0] for r in rows]), np.array([r[1] for r in rows], np.float32)
    order = slot_order(weights, ids)
    if order is not None:
        ids, weights = np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)
    expected = [sorted(zip(*row, strict=True), key=lambda slot: (-slot[1], slot[0])) for row in rows]
    found = [list(zip(i, w, strict=True)) for i, w in zip(ids.tolist(), weights.tolist(), strict=True)]
    assert found == expected


@pytest.mark.parametrize("shape", [(0, 2), (3, 1), (5, 4), (2, 0)])
def test_columns_of_lists_hold_the_rows_of_an_array(shape: tuple[int, int]) -> None:
    values = np.arange(shape[0] * shape[1], dtype=np.uint16).reshape(shape)
    for given_values in (values, np.asfortranarray(values)):
        assert lists(given_values, pa.uint16()).to_pylist() == values.tolist()


def test_columns_of_triples_hold_the_rows_of_an_array() -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    assert triples(values, pa.float32()).to_pylist() == values.tolist()
    assert triples(np.asfortranarray(values), pa.float32()).to_pylist() == values.tolist()


@pytest.mark.parametrize("rows", [0, 1, 300])
def test_a_constant_column_repeats_its_value(rows: int) -> None:
    assert constant("mlp", rows).to_pylist() == ["mlp"] * rows
