"""Rows of `super_experts` and `heads` that a protocol found for a run, written all at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from moescope.core.errors import InputError
from moescope.store.run import Run
from moescope.store.schema import TABLE_BY_NAME
from moescope.store.transaction import transaction


@dataclass(frozen=True)
class SuperExpertRow:
    """An expert that a rule calls super expert.

    Attributes:
        rule: its name.
        layer, block, expert: which; shared experts are −1, −2, ….
        value: its largest |output|.
        threshold: what it had to exceed.
    """

    rule: str
    layer: int
    block: str
    expert: int
    value: float
    threshold: float


@dataclass(frozen=True)
class HeadRows:
    """One metric of the heads of one attention.

    Attributes:
        layer, block: where.
        metric: what was measured.
        values: [head].
        n: observations behind each value, one number or [head].
        condition: under which it was measured; `base` for the model as it is.
    """

    layer: int
    block: str
    metric: str
    values: NDArray[np.floating]
    n: ArrayLike
    condition: str = "base"


def write_super_experts(run: Run, rules: Iterable[str], found: Iterable[SuperExpertRow]) -> None:
    """Write what some rules say of a run's experts, in place of what they said before.

    Args:
        run: in a store open for writing.
        rules: every rule that was held against the experts, those that name none included.
        found: the experts they name.

    Raises:
        InputError: a store open for reading only; an expert named by a rule that is not among `rules`.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), ["Hello world."], store, name="first", progress=False)
        ...     write_super_experts(run, ["paper"], [SuperExpertRow("paper", 1, "mlp", 3, 700.0, 70.0)])
        ...     run.rows("super_experts")
        1
    """
    _check(run)
    names, rows = list(dict.fromkeys(rules)), list(found)
    if strange := {row.rule for row in rows} - set(names):
        raise InputError(f"the rule {min(strange)!r} is not among those that were held", expected=", ".join(names))
    table = pa.table(
        {
            "rule": pa.array([row.rule for row in rows], pa.string()),
            "layer": pa.array([row.layer for row in rows], pa.uint16()),
            "block": pa.array([row.block for row in rows], pa.string()),
            "expert": pa.array([row.expert for row in rows], pa.int32()),
            "value": pa.array([row.value for row in rows], pa.float64()),
            "threshold": pa.array([row.threshold for row in rows], pa.float64()),
        }
    )
    connection = run.store.connection
    with transaction(connection):
        connection.execute("DELETE FROM super_experts WHERE run_id = ? AND list_contains(?, rule)", [run.run_id, names])
        _insert(run, "super_experts", table)


def write_heads(run: Run, found: Iterable[HeadRows]) -> None:
    """Write metrics of a run's heads, each in place of what stood there for that metric and condition.

    Args:
        run: in a store open for writing.
        found: one entry an attention and metric; heads whose value is no number are left out.

    Raises:
        InputError: a store open for reading only; the same metric of one attention twice.
    """
    _check(run)
    entries = list(found)
    keys = [(e.layer, e.block, e.metric, e.condition) for e in entries]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError("a metric of one attention is given twice", found=f"{twice[2]} in layer {twice[0]}")
    parts = [_head_table(entry) for entry in entries]
    connection = run.store.connection
    with transaction(connection):
        for metric, condition in dict.fromkeys((e.metric, e.condition) for e in entries):
            connection.execute(
                "DELETE FROM heads WHERE run_id = ? AND metric = ? AND condition = ?", [run.run_id, metric, condition]
            )
        if parts:
            _insert(run, "heads", pa.concat_tables(parts))


def _head_table(entry: HeadRows) -> pa.Table:
    values = np.asarray(entry.values, np.float64)
    kept = np.flatnonzero(np.isfinite(values))
    n = np.broadcast_to(np.asarray(entry.n), values.shape)[kept]
    return pa.table(
        {
            "layer": pa.array(np.full(len(kept), entry.layer), pa.uint16()),
            "block": pa.array([entry.block] * len(kept), pa.string()),
            "head": pa.array(kept, pa.int32()),
            "metric": pa.array([entry.metric] * len(kept), pa.string()),
            "condition": pa.array([entry.condition] * len(kept), pa.string()),
            "value": pa.array(values[kept], pa.float64()),
            "n": pa.array(n, pa.int64()),
        }
    )


def _insert(run: Run, name: str, rows: pa.Table) -> None:
    if not rows.num_rows:
        return
    known = {column.name for column in TABLE_BY_NAME[name].columns}
    rows = rows.select([column for column in rows.column_names if column in known])
    columns = ", ".join(f'"{column}"' for column in rows.column_names)
    connection = run.store.connection
    connection.register("moescope_rows", rows)
    try:
        connection.execute(
            f'INSERT INTO "{name}" (run_id, {columns}) SELECT ?, {columns} FROM moescope_rows', [run.run_id]
        )
    finally:
        connection.unregister("moescope_rows")


def _check(run: Run) -> None:
    run.store.check_writable()
