"""What is kept between requests, and what must not be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moescope.core.errors import InputError
from moescope.dashboard.answers import Answers
from moescope.dashboard.kept import Kept
from moescope.store.store import Store

ATLAS = {"analysis": "expert_atlas", "runs": ["planted"], "given": {"measure": "load", "other": "second"}}


@pytest.mark.parametrize(("status", "kept"), [("complete", True), ("aborted", True), ("running", False)])
def test_answers_of_a_run_that_is_being_written_are_made_anew(
    store_of: Callable[..., Store], Plan: Any, status: str, kept: bool
) -> None:
    store = store_of(Plan())
    store.connection.execute("UPDATE runs SET status = ?", [status])
    answers = Answers(store)
    ask = {"analysis": "load", "runs": ["planted"], "given": {}}
    before = answers.ask(ask)
    store.connection.execute("UPDATE loads SET tokens = tokens + 1 WHERE expert = 0")
    assert (answers.ask(ask).n == before.n) is kept


def test_an_answer_knows_a_run_that_a_parameter_names_by_its_id(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(), Plan(name="second", seed=1), Plan(name="third", seed=2))
    answers = Answers(store)
    first = answers.ask(ATLAS).df()["value"].tolist()
    assert answers.ask(ATLAS) is answers.ask(ATLAS)
    store.connection.execute("UPDATE runs SET name = 'gone' WHERE name = 'second'")
    store.connection.execute("UPDATE runs SET name = 'second' WHERE name = 'third'")
    assert answers.ask(ATLAS).df()["value"].tolist() != first
    store.connection.execute("UPDATE runs SET name = 'third' WHERE name = 'second'")
    with pytest.raises(InputError, match="second"):
        answers.ask(ATLAS)


def test_a_value_made_before_a_change_is_not_kept_after_it(store_of: Callable[..., Store], Plan: Any) -> None:
    run = store_of(Plan()).run("planted")
    kept: Kept[str] = Kept(4)

    def changed_meanwhile() -> str:
        kept.forget()
        return "old"

    assert kept.of(run, "key", changed_meanwhile) == "old"
    assert kept.of(run, "key", lambda: "new") == "new"
    assert kept.of(run, "key", lambda: "never") == "new"
