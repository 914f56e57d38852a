"""Results: every format gives the numbers back, files are whole, hostile text stays text, n is always said."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moescope.core.errors import InputError
from moescope.core.result import Result

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "</title></style></pre></table><iframe src=javascript:alert(4)>",
    "&lt;b&gt; & <b>",
)
NASTY = (*HOSTILE, 'comma, "quote"\nnew line', "\u202egnp.exe", "日本語 🧪", "", " lead")


def _result(**changes: Any) -> Result:
    table = pa.table(
        {
            "layer": pa.array([0, 1, 2], pa.uint16()),
            "label": ["a", None, 'quote " comma , new\nline 日本'],
            "metric": ["m"] * 3,
            "value": [0.1, None, -1e300],
            "n": [1, 2, 3],
        }
    )
    base = Result(
        title="One expert takes half of all tokens",
        table=table,
        definition="share of decisions",
        units={"value": "share"},
        n=12345,
        n_unit="decisions",
        draw=lambda result: go.Figure(go.Scatter(y=result.df()["value"])),
        interval="95 % bootstrap",
        null="one over E",
        sql="SELECT 1 < 2 AS $run",
        sql_parameters={"run": "abc"},
        notes=("One layer was left out.",),
        name="load",
        source="arXiv 0000.00000",
        parameters={"segment": 16},
        provenance={"run": "base", "model": "demo"},
    )
    return dataclasses.replace(base, **changes)


class Tags(HTMLParser):
    """Start tags of a page with their attributes; what stands in scripts is no tag."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}


def test_csv_gives_every_value_back(tmp_path: Path) -> None:
    result = _result()
    with result.save(tmp_path / "x.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == ["0", "1", "2"]
    assert [row["label"] for row in rows] == ["a", "", 'quote " comma , new\nline 日本']
    assert [float(row["value"]) if row["value"] else None for row in rows] == [0.1, None, -1e300]


def test_parquet_gives_the_same_table_back_with_its_facts(tmp_path: Path) -> None:
    result = _result()
    table = pq.read_table(result.save(tmp_path / "x.parquet"))
    assert table.equals(result.table)
    facts = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert facts["What it shows"] == "share of decisions"
    assert facts["Sample"] == "12,345 decisions"


def test_json_gives_table_and_provenance_back(tmp_path: Path) -> None:
    result = _result()
    found = json.loads(result.save(tmp_path / "x.json").read_text(encoding="utf-8"))
    assert found["table"] == result.table.to_pylist()
    for name in ("title", "definition", "n", "n_unit", "interval", "null", "sql", "source", "incomplete", "name"):
        assert found[name] == getattr(result, name)
    assert found["provenance"] == {"run": "base", "model": "demo"}
    assert found["notes"] == ["One layer was left out."]


def _no_constants(name: str) -> Any:
    raise AssertionError(f"{name} is no JSON (RFC 8259)")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_stays_json_where_a_number_is_not_finite(tmp_path: Path, value: float) -> None:
    result = _result(table=pa.table({"value": [1.0, value]}))
    text = result.save(tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=_no_constants)["table"][0] == {"value": 1.0}


def test_html_shows_title_numbers_definition_and_query(tmp_path: Path) -> None:
    words = " ".join(Tags(_result().save(tmp_path / "x.html").read_text(encoding="utf-8")).words)
    for text in (
        "One expert takes half of all tokens", "n = 12,345 decisions", "share of decisions", "SELECT 1 < 2 AS $run", "日本",
        "One layer was left out.", "arXiv 0000.00000", "segment = 16", "95 % bootstrap", "one over E",
    ):  # fmt: skip
        assert text in words


def test_html_fetches_nothing(tmp_path: Path) -> None:
    page = Tags(_result().save(tmp_path / "x.html").read_text(encoding="utf-8"))
    assert "script" in page.names(), "the figure library is in the page"
    assert not page.names() & {"link", "img", "iframe", "object", "embed", "base", "audio", "video", "source"}
    for tag, attributes in page.tags:
        assert "src" not in attributes, f"<{tag}> fetches {attributes.get('src')}"
        assert not any("url(" in (value or "") for value in attributes.values())


@pytest.mark.parametrize("ending", [".txt", "", ".pickle", ".html.gz"])
def test_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path, ending: str) -> None:
    with pytest.raises(InputError) as refused:
        _result().save(tmp_path / f"x{ending}")
    for known in (".html", ".png", ".svg", ".csv", ".parquet", ".json"):
        assert known in str(refused.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".html", ".png", ".csv", ".parquet", ".json"])
def test_missing_folder_is_refused(tmp_path: Path, ending: str) -> None:
    with pytest.raises(InputError, match="no such folder"):
        _result().save(tmp_path / "no" / f"x{ending}")


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium to draw with")
def test_images_are_drawn(tmp_path: Path) -> None:
    png = _result().save(tmp_path / "x.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", png[16:24])
    assert (width, height) > (1000, 500)
    svg = _result().save(tmp_path / "x.svg").read_text()
    assert "<svg" in svg
    assert "One expert takes half" in svg


def test_images_need_a_figure_and_a_browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="no figure"):
        _result(draw=None).save(tmp_path / "x.png")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "no browser"))
    with pytest.raises(InputError, match=r"save as \.html"):
        _result().save(tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_the_table_comes_out_for_every_library() -> None:
    result = _result()
    assert result.arrow() is result.table
    assert result.df()["layer"].tolist() == result.polars()["layer"].to_list() == [0, 1, 2]


def _failing(_: Result) -> go.Figure:
    raise ZeroDivisionError("the figure cannot be drawn")


def test_writer_that_fails_leaves_no_file_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _result(draw=_failing).save(tmp_path / "x.html")
    assert list(tmp_path.iterdir()) == []


def test_writer_that_fails_keeps_the_file_before(tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("old")
    with pytest.raises(ZeroDivisionError):
        _result(draw=_failing).save(tmp_path / "x.html")
    assert (tmp_path / "x.html").read_text() == "old"


def test_path_may_be_text_and_is_given_back(tmp_path: Path) -> None:
    assert _result().save(str(tmp_path / "x.csv")) == tmp_path / "x.csv"


def _everywhere(text: str) -> Result:
    return _result(
        title=text, table=pa.table({text or "x": [text], "value": [1.0]}), definition=text, units={"value": text}, n_unit=text,
        interval=text, null=text, sql=text, computation=text, notes=(text,), name=text, source=text, parameters={text: text},
        provenance={"run": text}, draw=lambda _: go.Figure(go.Bar(x=[text], y=[1.0], name=text)),
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_notebook_view_shows_hostile_text_as_text(text: str) -> None:
    page = Tags(_everywhere(text)._repr_html_())
    allowed = {"div", "h4", "p", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "code"}
    assert page.names() <= allowed | ({"style"} if "style" in page.names() else set())
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert text in "".join(page.words)


@pytest.mark.parametrize("text", HOSTILE)
def test_page_shows_hostile_text_as_text(tmp_path: Path, text: str) -> None:
    harmless = Tags(_everywhere("harmless").save(tmp_path / "a.html").read_text(encoding="utf-8"))
    hostile = Tags(_everywhere(text).save(tmp_path / "b.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in hostile.tags] == [tag for tag, _ in harmless.tags]
    assert [set(attributes) for _, attributes in hostile.tags] == [set(attributes) for _, attributes in harmless.tags]
    assert text in hostile.words, "the title, as it is"


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("ending", [".csv", ".parquet", ".json", ".html"])
def test_any_text_can_be_saved(tmp_path: Path, text: str, ending: str) -> None:
    assert _everywhere(text).save(tmp_path / f"x{ending}").stat().st_size > 0


@pytest.mark.parametrize("text", HOSTILE)
def test_figure_title_shows_hostile_text_as_text(text: str) -> None:
    layout = _everywhere(text).figure().layout
    for shown in (layout.title.text, layout.title.subtitle.text):
        assert "<" not in shown.replace("<br>", "")


def test_figure_says_finding_n_and_run() -> None:
    title = _result().figure().layout.title
    assert title.text == "One expert takes half of all tokens"
    assert title.subtitle.text == "n = 12,345 decisions · base"


def test_long_title_is_broken_not_cut() -> None:
    words = [f"word{i}" for i in range(60)]
    lines = _result(title=" ".join(words)).figure().layout.title.text.split("<br>")
    assert " ".join(lines).split() == words
    assert max(map(len, lines)) <= 100


def test_result_without_figure_points_to_its_table(tmp_path: Path) -> None:
    result = _result(draw=None)
    assert not result.has_figure
    with pytest.raises(InputError, match=r"load has no figure.*df\(\)"):
        result.figure()
    assert result.save(tmp_path / "x.html").exists()


def test_polars_and_pandas_hold_the_same_numbers() -> None:
    result = _result()
    assert result.polars()["value"].to_list() == [0.1, None, -1e300]
    assert result.df()["layer"].tolist() == [0, 1, 2]


def test_long_table_is_cut_for_reading_and_says_so(tmp_path: Path) -> None:
    result = _result(table=pa.table({"value": np.arange(1000)}))
    assert "1,000 rows" in result._repr_html_()
    page = result.save(tmp_path / "x.html").read_text(encoding="utf-8")
    assert "Table, 400 of 1,000 rows" in page
    assert page.count("<tr><td class='number'>") == 400
    assert len(result.save(tmp_path / "x.csv").read_text().splitlines()) == 1001


def test_facts_leave_out_what_does_not_apply() -> None:
    facts = _result(interval=None, null=None, notes=(), parameters={}, source="").facts()
    assert set(facts) == {"What it shows", "Units", "Sample"}


def test_repr_is_one_line_with_name_rows_and_n() -> None:
    shown = repr(_result())
    assert shown.count("\n") == 0
    for text in ("load", "3 rows", "12,345"):
        assert text in shown
