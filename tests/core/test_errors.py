"""Errors: the message carries its parts, the class carries the exit code."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.errors import IncompleteError, InputError, MoescopeError, RunError, StoreError


def test_message_says_problem_expected_found_and_fix_in_this_order() -> None:
    error = InputError("it is broken", expected="a whole one", found="half of it", fix="mend it")
    assert str(error) == "it is broken. Expected: a whole one. Found: half of it. What to do: mend it."


def test_parts_that_were_not_given_are_left_out() -> None:
    assert str(InputError("it is broken")) == "it is broken."
    assert str(InputError("it is broken", fix="mend it")) == "it is broken. What to do: mend it."


@pytest.mark.parametrize("end", [".", "?", "!"])
def test_sentences_that_end_get_no_second_full_stop(end: str) -> None:
    assert (
        str(InputError(f"broken{end}", fix=f"did you mean it{end}")) == f"broken{end} What to do: did you mean it{end}"
    )


def test_parts_stay_readable_for_programs() -> None:
    error = StoreError("p", expected="e", found="f", fix="x")
    assert (error.problem, error.expected, error.found, error.fix) == ("p", "e", "f", "x")


@given(st.text(min_size=1), st.text(min_size=1))
def test_nothing_given_is_lost(problem: str, found: str) -> None:
    message = str(RunError(problem, found=found))
    assert problem in message
    assert found in message


@pytest.mark.parametrize(
    ("kind", "code"), [(InputError, 2), (StoreError, 2), (IncompleteError, 3), (RunError, 4), (MoescopeError, 4)]
)
def test_exit_codes_are_those_of_the_command_line_contract(kind: type[MoescopeError], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, MoescopeError)


def test_a_store_error_can_be_caught_as_bad_input() -> None:
    with pytest.raises(InputError):
        raise StoreError("gone")
