"""The writer: a chunk is there whole or not at all, errors are heard, totals are right after every chunk."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.core.errors import InputError, RunError
from moescope.store.run import Run
from moescope.store.store import Store
from moescope.store.totals import ExpertPartial, LoadPartial
from moescope.store.writer import BatchRecords, RunWriter

TOKENS, EXPERTS = 10, 3


def _batch(number: int, *, tokens: int = TOKENS) -> BatchRecords:
    """One batch: a sequence of `tokens` tokens, each taking expert (its number modulo 3) with weight 1/8."""
    token = np.arange(number * tokens, (number + 1) * tokens)
    chosen = token % EXPERTS
    count = np.bincount(chosen, minlength=EXPERTS)
    peak = np.array([(token[chosen == e] % 7).max(initial=0) for e in range(EXPERTS)], np.float32)
    first = [int(token[(chosen == e) & (token % 7 == peak[e])].min()) for e in range(EXPERTS)]
    routing = {
        "token": token, "layer": np.zeros(tokens, np.uint16), "block": ["mlp"] * tokens,
        "experts": pa.array([[int(e)] for e in chosen], pa.list_(pa.uint16())),
        "weights": pa.array([[0.125]] * tokens, pa.list_(pa.float32())),
    }  # fmt: skip
    label = "even" if number % 2 == 0 else "odd"
    return BatchRecords(
        number, (number, 1, tokens),
        {"tokens": pa.table({"token": token, "sequence_id": np.full(tokens, number)}), "routing": pa.table(routing)},
        [LoadPartial(0, "mlp", label, "prefill", count, count / 8)],
        [ExpertPartial(
            0, "mlp", count, count / 8, count / 2, count / 16, peak, np.array([0, 1, 2]), np.array(first),
            16 * count, 4 * count, count,
        )],
    )  # fmt: skip


def _bad(number: int) -> BatchRecords:
    """A batch whose last table cannot be written."""
    records = _batch(number)
    records.tables["sequences"] = pa.table({"sequence_id": ["not a number"]})
    return records


def _write(store: Store, run: Run, batches: list[Callable[[], BatchRecords]], **limits: Any) -> None:
    writer = RunWriter(store, run.run_id, **limits)
    for make in batches:
        writer.submit(make)
    writer.close()


def _good(count: int) -> list[Callable[[], BatchRecords]]:
    return [lambda n=n: _batch(n) for n in range(count)]


def _rows(run: Run, table: str) -> list[tuple[Any, ...]]:
    return sorted(run.table(table).fetchall(), key=repr)


@pytest.fixture
def runs(store: Store) -> Callable[[], Run]:
    numbers = iter(range(100))
    return lambda: store.begin_run(name=f"run {next(numbers)}")


def test_everything_submitted_is_in_the_store_once(store: Store, run: Run) -> None:
    _write(store, run, _good(5))
    assert sorted(t for (t,) in run.table("tokens").select("token").fetchall()) == list(range(50))
    assert run.rows("routing") == 50
    assert _rows(run, "batches") == [(n, n, 1, TOKENS) for n in range(5)]


def test_totals_equal_a_count_of_the_routing_rows(store: Store, run: Run) -> None:
    _write(store, run, _good(6), chunk_rows=25)
    counted = store.fetch(
        """
        SELECT if((token // 10) % 2 = 0, 'even', 'odd') AS label, expert, count(*)
        FROM (SELECT token, unnest(experts) AS expert FROM routing WHERE run_id = ?)
        GROUP BY label, expert
        """,
        [run.run_id],
    )
    loads = run.table("loads").select("label, expert, tokens").fetchall()
    assert sorted(loads) == sorted(counted)
    for _, expert, tokens, weight, norm, weighted, peak, channel, token, *_ in (
        row[1:] for row in _rows(run, "experts")
    ):
        mine = [t for t in range(60) if t % EXPERTS == expert]
        assert tokens == len(mine)
        assert (weight, norm, weighted) == (len(mine) / 8, 0.5, len(mine) / 16)
        assert peak == max(t % 7 for t in mine)
        assert token == min(t for t in mine if t % 7 == peak)
        assert channel == expert


def test_every_cut_into_chunks_gives_the_same_rows(store: Store, runs: Callable[[], Run]) -> None:
    written = []
    for limits in ({}, {"chunk_rows": 1}, {"chunk_rows": 25}, {"chunk_seconds": 0.0}):
        run = runs()
        _write(store, run, _good(7), **limits)
        tables = ("tokens", "routing", "loads", "experts", "load_partials", "expert_partials", "batches")
        written.append({table: _rows(run, table) for table in tables})
    assert all(written)
    assert written[1:] == written[:-1]


def test_partials_of_batches_sum_to_the_totals(store: Store, run: Run) -> None:
    _write(store, run, _good(5), chunk_rows=1)
    loads = run.table("loads").filter("tokens > 0").select("label, expert, tokens, weight_sum").fetchall()
    summed = run.sql(
        "SELECT label, expert, sum(tokens)::BIGINT, sum(weight_sum) FROM load_partials WHERE run_id = $run GROUP BY label, expert"
    ).fetchall()
    assert sorted(loads) == sorted(summed)
    assert run.rows("load_partials") == 5 * EXPERTS


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited 20 s"
        time.sleep(0.005)


def test_totals_are_those_of_the_batches_committed_after_every_chunk(store: Store, run: Run) -> None:
    writer = RunWriter(store, run.run_id, chunk_rows=1)
    for number in range(4):
        writer.submit(lambda n=number: _batch(n))
        _until(lambda done=number + 1: writer.committed_batches == done)
        expected = [sum(t % EXPERTS == e for t in range((number + 1) * TOKENS)) for e in range(EXPERTS)]
        for table in ("loads", "experts"):
            query = f"SELECT sum(tokens) FROM {table} WHERE run_id = $run GROUP BY expert ORDER BY expert"
            assert [int(n) for (n,) in run.sql(query).fetchall()] == expected
    writer.close()


def _unlike(number: int) -> BatchRecords:
    """A batch whose `routing` has other columns than that of the batches before: no error of the database."""
    records = _batch(number)
    records.tables["routing"] = records.tables["routing"].drop_columns("weights")
    return records


@pytest.mark.parametrize("broken", [_bad, _unlike])
def test_error_in_the_middle_of_a_chunk_leaves_none_of_it(
    store: Store, run: Run, broken: Callable[[int], BatchRecords]
) -> None:
    with pytest.raises(RunError):
        _write(store, run, [*_good(2), lambda: broken(2)])
    for table in ("tokens", "routing", "sequences", "batches", "loads", "experts", "load_partials", "expert_partials"):
        assert run.rows(table) == 0, table


def test_chunks_before_the_error_stay_whole(store: Store, run: Run) -> None:
    with pytest.raises(RunError):
        _write(store, run, [*_good(3), lambda: _bad(3), lambda: _batch(4)], chunk_rows=2 * TOKENS)
    assert _rows(run, "batches") == [(0, 0, 1, TOKENS), (1, 1, 1, TOKENS)]
    assert (run.rows("tokens"), run.rows("routing")) == (2 * TOKENS, 2 * TOKENS)
    assert sum(int(n) for (n,) in run.table("loads").select("tokens").fetchall()) == 2 * TOKENS


def test_error_is_raised_by_a_later_submit(store: Store, run: Run) -> None:
    writer = RunWriter(store, run.run_id, chunk_rows=1)
    writer.submit(lambda: _bad(0))

    def keep_on() -> None:
        for _ in range(1000):
            writer.submit(lambda: _batch(1))

    with pytest.raises(RunError, match="could not be written"):
        keep_on()
    with pytest.raises(RunError):
        writer.close()


def _fails(error: Exception) -> Callable[[], BatchRecords]:
    def make() -> BatchRecords:
        raise error

    return make


def test_error_while_making_rows_says_what_it_was(store: Store, run: Run) -> None:
    with pytest.raises(RunError, match=r"ValueError: id 99 is no expert") as raised:
        _write(store, run, [*_good(1), _fails(ValueError("id 99 is no expert"))])
    assert isinstance(raised.value.__cause__, ValueError)


def test_error_of_ours_passes_as_it_is(store: Store, run: Run) -> None:
    with pytest.raises(InputError, match="not this one"):
        _write(store, run, [_fails(InputError("not this one"))])


def test_full_disk_is_told_as_such(store: Store, run: Run) -> None:
    import duckdb

    with pytest.raises(RunError, match=r"the disk is full.*free some space"):
        _write(store, run, [_fails(duckdb.IOException("Could not write: No space left on device"))])


def test_store_can_be_used_after_a_failed_writer(store: Store, runs: Callable[[], Run]) -> None:
    with pytest.raises(RunError):
        _write(store, runs(), [lambda: _bad(0)])
    second = runs()
    _write(store, second, _good(2))
    assert second.rows("tokens") == 2 * TOKENS


def test_writer_without_batches_closes_quietly(store: Store, run: Run) -> None:
    _write(store, run, [])
    assert run.rows("batches") == 0


def test_batch_without_rows_of_its_own_is_written_too(store: Store, run: Run) -> None:
    _write(store, run, [lambda: BatchRecords(0, (0, 1, 0)), lambda: _batch(1)])
    assert run.rows("batches") == 2


def test_readers_see_whole_chunks_only(store: Store, run: Run) -> None:
    torn: list[tuple[Any, ...]] = []
    seen: set[int] = set()
    done = threading.Event()

    def watch() -> None:
        query = """
            SELECT (SELECT count(*) FROM tokens WHERE run_id = $run), (SELECT count(*) FROM routing WHERE run_id = $run),
                (SELECT coalesce(sum(tokens), 0) FROM batches WHERE run_id = $run),
                (SELECT coalesce(sum(tokens), 0) FROM loads WHERE run_id = $run)
        """
        while not done.is_set():
            counts = store.fetch(query, {"run": run.run_id})[0]
            seen.add(int(counts[0]))
            if len(set(map(int, counts))) != 1:
                torn.append(counts)

    reader = threading.Thread(target=watch)
    reader.start()
    _write(store, run, _good(30), chunk_rows=3 * TOKENS)
    done.set()
    reader.join()
    assert torn == []
    assert seen <= set(range(0, 301, 3 * TOKENS))
    assert seen


def test_submit_waits_while_several_batches_wait(store: Store, run: Run) -> None:
    """Memory is bounded: a writer that is stuck stops the recording."""
    release, taken = threading.Event(), []

    def slow() -> BatchRecords:
        release.wait(20)
        return _batch(0)

    writer = RunWriter(store, run.run_id)
    writer.submit(slow)

    def fill() -> None:
        for number in range(1, 20):
            writer.submit(lambda n=number: _batch(n))
            taken.append(number)

    filler = threading.Thread(target=fill)
    filler.start()
    filler.join(0.6)
    stuck = len(taken)
    release.set()
    filler.join(20)
    writer.close()
    assert stuck < 10
    assert len(taken) == 19
    assert run.rows("batches") == 20
