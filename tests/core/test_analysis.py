"""Analyses: parameters read from signatures, runs and records checked, results completed with where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moescope.core.analysis import Analysis, Count, Natural, Parameter
from moescope.core.errors import IncompleteError, InputError
from moescope.core.result import Result

Pool = Literal["model", "layer", "label"]


@dataclass
class FakeRun:
    """A run that has only what the registry asks for."""

    name: str = "base"
    complete: bool = True
    tables: Mapping[str, int] = field(default_factory=lambda: {"routing": 3, "loads": 3})

    @property
    def provenance(self) -> Mapping[str, Any]:
        return {"run": self.name, "model": "demo"}

    def rows(self, table: str) -> int:
        return self.tables.get(table, 0)


def _result() -> Result:
    import plotly.graph_objects as go

    table = pa.table({"metric": ["m"], "value": [1.0]})
    return Result(title="t", table=table, definition="d", units={}, n=5, n_unit="tokens", draw=lambda _: go.Figure())


def consistency(
    run: FakeRun,
    *,
    segment: int = 16,
    share: float = 0.5,
    pool: Pool = "model",
    label: str | None = None,
    deep: bool = False,
    top: int | None = None,
) -> Result:
    """How long do experts stay?"""
    return _result()


def difference(run: FakeRun, other: FakeRun) -> Result:
    """What changed?"""
    return _result()


ONE = Analysis("consistency", consistency, 1, ("routing",), "a paper", "routing", 10)
TWO = Analysis("difference", difference, 2, ("routing", "loads"), "a paper", "comparison", 10)


def _parsed(**given: Any) -> Mapping[str, Any]:
    return ONE([FakeRun()], given).parameters


def test_parameters_are_the_keyword_only_ones_with_types_and_defaults() -> None:
    defaults = {name: p.default for name, p in ONE.parameters.items()}
    assert defaults == {"segment": 16, "share": 0.5, "pool": "model", "label": None, "deep": False, "top": None}
    assert ONE.parameters["pool"].describe() == "'model' or 'layer' or 'label'"
    assert ONE.parameters["label"].describe() == "text or none"
    assert ONE.summary == "How long do experts stay?"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("segment", "8", 8),
        ("segment", "-3", -3),
        ("share", "0.25", 0.25),
        ("share", "1", 1.0),
        ("share", "1e-3", 0.001),
        ("pool", "layer", "layer"),
        ("label", "french", "french"),
        ("label", None, None),
        ("top", "none", None),
        ("top", "7", 7),
        ("deep", "true", True),
        ("deep", "False", False),
    ],
)
def test_text_from_the_command_line_becomes_the_annotated_type(name: str, text: str, value: Any) -> None:
    found = _parsed(**{name: text})[name]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("segment", "eight"), ("segment", "8.5"), ("segment", 8.5), ("segment", True), ("segment", None), ("segment", ""),
        ("segment", "inf"), ("segment", "nan"), ("segment", math.inf), ("segment", "1e400"), ("segment", [8]),
        ("share", "half"), ("share", None), ("share", False), ("share", [1.0]),
        ("pool", "expert"), ("pool", "Model"), ("pool", None), ("pool", 3),
        ("label", 7), ("deep", "yes"), ("deep", 1), ("deep", None),
    ],
)  # fmt: skip
def test_value_of_the_wrong_kind_is_refused_with_what_is_expected(name: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        _parsed(**{name: value})
    assert f"parameter {name!r} cannot be {value!r}" in str(refused.value)
    assert ONE.parameters[name].describe() in str(refused.value)


@given(st.integers(-(2**70), 2**70))
def test_every_whole_number_comes_through_exactly(number: int) -> None:
    assert Parameter("n", int, 0).parse(number) == number
    assert Parameter("n", int, 0).parse(str(number)) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_number_comes_through_exactly(number: float) -> None:
    assert Parameter("x", float, 0.0).parse(repr(number)) == number


@given(st.text())
def test_any_text_is_a_number_or_refused(text: str) -> None:
    try:
        found = Parameter("n", int, 0).parse(text)
    except InputError:
        return
    assert int(text) == found if not set(text) & set(".eE") else float(text) == found


@given(st.text())
def test_text_comes_through_unchanged(text: str) -> None:
    assert Parameter("label", str, "").parse(text) == text


@given(st.one_of(st.text(), st.integers(), st.none(), st.booleans()))
def test_literal_takes_its_choices_and_nothing_else(value: Any) -> None:
    parameter = Parameter("k", Literal["a", 4, "b"], "a")
    if value in ("a", "b", 4, "4") and not isinstance(value, bool):
        assert parameter.parse(value) in ("a", "b", 4)
    else:
        with pytest.raises(InputError):
            parameter.parse(value)


def test_literal_of_numbers_does_not_take_a_truth_value() -> None:
    with pytest.raises(InputError):
        Parameter("k", Literal[1, 2], 1).parse(True)


def test_unknown_parameter_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InputError) as refused:
        _parsed(segmant=8)
    assert "consistency has no parameter 'segmant'" in str(refused.value)
    for words in ("segment: a whole number (default 16)", "pool: 'model' or", "label: text or none (default None)"):
        assert words in str(refused.value)


def test_analysis_without_parameters_says_so() -> None:
    with pytest.raises(InputError, match="no parameters"):
        TWO([FakeRun(), FakeRun("other")], {"x": 1})


def test_result_names_every_parameter_given_or_not() -> None:
    assert _parsed(segment="8") == {
        "segment": 8,
        "share": 0.5,
        "pool": "model",
        "label": None,
        "deep": False,
        "top": None,
    }


def test_result_is_completed_with_name_source_and_provenance() -> None:
    result = ONE([FakeRun()], {})
    assert (result.name, result.source, result.incomplete) == ("consistency", "a paper", False)
    assert result.provenance == {"run": "base", "model": "demo"}


def test_comparison_names_both_runs() -> None:
    result = TWO([FakeRun("base"), FakeRun("cut")], {})
    assert result.provenance["run"] == "base → cut"
    assert [facts["run"] for facts in result.provenance["runs"]] == ["base", "cut"]


@pytest.mark.parametrize(("analysis", "runs"), [(ONE, 0), (ONE, 2), (TWO, 1), (TWO, 3)])
def test_wrong_number_of_runs_is_refused(analysis: Analysis, runs: int) -> None:
    with pytest.raises(InputError, match=rf"{analysis.name} compares {analysis.runs} run"):
        analysis([FakeRun()] * runs, {})


def test_missing_records_name_the_table_the_run_and_the_probe_that_writes_them() -> None:
    with pytest.raises(InputError) as refused:
        TWO([FakeRun("base"), FakeRun("bare", tables={"routing": 5})], {})
    message = str(refused.value)
    assert "run 'bare'" in message
    assert "rows in loads" in message
    assert message.rstrip(".").endswith("routing"), "loads come from the probe `routing`"


@pytest.mark.parametrize(
    ("table", "probe"),
    [("loads", "routing"), ("sequences", "tokens"), ("residual_sequences", "residual"), ("heads", "attention")]
    + [(same, same) for same in ("tokens", "routing", "experts", "residual", "router_logits", "expert_outputs")],
)
def test_probe_named_for_a_table_is_the_one_that_writes_it(table: str, probe: str) -> None:
    analysis = Analysis("any", consistency, 1, (table,), "s", None, 1)
    with pytest.raises(InputError) as refused:
        analysis([FakeRun(tables={})], {})
    assert (refused.value.fix or "").endswith(f": {probe}")


@pytest.mark.parametrize(
    ("name", "tables", "told"),
    [
        ("effects", ("effects",), "intervene effect (one), intervene sweep (many) or sae steer (doses)"),
        ("sae_quality", ("sae_measures",), "moescope sae judge"),
        ("feature_association", ("sae_measures",), "moescope sae read"),
        ("expert_sparsity_routing", ("sae_measures",), "moescope sae experts --sparsity"),
        ("neurons_against_sae", ("features", "sae_measures"), "moescope sae experts --neurons"),
        ("top_features", ("features", "feature_contexts", "sae_measures"), "moescope sae read"),
        ("head_circuit", ("heads",), "moescope sae circuit"),
        ("head_map", ("heads",), "moescope phenomena MODEL"),
    ],
)
def test_command_named_for_an_analysis_is_the_one_that_writes_what_it_reads(
    name: str, tables: tuple[str, ...], told: str
) -> None:
    with pytest.raises(InputError) as refused:
        Analysis(name, consistency, 1, tables, "s", None, 1)([FakeRun(tables={})], {})
    assert told in (refused.value.fix or "")


def test_incomplete_run_is_refused_with_the_way_to_have_it_anyway() -> None:
    with pytest.raises(IncompleteError, match=r"'base' is not complete.*allow_incomplete=True"):
        ONE([FakeRun(complete=False)], {})


def test_incomplete_run_that_is_allowed_marks_result_and_figure() -> None:
    result = ONE([FakeRun(complete=False)], {}, allow_incomplete=True)
    assert result.incomplete
    assert "INCOMPLETE RUN" in result.subtitle()
    assert "INCOMPLETE RUN" in result.figure().layout.title.subtitle.text


def test_one_incomplete_run_of_two_marks_the_comparison() -> None:
    assert TWO([FakeRun(), FakeRun("cut", complete=False)], {}, allow_incomplete=True).incomplete
    assert not TWO([FakeRun(), FakeRun("cut")], {}).incomplete


def test_figure_of_a_complete_run_is_not_marked() -> None:
    assert "INCOMPLETE" not in ONE([FakeRun()], {}).figure().layout.title.subtitle.text


def counted(run: FakeRun, *, draws: Count = 100, contexts: Natural = 5, top: Count | None = None) -> Result:
    """How many?"""
    return _result()


COUNTED = Analysis("counted", counted, 1, (), "s", None, 1)


@pytest.mark.parametrize(("name", "value"), [("draws", 1), ("contexts", 0), ("draws", "1"), ("top", None), ("top", 1)])
def test_smallest_value_of_a_count_is_taken(name: str, value: Any) -> None:
    assert COUNTED([FakeRun()], {name: value}).parameters[name] == (int(value) if value is not None else None)


@pytest.mark.parametrize(
    ("name", "value", "least"), [("draws", 0, 1), ("draws", "-7", 1), ("contexts", -1, 0), ("top", 0, 1)]
)
def test_number_below_the_smallest_is_refused_with_it(name: str, value: Any, least: int) -> None:
    with pytest.raises(InputError, match=rf"parameter '{name}' cannot be .*at least {least}"):
        COUNTED([FakeRun()], {name: value})
