"""The ledger: counted from the committed tables, every kind of gap told apart, the status follows from it."""

from __future__ import annotations

import pytest

from moescope.store.coverage import Expectation, settle
from moescope.store.ending import end_run
from moescope.store.run import Run
from moescope.store.store import Store

_TOKENS = "SELECT count(*) FROM tokens WHERE run_id = $run"
_ROUTER = "SELECT sum(len(experts)) FROM routing WHERE run_id = $run AND layer = $layer AND block = $block"


@pytest.fixture
def filled(store: Store, run: Run) -> Run:
    """Five tokens, and two decisions of each at L3 mlp."""
    other = store.begin_run(name="other")
    for owner, tokens in ((run, 5), (other, 100)):
        numbers = "FROM range(?) AS numbers(token)"
        insert_tokens = f"INSERT INTO tokens (run_id, token, sequence_id) SELECT ?, token, 0 {numbers}"
        insert_routing = (
            f"INSERT INTO routing (run_id, token, layer, block, experts) SELECT ?, token, 3, 'mlp', [1, 2] {numbers}"
        )
        for statement in (insert_tokens, insert_routing):
            store.connection.execute(statement, [owner.run_id, tokens])
    return run


def _ledger(run: Run) -> dict[str, tuple[int, int, str]]:
    return {row["site"]: (row["expected"], row["recorded"], row["status"]) for row in run.coverage.table.to_pylist()}


@pytest.mark.parametrize(
    ("expected", "status", "words"),
    [(5, "complete", None), (7, "short", "2 events are missing"), (2, "excess", "3 events too many")],
)
def test_count_of_the_table_decides(store: Store, filled: Run, expected: int, status: str, words: str | None) -> None:
    full = settle(store.connection, filled.run_id, [Expectation("tokens", expected, _TOKENS)])
    assert _ledger(filled) == {"tokens": (expected, 5, status)}
    assert full == (status == "complete")
    detail = filled.coverage.table["detail"][0].as_py()
    assert detail is None if words is None else words in detail


def test_site_that_never_fired_is_absent_with_what_to_do(store: Store, filled: Run) -> None:
    expectation = Expectation("blocks.4.mlp.hook_expert_indices", 10, _ROUTER, 4, "mlp")
    assert not settle(store.connection, filled.run_id, [expectation])
    row = filled.coverage.table.to_pylist()[0]
    assert (row["recorded"], row["status"]) == (0, "absent")
    assert "moescope doctor" in row["detail"]


def test_site_is_counted_at_its_own_layer_and_block(store: Store, filled: Run) -> None:
    places = [(3, "mlp", 10), (3, "attn", 10), (2, "mlp", 10)]
    expectations = [Expectation(f"{layer} {block}", n, _ROUTER, layer, block) for layer, block, n in places]
    settle(store.connection, filled.run_id, expectations)
    assert _ledger(filled) == {
        "3 mlp": (10, 10, "complete"),
        "3 attn": (10, 0, "absent"),
        "2 mlp": (10, 0, "absent"),
    }


def test_problem_makes_full_records_invalid(store: Store, filled: Run) -> None:
    expectation = Expectation("tokens", 5, _TOKENS, problem="some weights are NaN or infinite")
    assert not settle(store.connection, filled.run_id, [expectation])
    row = filled.coverage.table.to_pylist()[0]
    assert (row["status"], row["detail"]) == ("invalid", "some weights are NaN or infinite")


def test_nothing_expected_and_nothing_there_is_complete(store: Store, filled: Run) -> None:
    assert settle(
        store.connection, filled.run_id, [Expectation("heads", 0, "SELECT count(*) FROM heads WHERE run_id = $run")]
    )


def test_settling_again_replaces_the_ledger(store: Store, filled: Run) -> None:
    settle(store.connection, filled.run_id, [Expectation("old", 1, _TOKENS), Expectation("tokens", 1, _TOKENS)])
    settle(store.connection, filled.run_id, [Expectation("tokens", 5, _TOKENS)])
    assert _ledger(filled) == {"tokens": (5, 5, "complete")}


def test_ledger_shows_gaps_first_and_counts_them_in_its_title(store: Store, filled: Run) -> None:
    names = [Expectation(name, 5 if name != "m" else 6, _TOKENS) for name in ("a", "m", "z")]
    settle(store.connection, filled.run_id, names)
    assert filled.coverage.table["site"].to_pylist() == ["m", "a", "z"]
    assert filled.coverage.title.startswith("1 of 3 sites")
    settle(store.connection, filled.run_id, names[:1])
    assert "1 of 1 sites are full" in filled.coverage.title


def test_run_without_a_ledger_says_so(run: Run) -> None:
    assert "did not finish" in run.coverage.title
    assert run.coverage.incomplete


@pytest.mark.parametrize(
    ("expected", "failed", "status"),
    [(5, False, "complete"), (6, False, "incomplete"), (5, True, "failed"), (6, True, "failed")],
)
def test_status_follows_from_the_ledger_and_the_way_it_ended(
    store: Store, filled: Run, expected: int, failed: bool, status: str
) -> None:
    end_run(store, filled, [Expectation("tokens", expected, _TOKENS)], {"tokens": 5, "note": "ünï"}, failed=failed)
    info = filled.info
    assert (info["status"], info["summary"]) == (status, {"tokens": 5, "note": "ünï"})
    assert info["finished_at"] >= info["started_at"]
    assert filled.complete == (status == "complete")


def test_ledger_that_cannot_be_taken_leaves_the_run_running(store: Store, filled: Run) -> None:
    end_run(store, filled, [Expectation("x", 1, "SELECT count(*) FROM nowhere")], {}, failed=True)
    assert filled.status == "running"
    assert store.run("other").status == "running"
    store.begin_run(name="after")  # no transaction is left open
    assert {run.name for run in store.runs()} == {"base", "other", "after"}
