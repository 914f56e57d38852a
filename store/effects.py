"""Effects of interventions: written in whole transactions, and found again."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.errors import InputError, RunError
from moescope.store.transaction import transaction

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store

Kind = Literal["target", "control"]


@dataclass(frozen=True)
class EffectRow:
    """One number of an effect: a mean over the tokens (or texts) of a group.

    Attributes:
        group_kind: `all`, `label`, `position` or `class`.
        group_value: which of these; None for all.
        metric: what it is; `value` is in `unit`.
        value, ci_low, ci_high: the number and its interval, None where documents are too few for one.
        n: tokens (or texts) behind it.
    """

    group_kind: str
    group_value: str | None
    metric: str
    value: float
    ci_low: float | None
    ci_high: float | None
    n: int
    unit: str


@dataclass(frozen=True)
class SequenceSums:
    """Sums of one metric over the tokens of each sequence, for resampling documents.

    Attributes:
        metric: what is summed.
        sequence: [sequence] ids.
        total: [sequence] sum over its tokens.
        n: [sequence] tokens.
    """

    metric: str
    sequence: NDArray[np.int64]
    total: NDArray[np.float64]
    n: NDArray[np.int64]


@dataclass(frozen=True)
class Measured:
    """What one intervention did, or one of its controls.

    Attributes:
        effect_id: shared by an intervention and its controls; `new_effect_id` makes one.
        base_run_id: the run without the intervention.
        intervention: the edits, as JSON.
        kind, draw: the intervention itself (draw None), or a control and its number from 0 on.
        rows: its numbers by group.
        sequences: the sums behind them.
        sweep_id: the sweep it is part of.
        run_id: the run with the intervention, where that was kept.
    """

    effect_id: str
    base_run_id: str
    intervention: str
    kind: Kind
    draw: int | None
    rows: Sequence[EffectRow]
    sequences: Sequence[SequenceSums] = ()
    sweep_id: str | None = None
    run_id: str | None = None


def new_effect_id() -> str:
    """A fresh UUID of version 7 (RFC 9562): the order of these ids is the order in which they were made.

    Example:
        >>> first, second = new_effect_id(), new_effect_id()
        >>> first < second
        True
    """
    milliseconds, rest = divmod(max(time.time_ns(), _Last.nanoseconds + 256), 1_000_000)
    _Last.nanoseconds = milliseconds * 1_000_000 + rest
    fraction = (rest << 12) // 1_000_000
    tail = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1
    return str(uuid.UUID(int=(milliseconds << 80) | (7 << 76) | (fraction << 64) | (2 << 62) | tail))


class _Last:
    """When the last id was made: two within a tick of the clock must differ."""

    nanoseconds = 0


def write_effects(store: Store, measured: Sequence[Measured]) -> None:
    """Store effects, all of them in one transaction.

    Raises:
        InputError: the store is open for reading only, or a base run is not in it.
        RunError: they could not be written; nothing of them is stored.
    """
    store.check_writable()
    known = {str(run_id) for (run_id,) in store.fetch("SELECT run_id FROM runs")}
    if lost := {entry.base_run_id for entry in measured} - known:
        raise InputError(
            f"{store.path} has no run with the id {min(lost)}", fix="effects belong to a base run in the same store"
        )
    tables = {"effects": _effect_rows(measured), "effect_sequences": _sequence_rows(measured)}
    connection = store.connection
    try:
        with transaction(connection):
            for name, rows in tables.items():
                connection.register("rows_to_write", rows)
                connection.execute(f'INSERT INTO "{name}" BY NAME SELECT * FROM rows_to_write')
                connection.unregister("rows_to_write")
    except duckdb.Error as refused:
        raise RunError(
            "the effects could not be stored",
            found=str(refused),
            fix="free some space on the disk; nothing of them was stored",
        ) from refused


def effect_ids(run: Run) -> list[str]:
    """Effects measured against a run, oldest first."""
    query = """
        SELECT DISTINCT effect_id::VARCHAR AS effect_id
        FROM effects
        WHERE base_run_id = ?
        ORDER BY effect_id
    """
    return [effect_id for (effect_id,) in run.store.fetch(query, [run.run_id])]


def _effect_rows(measured: Sequence[Measured]) -> pa.Table:
    rows = [
        {
            "effect_id": entry.effect_id,
            "sweep_id": entry.sweep_id,
            "base_run_id": entry.base_run_id,
            "run_id": entry.run_id,
            "intervention": entry.intervention,
            "kind": entry.kind,
            "draw": entry.draw,
            **vars(row),
        }
        for entry in measured
        for row in entry.rows
    ]
    return pa.Table.from_pylist(rows, schema=_EFFECTS)


def _sequence_rows(measured: Sequence[Measured]) -> pa.Table:
    parts = [
        pa.table(
            {
                "effect_id": pa.array([entry.effect_id] * len(sums.sequence), pa.string()),
                "kind": pa.array([entry.kind] * len(sums.sequence), pa.string()),
                "draw": pa.array([entry.draw] * len(sums.sequence), pa.int32()),
                "sequence_id": pa.array(sums.sequence, pa.int64()),
                "metric": pa.array([sums.metric] * len(sums.sequence), pa.string()),
                "sum": pa.array(sums.total, pa.float64()),
                "n": pa.array(sums.n, pa.int64()),
            }
        )
        for entry in measured
        for sums in entry.sequences
    ]
    return pa.concat_tables(parts) if parts else _SEQUENCES.empty_table()


_TEXT, _WHOLE, _NUMBER = pa.string(), pa.int64(), pa.float64()
_EFFECTS = pa.schema(
    {
        "effect_id": _TEXT, "sweep_id": _TEXT, "base_run_id": _TEXT, "run_id": _TEXT, "intervention": _TEXT, "kind": _TEXT,
        "draw": pa.int32(), "group_kind": _TEXT, "group_value": _TEXT, "metric": _TEXT, "value": _NUMBER, "ci_low": _NUMBER,
        "ci_high": _NUMBER, "n": _WHOLE, "unit": _TEXT,
    }
)  # fmt: skip
_SEQUENCES = pa.schema(
    {
        "effect_id": _TEXT, "kind": _TEXT, "draw": pa.int32(), "sequence_id": _WHOLE, "metric": _TEXT, "sum": _NUMBER,
        "n": _WHOLE,
    }
)  # fmt: skip
