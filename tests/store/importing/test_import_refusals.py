"""Traces that cannot be true are refused with the row, and an import that fails leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.core.errors import InputError, StoreError
from moescope.store.importing.import_trace import import_trace
from moescope.store.schema import TABLES
from moescope.store.store import Store

N_EXPERTS = 16


def _rows_in_store(store: Store) -> int:
    return sum(
        store.fetch(f'SELECT count(*) FROM "{table.name}"')[0][0] for table in TABLES if table.name != "store_info"
    )


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"sequence_id": None}, "no sequence_id, position, layer or experts"),
        ({"experts": None}, "no sequence_id, position, layer or experts"),
        ({"position": -1}, "negative"),
        ({"layer": 70_000}, "too large"),
        ({"position": 2**31}, "too large"),
        ({"experts": [], "weights": []}, "no expert"),
        ({"experts": [1, None, 3]}, "without an id"),
        ({"experts": [1, 2, 65_536]}, "over 65,535"),
        ({"weights": [0.5, 0.5]}, "not as many weights"),
        ({"weights": [0.5, None, 0.5]}, "weight that is null"),
        ({"phase": "train"}, "unknown phase"),
        ({"token_id": -5}, "negative token_id"),
    ],
)
def test_a_row_that_no_run_can_hold_is_refused_by_number(
    store: Store, random_trace: Any, tmp_path: Path, changed: dict[str, Any], says: str
) -> None:
    rows = random_trace()
    path = tmp_path / "trace.parquet"
    pq.write_table(rows.but(17, **changed), path)
    for source in (path, rows.but(17, **changed)):
        with pytest.raises(InputError, match=says) as refused:
            import_trace(store, source, name="trace", n_experts=N_EXPERTS)
        assert "row 17 (counted from 0)" in str(refused.value)
    assert _rows_in_store(store) == 0


def test_two_decisions_of_one_token_are_refused_with_both_rows(store: Store, random_trace: Any) -> None:
    rows = random_trace()
    table = pa.concat_tables([rows.table, rows.table.slice(11, 1)])
    with pytest.raises(InputError, match=r"two decisions .* in rows 11 and 60 \(counted from 0\)"):
        import_trace(store, table, name="trace", n_experts=N_EXPERTS)
    assert _rows_in_store(store) == 0


@pytest.mark.parametrize(
    ("column", "value"), [("label", "other"), ("token_id", 501), ("text", "?"), ("phase", "decode")]
)
def test_rows_that_disagree_on_a_token_or_sequence_are_refused(
    store: Store, random_trace: Any, column: str, value: Any
) -> None:
    rows = random_trace()
    number = next(n for n, row in enumerate(rows.rows) if row["phase"] == "prefill" and row["sequence_id"] == 0)
    with pytest.raises(InputError, match=f"two values of {column}"):
        import_trace(store, rows.but(number, **{column: value}), name="trace", n_experts=N_EXPERTS)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"experts": pa.array([1, 2])}, "experts .* holds BIGINT"),
        ({"experts": pa.array([["a"], ["b"]])}, "experts .* holds VARCHAR"),
        ({"position": pa.array([0.5, 1.5])}, "position .* holds DOUBLE"),
        ({"sequence_id": pa.array(["a", "b"])}, "sequence_id .* holds VARCHAR"),
        ({"weights": pa.array([["x"], ["y"]])}, "weights .* holds VARCHAR"),
    ],
)
def test_columns_of_a_wrong_type_are_refused(store: Store, columns: dict[str, Any], says: str) -> None:
    whole = {"sequence_id": [0, 1], "position": [0, 0], "layer": [0, 0], "experts": [[1], [2]], **columns}
    with pytest.raises(InputError, match=says):
        import_trace(store, pa.table(whole), name="trace", n_experts=N_EXPERTS)


def test_what_is_missing_is_named(store: Store, random_trace: Any, tmp_path: Path) -> None:
    rows = random_trace()
    with pytest.raises(InputError, match="lacks the columns layer"):
        import_trace(store, rows.table.drop_columns(["layer"]), name="trace", n_experts=N_EXPERTS)
    with pytest.raises(InputError, match=r"how many experts.*n_experts"):
        import_trace(store, rows.table, name="trace")
    with pytest.raises(InputError, match="holds no decisions"):
        import_trace(store, rows.table.slice(0, 0), name="trace", n_experts=N_EXPERTS)
    with pytest.raises(InputError, match="there is no file"):
        import_trace(store, tmp_path / "no.parquet", name="trace")
    np.savez(tmp_path / "a.npz", experts=np.zeros((2, 1), int), position=np.arange(2))
    with pytest.raises(InputError, match="lacks the arrays sequence_id, layer"):
        import_trace(store, tmp_path / "a.npz", name="trace", n_experts=2)
    with pytest.raises(InputError, match="no format 'tensorrt'"):
        import_trace(store, rows.table, name="trace", format="tensorrt")
    with pytest.raises(InputError, match="from a int"):
        import_trace(store, 5, name="trace")
    assert _rows_in_store(store) == 0


def test_files_that_are_damaged_or_of_another_kind_are_refused(store: Store, tmp_path: Path, random_trace: Any) -> None:
    whole = tmp_path / "whole.parquet"
    pq.write_table(random_trace().table, whole)
    raw = whole.read_bytes()
    for suffix in (".parquet", ".npz", ".npy", ".csv", ".json", ".jsonl", ".pt", ".pkl", ".xyz"):
        for number, content in enumerate((b"", raw[: len(raw) // 2], b"\xff\xfe\x00nonsense", b"a,b\n1,2\n")):
            path = tmp_path / f"bad{number}{suffix}"
            path.write_bytes(content)
            with pytest.raises(InputError):
                import_trace(store, path, name="trace", n_experts=N_EXPERTS)
    assert _rows_in_store(store) == 0


def test_arrays_of_objects_are_refused_unread(store: Store, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", experts=np.array([[1], [1, 2]], dtype=object), sequence_id=np.arange(2))
    with pytest.raises(InputError, match="Python objects"):
        import_trace(store, tmp_path / "a.npz", name="trace", n_experts=4)


def test_a_name_that_is_taken_is_refused_before_the_file_is_read(store: Store, random_trace: Any) -> None:
    import_trace(store, random_trace().table, name="trace", n_experts=N_EXPERTS)
    with pytest.raises(InputError, match="already has a run called 'trace'"):
        import_trace(store, Path("no-such-file.parquet"), name="trace")


def test_a_store_open_for_reading_takes_no_import(path: Path, random_trace: Any) -> None:
    Store(path).close()
    with Store(path, read_only=True) as store, pytest.raises((InputError, StoreError), match="reading only"):
        import_trace(store, random_trace().table, name="trace", n_experts=N_EXPERTS)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("step", ["tokens", "decisions", "loads", "ledger"])
def test_an_import_that_stops_at_any_step_leaves_nothing(
    store: Store, random_trace: Any, failure: type[BaseException], step: str
) -> None:
    def tell(name: str) -> None:
        if name == step:
            raise failure

    with pytest.raises(failure):
        import_trace(store, random_trace().table, name="trace", n_experts=N_EXPERTS, tell=tell)
    assert _rows_in_store(store) == 0
    assert import_trace(store, random_trace().table, name="trace", n_experts=N_EXPERTS).status == "complete"


_KILLED = """
import os, signal, sys
from moescope.store.importing.import_trace import import_trace
from moescope.store.store import Store

def tell(step):
    if step == sys.argv[3]:
        os.kill(os.getpid(), signal.SIGKILL)

with Store(sys.argv[1]) as store:
    import_trace(store, sys.argv[2], name="trace", n_experts=16, tell=tell)
"""


@pytest.mark.parametrize("step", ["decisions", "ledger"])
def test_an_import_that_is_killed_leaves_nothing(path: Path, tmp_path: Path, random_trace: Any, step: str) -> None:
    pq.write_table(random_trace((400, 300)).table, tmp_path / "trace.parquet")
    command = [sys.executable, "-c", _KILLED, str(path), str(tmp_path / "trace.parquet"), step]
    done = subprocess.run(command, timeout=120, check=False, env={**os.environ}, cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    with Store(path) as store:
        assert store.runs() == []
        assert _rows_in_store(store) == 0
