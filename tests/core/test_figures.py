"""Heat maps: limits that one outlier cannot move, gaps that stay gaps."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go
import pytest
from numpy.typing import NDArray

from moescope.core.figures import DIVERGING, SERIES, finish, heatmap, log_axis, plain


def _drawn(values: NDArray[np.float64], *, diverging: bool = False) -> go.Heatmap:
    rows, columns = values.shape
    names = [f"E{i}" for i in range(columns)], [f"L{i}" for i in range(rows)]
    figure = heatmap(values, x=names[0], y=names[1], hover="%{z}", colorbar="unit", diverging=diverging)
    return figure.data[0]


def test_limits_are_the_2nd_and_98th_percentile() -> None:
    drawn = _drawn(np.random.default_rng(0).permutation(np.arange(101.0))[None, :])
    assert (drawn.zmin, drawn.zmax) == pytest.approx((2.0, 98.0))


def test_one_outlier_does_not_move_the_limits() -> None:
    values = np.arange(200.0).reshape(10, 20)
    values[4, 4] = 1e12
    assert _drawn(values).zmax < 200


def test_diverging_limits_are_symmetric_around_0() -> None:
    drawn = _drawn(np.linspace(-10, 90, 101)[None, :], diverging=True)
    assert (drawn.zmin, drawn.zmax, drawn.zmid) == pytest.approx((-88.0, 88.0, 0.0))
    negative = _drawn(np.linspace(-90, 10, 101)[None, :], diverging=True)
    assert (negative.zmin, negative.zmax) == pytest.approx((-88.0, 88.0))
    assert drawn.colorscale == _drawn(np.ones((1, 1)), diverging=True).colorscale
    assert DIVERGING == "PuOr"


@pytest.mark.parametrize("gap", [np.nan, np.inf, -np.inf])
def test_gaps_do_not_count_for_the_limits(gap: float) -> None:
    values = np.concatenate([np.arange(101.0), np.full(100, gap)])[None, :]
    drawn = _drawn(values)
    assert (drawn.zmin, drawn.zmax) == pytest.approx((2.0, 98.0))


@pytest.mark.parametrize("diverging", [False, True])
@pytest.mark.parametrize("values", [np.full((3, 4), 7.0), np.zeros((1, 1)), np.full((2, 2), np.nan)])
def test_limits_differ_even_where_the_values_do_not(values: NDArray[np.float64], diverging: bool) -> None:
    drawn = _drawn(values, diverging=diverging)
    assert drawn.zmin < drawn.zmax
    assert np.isfinite([drawn.zmin, drawn.zmax]).all()


def test_missing_cells_stay_empty() -> None:
    values = np.array([[1.0, np.nan], [3.0, 4.0]])
    assert np.isnan(np.asarray(_drawn(values).z, float)[0, 1])


def test_first_layer_is_on_top_and_names_are_categories() -> None:
    figure = heatmap(np.ones((2, 3)), x=["10", "9", "8"], y=["a", "b"], hover="%{z}", colorbar="unit")
    assert figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.xaxis.type == "category"
    assert "unit" in figure.data[0].colorbar.title.text


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (64, 256), (200, 4)])
def test_height_stays_readable(rows: int, columns: int) -> None:
    figure = heatmap(np.ones((rows, columns)), x=["e"] * columns, y=["l"] * rows, hover="", colorbar="")
    assert 200 <= figure.layout.height <= 600


def test_finish_escapes_title_and_subtitle() -> None:
    figure = finish(go.Figure(), title="a <b> & c", subtitle="n = 1 <i>")
    assert figure.layout.title.text == "a &lt;b&gt; &amp; c"
    assert figure.layout.title.subtitle.text == "n = 1 &lt;i&gt;"


def _linear(colour: str) -> NDArray[np.float64]:
    part = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def test_series_colours_stay_apart_without_red_and_without_green_cones() -> None:
    """Distances in linear RGB after Viénot, Brettel & Mollon's (1999) projections for protanopes and deuteranopes."""
    protan = np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]])
    deutan = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    for matrix in (np.eye(3), protan, deutan):
        seen = [matrix @ _linear(colour) for colour in SERIES]
        closest = min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2))
        assert closest > 0.05


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>x</b>", "&lt;b&gt;x&lt;/b&gt;"),
        ("a & b", "a &amp; b"),
        ("one\ntwo\r\nthree", "one two three"),
        ("\u202egnp.exe", "\ufffdgnp.exe"),
        ("日本 'ü'", "日本 'ü'"),
    ],
)
def test_plain_text_is_shown_letter_by_letter_on_one_line(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.mark.parametrize("values", [[], [0.0], [np.nan], [1.0, 2.0], [1e-9, 1e12], [-1.0, 5.0]])
def test_logarithmic_axis_stands_any_values(values: list[float]) -> None:
    figure = go.Figure(go.Scatter(y=values))
    log_axis(figure, title="norm", values=values)
    assert (figure.layout.yaxis.type, figure.layout.yaxis.title.text) == ("log", "norm")


def test_ticks_of_a_logarithmic_axis_are_written_out() -> None:
    figure = go.Figure(go.Scatter(y=[30.0, 700.0]))
    log_axis(figure, title="norm", values=[30.0, 700.0])
    written = dict(zip(figure.layout.yaxis.tickvals, figure.layout.yaxis.ticktext, strict=True))
    assert written[200.0] == "200"
    assert written[1000.0] == "1,000"
    assert all(float(text.replace(",", "")) == value for value, text in written.items())
    wide = go.Figure(go.Scatter(y=[1e-9, 1e12]))
    log_axis(wide, title="norm", values=[1e-9, 1e12])
    assert len(wide.layout.yaxis.tickvals) < 16
