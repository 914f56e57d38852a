"""What holds for every registered analysis, also those not written yet: found by the registry, not by a list."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moescope.analysis_api import analyses as analyses_table
from moescope.analysis_api import analyze
from moescope.core.analysis import analyses
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
NAMES = analyses.names()
SINGLE = [analysis.name for analysis in analyses if analysis.runs == 1]


@pytest.fixture(scope="module")
def whole(plant: Plant, planted: ModuleType) -> Run:
    return plant(**planted.everything(layers=3, n_experts=6, labels=["a", "b"] * 4))


def test_the_analyses_of_this_version_are_registered() -> None:
    expected = {"load", "router_entropy", "nll", "specialization", "residual_norms", "residual_maxima"}
    assert expected | {"expert_maxima", "passages"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_analysis_says_what_it_answers_its_parameters_and_its_source(name: str) -> None:
    analysis = analyses[name]
    docstring = inspect.getdoc(analysis.function)
    assert docstring
    assert analysis.summary.endswith("?"), "the first line of the docstring is the question answered"
    assert analysis.source
    for parameter in analysis.parameters:
        assert f"{parameter}:" in docstring, f"parameter {parameter!r} is not described"
    hints = typing.get_type_hints(analysis.function)
    assert hints["return"] is Result
    assert set(analysis.parameters) <= set(hints)


@pytest.mark.parametrize("name", NAMES)
def test_analysis_is_listed_with_needs_and_parameters(name: str) -> None:
    row = analyses_table().set_index("name").loc[name]
    assert row["answers"] == analyses[name].summary
    for table in analyses[name].needs:
        assert table in row["needs"]
    for parameter, facts in analyses[name].parameters.items():
        assert f"{parameter}={facts.default!r}" in row["parameters"]


@pytest.mark.parametrize("name", SINGLE)
def test_result_of_a_full_run_is_complete_in_itself(name: str, whole: Run) -> None:
    result = analyze(whole, name)
    assert result.name == name
    assert result.n > 0
    assert result.n_unit
    assert result.definition
    assert result.provenance["run"] == whole.name
    assert not result.incomplete
    assert set(result.parameters) == set(analyses[name].parameters)
    columns = result.table.column_names
    assert {"metric", "value"} <= set(columns)
    assert ("ci_low" in columns) == ("ci_high" in columns) == (result.interval is not None)
    assert ("null" in columns) <= (result.null is not None)
    assert {column.split("[")[0] for column in result.units} <= set(columns)
    assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("name", SINGLE)
def test_query_of_a_result_runs_as_it_is_printed(name: str, whole: Run, store: Store) -> None:
    result = analyze(whole, name)
    if result.sql is None:
        assert result.computation
        return
    rows = store.sql(result.sql, result.sql_parameters).df()
    assert len(rows)
    if result.computation is None:
        assert set(np.round(result.df()["value"].dropna(), 9)) <= set(np.round(rows["value"].dropna(), 9))


@pytest.mark.parametrize("name", SINGLE)
def test_result_survives_json(name: str, whole: Run) -> None:
    again = json.loads(json.dumps(analyze(whole, name).as_json(), default=str))
    assert len(again["table"]) == analyze(whole, name).table.num_rows


@pytest.mark.parametrize("name", SINGLE)
def test_analysis_of_a_dense_run_works_or_is_refused_with_the_reason(
    name: str, plant: Plant, planted: ModuleType
) -> None:
    streams = {0: planted.Stream(np.full(36, 2.0), median=np.ones(1))}
    run = plant(lengths=[36], streams=streams)
    if analyses[name].missing(run):
        with pytest.raises(InputError, match=r"does not have.*(record with|measure an intervention|moescope sae )"):
            analyze(run, name)
    else:
        try:
            assert analyze(run, name).n > 0
        except InputError as refused:
            assert refused.fix, "a refusal says what to do"  # noqa: PT017  an answer is as good


def test_dense_run_has_no_expert_analysis(plant: Plant, planted: ModuleType) -> None:
    run = plant(lengths=[4], streams={0: planted.Stream(np.ones(4), median=np.ones(1))})
    for name in ("load", "router_entropy", "specialization", "expert_maxima"):
        with pytest.raises(InputError):
            analyze(run, name)


@pytest.mark.parametrize("name", SINGLE)
def test_analysis_of_a_run_without_records_is_refused(name: str, store: Store) -> None:
    run = next((r for r in store.runs() if r.name == "bare"), None) or store.begin_run(name="bare")
    store.connection.execute("UPDATE runs SET status = 'complete' WHERE run_id = ?", [run.run_id])
    with pytest.raises(InputError):
        analyze(run, name)


SIZES = {"1x1": (1, 1), "2x6": (2, 6), "64x256": pytest.param((64, 256), marks=pytest.mark.slow)}


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES)
def sized(request: pytest.FixtureRequest, plant: Plant, planted: ModuleType) -> Run:
    layers, n_experts = request.param
    tokens = 40 if layers == 64 else 36
    return plant(**planted.everything(layers=layers, n_experts=n_experts, labels=["a", "a", "b", "b"], tokens=tokens))


def _refusal(name: str, run: Run) -> str | None:
    try:
        analyze(run, name)
    except InputError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize("name", SINGLE)
def test_figure_is_drawn_from_one_expert_to_a_large_model(name: str, sized: Run) -> None:
    if sized.rows("layers") == 1 and (refused := _refusal(name, sized)) is not None:
        # One router with one expert leaves some questions without sense; a model of ordinary size leaves none.
        assert "What to do" in refused
        return
    result = analyze(sized, name)
    if not result.has_figure:
        with pytest.raises(InputError, match="no figure"):
            result.figure()
        return
    figure = result.figure()
    assert figure.data
    assert f"n = {result.n:,}" in figure.layout.title.subtitle.text
    assert len(figure.to_json()) < 8_000_000


@pytest.fixture(scope="module")
def hostile(plant: Plant, planted: ModuleType) -> Run:
    labels = [text for text in planted.HOSTILE for _ in range(6)]
    fields = planted.everything(layers=2, n_experts=2 * len(planted.HOSTILE), labels=labels, tokens=33)
    number = np.repeat(np.arange(len(labels)) // 6, 33)
    for router in fields["routers"]:
        router.experts = np.stack([2 * number, 2 * number + 1], 1)
        np.put_along_axis(router.logits, router.experts, np.full(router.experts.shape, 9.0), axis=1)
    fields["vocabulary"] = {i: planted.HOSTILE[i % len(planted.HOSTILE)].encode() for i in range(50)}
    return plant(name=planted.HOSTILE[0], **fields)


@pytest.mark.parametrize("name", SINGLE)
def test_hostile_labels_come_back_as_they_are(name: str, hostile: Run, planted: ModuleType) -> None:
    frame = analyze(hostile, name).df()
    if "label" not in frame:
        return
    assert set(frame["label"].dropna()) - {"all"} <= set(planted.HOSTILE)


@pytest.mark.parametrize("name", SINGLE)
def test_figures_show_hostile_text_as_text(name: str, hostile: Run) -> None:
    """Plotly reads <b>, <a href> and the like in names and axis categories as markup."""
    result = analyze(hostile, name)
    if result.has_figure:
        for text in _texts(json.loads(result.figure().to_json())):
            ours = text.replace("<br>", "").replace("<extra></extra>", "").replace("<b>", "").replace("</b>", "")
            assert "<" not in ours, f"{text!r} would be read as markup"


def _texts(part: Any) -> list[str]:
    if isinstance(part, dict):
        return [text for key, value in part.items() if key != "template" for text in _texts(value)]
    if isinstance(part, list):
        return [text for value in part for text in _texts(value)]
    return [part] if isinstance(part, str) else []


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("value", [0, -1])
def test_senseless_numbers_are_refused_not_crashed_on(name: str, value: int, whole: Run) -> None:
    """Draws and lengths below 1 have no meaning; a seed or a count of contexts may be 0."""
    for parameter, facts in analyses[name].parameters.items():
        if isinstance(facts.default, bool) or not isinstance(facts.default, int):
            continue
        try:
            assert analyze(whole, name, **{parameter: value}).table.num_rows
        except InputError as refused:
            if parameter not in str(refused):
                pytest.fail(f"{parameter}={value} is refused without being named: {refused}")


@pytest.mark.parametrize("name", SINGLE)
def test_tables_hold_plain_arrow_columns(name: str, whole: Run) -> None:
    table = analyze(whole, name).table
    assert isinstance(table, pa.Table)
    for column in table.schema:
        assert not pa.types.is_nested(column.type), f"{column.name} does not fit a CSV"
        assert not pa.types.is_binary(column.type)
