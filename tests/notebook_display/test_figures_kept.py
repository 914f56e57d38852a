"""Figures that a notebook keeps: data and a picture, never a script; without a browser, words that say so."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from moescope.core import notebook_figure, picture
from moescope.core.figures import finish
from moescope.core.notebook_figure import PLOTLY

PNG = b"\x89PNG\r\n\x1a\n and so on"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Instead of a browser: what was asked to be drawn."""
    asked: list[Any] = []

    def png_of(figure: Any) -> bytes:
        asked.append(figure)
        return PNG

    monkeypatch.setattr(notebook_figure, "png_of", png_of)
    return asked


@pytest.fixture
def browserless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notebook_figure, "png_of", lambda figure: None)


def _figure(points: int = 3, *, title: str = "Half of it") -> Any:
    return finish(go.Figure(go.Scatter(y=np.arange(points) / 7)), title=title, subtitle="n = 3")


def test_a_figure_is_kept_as_data_as_a_picture_and_in_words(
    drawn: list[Any], shown: Callable[[Any], dict[str, Any]]
) -> None:
    data = shown(_figure())
    assert set(data) == {"text/plain", "image/png", PLOTLY}
    assert base64.b64decode(data["image/png"]) == PNG
    assert data["text/plain"] == "Figure: Half of it"
    kept = data[PLOTLY]["data"][0]["y"]
    assert np.frombuffer(base64.b64decode(kept["bdata"]), kept["dtype"])[2] == pytest.approx(2 / 7)


def test_the_picture_is_drawn_once_for_a_state_of_the_figure(drawn: list[Any]) -> None:
    figure = _figure()
    figure._repr_mimebundle_()
    figure._repr_mimebundle_()
    assert len(drawn) == 1
    figure.update_layout(height=300)
    figure._repr_mimebundle_()
    assert len(drawn) == 2


def test_a_figure_of_much_data_is_kept_as_a_picture_alone(drawn: list[Any]) -> None:
    data, _ = _figure(200_000)._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"}


@pytest.mark.usefixtures("browserless")
def test_without_a_browser_the_data_stay_and_other_viewers_are_told(
    hostile: str, read_html: Callable[[str], Any], shown: Callable[[Any], dict[str, Any]]
) -> None:
    data = shown(_figure(200_000, title=hostile))
    assert set(data) == {"text/plain", "text/html", PLOTLY}
    read = read_html(data["text/html"])
    assert read.faults == []
    assert {tag for tag, _ in read.tags} == {"p", "code"}
    assert "moescope[images]" in read.text
    assert hostile.replace("\u202e", "\ufffd") in read.text


def test_nothing_is_fetched_and_nothing_is_run(drawn: list[Any]) -> None:
    data, _ = _figure()._repr_mimebundle_()
    kept = json.dumps(data)
    assert "<script" not in kept
    assert "://" not in kept
    assert len(kept) < 20_000


def test_a_copy_without_title_is_kept_too_and_remembers_what_it_is(drawn: list[Any]) -> None:
    copy = _figure().untitled()
    assert copy.layout.title.text is None
    data, facts = copy._repr_mimebundle_()
    assert data["text/plain"] == "Figure: Half of it"
    assert facts["image/png"] == {"width": 800, "height": 450}


def test_a_browser_that_failed_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    began = []

    async def broken() -> None:
        began.append(1)
        job = picture._jobs.get()
        assert job is not None
        job[1].set_exception(RuntimeError("no browser"))

    monkeypatch.setattr(picture, "_state", {"thread": None, "failed": False})
    monkeypatch.setattr(picture, "_serve", broken)
    assert picture.png_of(_figure()) is None
    assert picture.png_of(_figure()) is None
    assert len(began) == 1


@pytest.mark.slow
def test_a_browser_draws_the_picture_at_its_size() -> None:
    pytest.importorskip("kaleido")
    figures = [_figure(), _figure().update_layout(height=300)]
    pngs = [picture.png_of(figure) for figure in figures]
    if None in pngs:
        pytest.skip("no browser is here")
    for png, height in zip(pngs, (450, 300), strict=True):
        assert png is not None
        assert png[:8] == PNG[:8]
        assert struct.unpack(">II", png[16:24]) == (1200, height * 3 // 2)
        assert len(png) < 120_000
