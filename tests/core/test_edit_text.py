"""Edits as lines: what is written is read back as it was, whatever the kind."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moescope.core.edit import Edit, edits
from moescope.core.edit_kinds.experts import Ablate
from moescope.core.edit_text import read_edit, write_edit
from moescope.core.edit_values import field_types
from moescope.core.errors import InputError

_WHOLE = st.integers(0, 300)
_REAL = st.floats(-1e6, 1e6, allow_nan=False)
_WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
_POSITIONS = st.sampled_from(["all", "prompt", "generated", "0:1", "3:", "token:13"])


def _values(hint: Any) -> st.SearchStrategy[Any]:
    """Values a field of this type may have."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin in (tuple, Sequence):
        return st.lists(_values(arguments[0]), min_size=1, max_size=6, unique=True).map(tuple)
    if arguments:
        return st.one_of([st.none() if one is type(None) else _values(one) for one in arguments])
    return {int: _WHOLE, float: _REAL, bool: st.booleans(), str: _WORDS}[hint]


@st.composite
def _edits(draw: st.DrawFn, kind: type[Edit]) -> Edit:
    """An edit with some of its fields given."""
    given_fields: dict[str, Any] = {}
    for field, hint in field_types(kind).items():
        if field == "means":
            continue
        default = {f.name: f.default for f in dataclasses.fields(kind)}[field]
        if default in ((), "") or draw(st.booleans()):
            given_fields[field] = draw(_POSITIONS if field == "positions" else _values(hint))
    try:
        return kind(**given_fields)
    except InputError:  # values that do not go together
        assume(False)
        raise


@pytest.mark.parametrize("kind", [kind for kind in edits if kind.kind != "mix_routing"], ids=lambda kind: kind.kind)
def test_an_edit_written_as_a_line_is_read_back_as_it_was(kind: type[Edit]) -> None:
    @given(_edits(kind))
    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    def holds(edit: Edit) -> None:
        line = write_edit(edit)
        assert read_edit(line) == edit
        assert write_edit(read_edit(line)) == line

    holds()


@pytest.mark.parametrize(
    ("given_line", "written"),
    [
        ("ablate experts=1,2,3,7 layer=3", "ablate layer=3 experts=1-3,7"),
        ("keep experts=3,2,1", "keep experts=3,2,1"),
        ("skip layer=4, strength=0.5 part=mlp", "skip layer=4, part=mlp strength=0.5"),
        ("mix_routing layer=0 reference=0.25,0.75 share=1", "mix_routing layer=0 reference=0.25,0.75 share=1.0"),
        ("splice layer=1 sae='my own; \"sae\"'", "splice layer=1 sae='my own; \"sae\"'"),
    ],
)
def test_lines_have_one_spelling(given_line: str, written: str) -> None:
    assert write_edit(read_edit(given_line)) == written
    assert read_edit(written) == read_edit(given_line)


def test_vectors_of_several_experts_have_no_line() -> None:
    with pytest.raises(InputError, match="JSON"):
        write_edit(Ablate(layer=0, experts=[0, 1], how="mean", means=[[0.5, 1.0], [0.0, 2.0]]))


@pytest.mark.parametrize("experts", ["0-99999", "0-9999999", "0-50000,60000-110000"])
def test_a_range_that_would_fill_the_memory_is_refused(experts: str) -> None:
    with pytest.raises(InputError, match="fewer than 100,000 numbers"):
        read_edit(f"ablate layer=3 experts={experts}")


def test_numbers_of_more_digits_than_a_range_takes_are_never_counted_out() -> None:
    with pytest.raises(InputError):
        read_edit("ablate layer=3 experts=0-99999999999")
    assert len(read_edit("ablate layer=3 experts=0-99998").as_data()["experts"]) == 99_999
