"""Every public object shows itself, in HTML and in text: whole markup, no script, no colours, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moescope as ms

THINGS = (
    "LiveModel", "Anatomy", "Corpus", "counted corpus", "Store", "closed store", "Run", "coverage", "Result", "Intervention",
    "empty intervention", "Edit", "Plan", "analyses", "Steering", "listed", "incomplete run",
)  # fmt: skip


@pytest.fixture(scope="module")
def things(hostile_run: Any, demo_model: Any, hostile: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of each, hostile wherever a name or a text can be."""
    from moescope.sae.displays import Listed

    texts = [{"text": hostile, "label": hostile}] * 5
    counted = ms.Corpus.load(texts)
    counted.facts()
    closed = ms.Store(tmp_path_factory.mktemp("closed") / "runs.duckdb")
    stopped = closed.begin_run(name=hostile, model=hostile, status="incomplete", summary={"stopped": hostile})
    interrupted = {"text/html": stopped._repr_html_(), "text": repr(stopped)}
    closed.close()
    cut = ms.Intervention(
        [ms.edits.Ablate(layer=3, experts=[5, 9]), ms.edits.Add(layer=1, vector=[0.5] * 192)], name=hostile
    )
    row = {"name": hostile, "site": hostile, "d_in": 3, "d_sae": 9, "summary": {"l0": 2.0}}
    return {
        "LiveModel": demo_model,
        "Anatomy": demo_model.anatomy,
        "Corpus": ms.Corpus.load(texts),
        "counted corpus": counted,
        "Store": hostile_run.store,
        "closed store": closed,
        "Run": hostile_run,
        "coverage": hostile_run.coverage,
        "Result": ms.analyze(hostile_run, "load"),
        "Intervention": cut,
        "empty intervention": ms.Intervention(),
        "Edit": cut.edits[0],
        "Plan": ms.plan(demo_model, texts, progress=False),
        "analyses": ms.analyses(),
        "Steering": ms.sae.Steering(cut, {"method": hostile}),
        "listed": Listed([row]),
        "incomplete run": _Shown(interrupted),
    }


class _Shown:
    """What an object showed while its store was open."""

    def __init__(self, was: dict[str, str]) -> None:
        self.was = was

    def _repr_html_(self) -> str:
        return self.was["text/html"]

    def __repr__(self) -> str:
        return self.was["text"]


@pytest.mark.parametrize("name", THINGS)
def test_html_is_whole_and_holds_nothing_but_plain_markup(
    name: str, things: dict[str, Any], shown: Callable[[Any], dict[str, Any]], read_html: Callable[[str], Any]
) -> None:
    page = shown(things[name])["text/html"]
    read = read_html(page)
    assert read.faults == []
    allowed = {"div", "h4", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "details", "summary"}
    assert {tag for tag, _ in read.tags} <= allowed
    for tag, attributes in read.tags:
        assert set(attributes) <= {"style"}, tag
        assert attributes.get("style", "text-align:left") in ("text-align:left", "text-align:right")


@pytest.mark.parametrize("name", THINGS)
def test_text_is_short_and_the_html_is_light(
    name: str, things: dict[str, Any], shown: Callable[[Any], dict[str, Any]]
) -> None:
    data = shown(things[name])
    assert len(data["text/html"]) < 100_000
    if name != "analyses":  # as pandas writes it
        assert len(data["text/plain"].splitlines()) <= 45
        assert "\n" not in repr(things[name])


@pytest.mark.parametrize("name", ["Corpus", "Store", "Run", "Intervention", "Steering", "listed", "incomplete run"])
def test_hostile_names_are_shown_letter_by_letter(
    name: str,
    things: dict[str, Any],
    shown: Callable[[Any], dict[str, Any]],
    read_html: Callable[[str], Any],
    hostile: str,
) -> None:
    words = read_html(shown(things[name])["text/html"]).text
    assert hostile.replace("\u202e", "\ufffd") in words


def test_a_run_that_is_not_whole_says_so_before_anything_else(things: dict[str, Any]) -> None:
    page = things["incomplete run"]._repr_html_()
    assert re.match(r"<div><h4>Run .*?: incomplete</h4>", page)


def test_numbers_stand_on_the_right_and_words_on_the_left(things: dict[str, Any]) -> None:
    page = things["Result"]._repr_html_()
    assert '<td style="text-align:left">mlp</td>' in page
    assert '<td style="text-align:right">96</td>' not in page  # 96 rows are said in words, ten are shown
    assert page.count("<tr>") == 1 + 10 + len(things["Result"].facts())
    assert re.search(r'<td style="text-align:right">[\d.−e]+</td>', page)


def test_a_corpus_is_shown_without_reading_it_all() -> None:
    walked = []

    def records() -> Any:
        from moescope.probes.corpus_files import Record

        for number in range(1000):
            walked.append(number)
            yield Record(f"line {number}", {"text": f"text {number}"})

    page = ms.Corpus(records, name="long")._repr_html_()
    assert "text 2" in page
    assert "text 3" not in page
    assert len(walked) <= 4


def test_a_corpus_that_cannot_be_read_shows_why(tmp_path: Path) -> None:
    broken = tmp_path / "texts.jsonl"
    broken.write_text('{"no": "text"}\n')
    assert "has no text" in ms.Corpus.load(broken)._repr_html_()


def test_results_inside_of_a_list_are_one_line_each(hostile_run: Any) -> None:
    from IPython.lib.pretty import pretty

    result = ms.analyze(hostile_run, "load")
    assert len(pretty([result, result]).splitlines()) == 2
    assert len(pretty(result).splitlines()) > 5


def test_text_of_a_result_is_at_most_a_screen_wide(hostile_run: Any) -> None:
    lines = str(ms.analyze(hostile_run, "expert_maxima")).splitlines()
    assert len(lines) <= 24
    rows = [line for line in lines if line.startswith(" ")]
    assert rows
    assert max(map(len, rows)) <= 118


def test_public_names_come_first_where_names_are_completed() -> None:
    assert sorted(ms.edits.__all__) == dir(ms.edits)
    assert dir(ms.sae) == sorted(ms.sae.__all__)
    assert set(dir(ms)) == {*ms.__all__, "__version__"}


def test_a_wrong_name_gets_the_near_ones_not_all(hostile_run: Any) -> None:
    with pytest.raises(ms.InputError) as refused:
        ms.analyze(hostile_run, "lod")
    assert "did you mean 'load'" in str(refused.value)
    assert len(str(refused.value)) < 300


def test_the_list_of_analyses_is_a_frame_with_every_section(read_html: Callable[[str], Any]) -> None:
    import pandas as pd

    listed = ms.analyses()
    assert isinstance(listed, pd.DataFrame)
    assert type(listed[listed["runs"] == 1]) is pd.DataFrame
    read = read_html(listed._repr_html_())
    assert sum(tag == "tr" for tag, _ in read.tags) == len(listed) + listed["section"].nunique()
