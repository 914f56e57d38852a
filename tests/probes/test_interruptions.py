"""Whatever ends a run early, what was committed is whole, the run says what it is, and the store opens again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
import torch

import moescope as ms
from moescope.probes import choices
from moescope.store import ending
from moescope.store.writer import RunWriter

LENGTHS = (7, 3, 12, 4, 9, 2, 5, 8)
TABLES = ("tokens", "routing", "experts", "loads", "residual", "sequences", "batches")


class Breaking(torch.nn.Module):
    """A module that raises when it is called for the n-th time."""

    def __init__(self, inner: torch.nn.Module, error: BaseException, at_call: int) -> None:
        super().__init__()
        self.inner, self.error, self.at_call, self.calls = inner, error, at_call, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at_call:
            raise self.error
        return self.inner(*args, **kwargs)


@pytest.fixture
def breaking(tiny_model: Callable[..., Any]) -> Callable[..., Any]:
    """`breaking(error, batch)`: a model that raises in the given 1-based batch of a recording, or with 0 in its first pass."""

    def make(error: BaseException, *, batch: int) -> Any:
        module = tiny_model("qwen3_moe")
        # Before the batches come three passes: one finds the routing rules, two compare the logits with and without taps.
        module.model.norm = Breaking(module.model.norm, error, batch + 3 if batch else 1)
        return module

    return make


def assert_whole_sequences(store: Any, name: str, sequences: int) -> None:
    """The first `sequences` of the corpus are there with every token, decision and residual; nothing else is."""
    run = store.run(name)
    lengths = store.fetch("SELECT n_tokens FROM sequences WHERE run_id = ? ORDER BY sequence_id", [run.run_id])
    assert [n for (n,) in lengths] == list(LENGTHS[:sequences])
    tokens = sum(LENGTHS[:sequences])
    query = "SELECT token, sequence_id FROM tokens WHERE run_id = ? ORDER BY token"
    expected = [number for number, length in enumerate(LENGTHS[:sequences]) for _ in range(length)]
    assert store.fetch(query, [run.run_id]) == list(enumerate(expected))
    assert run.rows("routing") == run.rows("residual") == 2 * tokens
    assert run.rows("residual_sequences") == 2 * sequences
    for table in ("experts", "loads"):
        ((total,),) = store.fetch(f"SELECT sum(tokens) FROM {table} WHERE run_id = ?", [run.run_id])
        assert (total or 0) == 2 * 2 * tokens
    ((total,),) = store.fetch("SELECT sum(tokens) FROM batches WHERE run_id = ?", [run.run_id])
    assert (total or 0) == tokens


def test_an_interrupt_in_batch_2_of_4_keeps_the_first_batch_and_is_raised_again(
    breaking: Callable[..., Any], store: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        record_ids(breaking(KeyboardInterrupt(), batch=2), token_ids(LENGTHS), batch_size=2)
    run = store.run("run")
    assert run.status == "incomplete"
    assert run.info["finished_at"] is not None
    assert run.info["summary"]["stopped"] == "interrupted"
    assert run.info["summary"]["sequences"] == 2
    assert_whole_sequences(store, "run", 2)
    ledger = {row["site"]: row for row in run.coverage.table.to_pylist()}
    assert ledger["documents"]["status"] == "short"
    assert "interrupted" in ledger["documents"]["detail"]
    assert (ledger["documents"]["expected"], ledger["documents"]["recorded"]) == (8, 2)
    path = store.path
    store.close()
    with ms.Store(path) as reopened:
        assert [(r.name, r.status) for r in reopened.runs()] == [("run", "incomplete")]
        assert_whole_sequences(reopened, "run", 2)


def test_an_interrupt_in_the_first_pass_leaves_no_run(
    breaking: Callable[..., Any], store: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        record_ids(breaking(KeyboardInterrupt(), batch=0), token_ids(LENGTHS))
    assert store.runs() == []


@pytest.mark.parametrize("batch", [1, 3])
def test_a_model_that_fails_gives_a_run_error_and_a_failed_run(
    batch: int,
    breaking: Callable[..., Any],
    store: Any,
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 1)
    cause = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(ms.RunError, match=r"the model failed.*mat1 and mat2") as failed:
        record_ids(breaking(cause, batch=batch), token_ids(LENGTHS), batch_size=2)
    assert failed.value.exit_code == 4
    assert failed.value.__cause__ is cause
    run = store.run("run")
    assert run.status == "failed"
    assert "mat1 and mat2" in run.info["summary"]["stopped"]
    assert_whole_sequences(store, "run", 2 * (batch - 1))


def test_a_model_that_fails_in_its_first_pass_gives_a_run_error_too(
    breaking: Callable[..., Any], store: Any, token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(ms.RunError, match="mat1 and mat2"):
        record_ids(breaking(RuntimeError("mat1 and mat2"), batch=0), token_ids(LENGTHS))
    assert [run.status for run in store.runs()] in ([], ["failed"])


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_running_out_of_memory_says_to_lower_the_batch_size(
    error: type[Exception],
    batch: int,
    breaking: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    with pytest.raises(ms.RunError, match="lower batch_size"):
        record_ids(breaking(error(), batch=batch), token_ids(LENGTHS), batch_size=2)


def test_a_full_disk_is_said_to_be_full(
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second of four transactions the disk fills up in the middle: the first stays whole."""
    plain, inserts = RunWriter._insert, []

    def filling(self: Any, name: str, rows: Any) -> None:
        inserts.append(name)
        if inserts.count("residual") == 2:
            raise duckdb.IOException('IO Error: Could not write file "runs.duckdb": No space left on device')
        plain(self, name, rows)

    monkeypatch.setattr(RunWriter, "_insert", filling)
    monkeypatch.setitem(RunWriter.__init__.__kwdefaults__, "chunk_rows", 1)
    with pytest.raises(ms.RunError, match="disk is full") as failed:
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=2)
    assert failed.value.exit_code == 4
    assert store.run("run").status == "failed"
    assert_whole_sequences(store, "run", 2)


class Refusing:
    """A connection on which COMMIT fails as DuckDB's does: the transaction is rolled back and gone."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def execute(self, query: str, *parameters: Any) -> Any:
        if query == "COMMIT":
            self.connection.execute("ROLLBACK")
            raise duckdb.TransactionException(
                "TransactionContext Error: Failed to commit: Could not write file: No space left on device"
            )
        return self.connection.execute(query, *parameters)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)


def test_a_disk_that_is_full_at_commit_is_said_to_be_full(
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Seen on a real full disk: small chunks fit in memory and only the commit writes."""
    plain = RunWriter.__init__

    def refusing(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self._cursor = Refusing(self._cursor)

    monkeypatch.setattr(RunWriter, "__init__", refusing)
    with pytest.raises(ms.RunError, match="disk is full") as failed:
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=2)
    assert failed.value.exit_code == 4
    assert store.run("run").status == "failed"
    assert_whole_sequences(store, "run", 0)


def test_a_store_can_be_recorded_into_again_after_a_run_whose_end_could_not_be_written(
    store: Any,
    breaking: Callable[..., Any],
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    def full(*_args: Any) -> bool:
        raise duckdb.IOException("No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ending, "settle", full)
        with pytest.raises(ms.RunError, match="mat1"):
            record_ids(breaking(RuntimeError("mat1"), batch=2), token_ids(LENGTHS), name="broken", batch_size=2)
    assert store.run("broken").status in ("running", "failed")
    assert record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), name="good").status == "complete"
    path = store.path
    store.close()
    with ms.Store(path) as reopened:
        assert reopened.run("broken").status in ("incomplete", "failed")
        assert reopened.run("good").status == "complete"


def test_a_fault_while_rows_are_made_ends_the_run_with_its_cause(
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the writing thread: nothing is lost without a word, and the recording thread does not wait for ever."""
    from moescope.probes.recorders.residual import ResidualProbe

    def failing(self: Any, host: Any, records: Any) -> None:
        raise ZeroDivisionError("in rows")

    monkeypatch.setattr(ResidualProbe, "rows", failing)
    with pytest.raises(ms.RunError, match="ZeroDivisionError: in rows"):
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=1)
    assert store.run("run").status == "failed"
    assert all(store.run("run").rows(table) == 0 for table in TABLES)


def test_a_disk_without_room_is_refused_before_a_run_begins(
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr(choices.shutil, "disk_usage", lambda _path: free)
    with pytest.raises(ms.RunError, match="no room on the disk"):
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS))
    assert store.runs() == []


def test_a_name_that_is_taken_is_refused_and_nothing_changes(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS))

    def everything() -> list[Any]:
        return [store.fetch(f"SELECT * FROM {table} ORDER BY ALL") for table in ("runs", "coverage", "layers", *TABLES)]

    before = everything()
    with pytest.raises(ms.InputError, match="already has a run called 'run'") as refused:
        record_ids(tiny_model("llama"), token_ids((3,)))
    assert refused.value.exit_code == 2
    assert "--name" in str(refused.value)
    assert everything() == before


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_refused(
    name: str, store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(ms.InputError, match="needs a name"):
        record_ids(tiny_model("llama"), token_ids((3,)), name=name)
    assert store.runs() == []


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"max_length": 1}, {"max_length": 0}])
def test_sizes_that_make_no_sense_are_refused(
    options: dict[str, int],
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    with pytest.raises(ms.InputError, match="at least"):
        record_ids(tiny_model("llama"), token_ids((3,)), **options)
    assert store.runs() == []


@pytest.mark.parametrize("probe", ["routing", "experts"])
def test_a_dense_model_refuses_probes_of_routers(
    probe: str,
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    with pytest.raises(ms.InputError, match=f"nothing for the probe {probe}.*is dense"):
        record_ids(tiny_model("llama"), token_ids((3,)), probes=(probe,))
    assert store.runs() == []
    run = record_ids(tiny_model("llama"), token_ids((3,)))
    assert run.info["settings"]["probes"] == ["residual", "tokens"]


def test_an_unknown_probe_is_refused_with_those_there_are(
    tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    with pytest.raises(ms.InputError, match=r"routng.*experts.*residual.*routing, tokens.*did you mean 'routing'"):
        record_ids(tiny_model("qwen3_moe"), token_ids((3,)), probes=("routng",))


@pytest.mark.parametrize(
    ("probes", "filled"),
    [
        ((), {"tokens", "sequences", "batches"}),
        (("routing",), {"tokens", "sequences", "batches", "routing", "loads"}),
        (("experts",), {"tokens", "sequences", "batches", "experts"}),
        (("residual", "residual"), {"tokens", "sequences", "batches", "residual"}),
    ],
)
def test_only_the_probes_asked_for_are_recorded(
    probes: tuple[str, ...],
    filled: set[str],
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
) -> None:
    run = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), probes=probes)
    assert run.status == "complete"
    assert {table for table in TABLES if run.rows(table)} == filled


def test_texts_need_a_tokenizer_and_token_ids_do_not(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    model = ms.load(tiny_model("qwen3_moe"))
    with pytest.raises(ms.InputError, match=r"no tokenizer.*Corpus\.from_token_ids"):
        ms.record(model, ["a text"], store, name="texts", progress=False)
    assert store.runs() == []
    run = record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS))
    assert run.status == "complete"
    assert run.rows("vocabulary") == 0
    assert store.fetch("SELECT DISTINCT class FROM tokens") == [(None,)]


def test_a_store_open_for_reading_is_refused(
    tmp_path: Path, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    path = tmp_path / "other.duckdb"
    ms.Store(path).close()
    with ms.Store(path, read_only=True) as reading, pytest.raises(ms.InputError, match="reading only"):
        record_ids(tiny_model("llama"), token_ids((3,)), store=reading)


def test_a_closed_store_is_refused(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    store.close()
    with pytest.raises(ms.StoreError, match="is closed"):
        record_ids(tiny_model("llama"), token_ids((3,)))


def test_recording_leaves_the_stores_settings_as_they_were(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    store.connection.execute("SET memory_limit = '1234MB'")

    def settings() -> dict[str, str]:
        return dict(store.fetch("SELECT name, value FROM duckdb_settings()"))

    before = settings()
    record_ids(tiny_model("llama"), token_ids((3,)))
    assert settings() == before


def test_a_store_with_a_locked_configuration_can_be_recorded_into(
    store: Any, tiny_model: Callable[..., Any], token_ids: Callable[..., Any], record_ids: Callable[..., Any]
) -> None:
    """As the dashboard opens it."""
    store.connection.execute("SET lock_configuration = true")
    assert record_ids(tiny_model("llama"), token_ids((3,))).status == "complete"


def test_a_fatal_error_of_the_store_is_a_run_error(
    store: Any,
    tiny_model: Callable[..., Any],
    token_ids: Callable[..., Any],
    record_ids: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After a fatal error DuckDB refuses every further statement, whatever it is."""

    class Invalidated:
        def __init__(self, connection: Any) -> None:
            self.connection, self.dead = connection, False

        def execute(self, query: str, *parameters: Any) -> Any:
            if self.dead or "routing" in query:
                self.dead = True
                raise duckdb.FatalException(
                    "FATAL Error: database has been invalidated because of a previous fatal error"
                )
            return self.connection.execute(query, *parameters)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.connection, name)

    plain = RunWriter.__init__

    def invalidated(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self._cursor = Invalidated(self._cursor)

    monkeypatch.setattr(RunWriter, "__init__", invalidated)
    with pytest.raises(ms.RunError, match="invalidated"):
        record_ids(tiny_model("qwen3_moe"), token_ids(LENGTHS), batch_size=2)
    assert store.run("run").status == "failed"
