"""A report held against its store: whatever digit is changed in it, the check finds it and names the place."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.report.check import check_report
from moescope.report.read_back import pieces_of
from moescope.report.write import write_report
from moescope.store.store import Store

MUTATIONS = 200


def _fields(generator: np.random.Generator, *, shift: float = 0.0) -> dict[str, Any]:
    lengths = [30] * 6
    return {
        "lengths": lengths,
        "labels": ["code", "law"] * 3,
        "nll": generator.exponential(2, sum(lengths)) + shift,
    }


@pytest.fixture(scope="module")
def store_path(planted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checked") / "runs.duckdb"
    with Store(path) as store:
        planted.plant(store, planted.Plan(**_fields(np.random.default_rng(0))), name="base")
        planted.plant(store, planted.Plan(**_fields(np.random.default_rng(1), shift=0.1)), name="cut")
    return path


def _written(store_path: Path, names: list[str], target: Path) -> Path:
    with Store(store_path, read_only=True) as store:
        return write_report([store.run(name) for name in names], target)


@pytest.fixture(scope="module", params=[("base",), ("base", "cut")], ids=["one run", "two runs"])
def report(request: pytest.FixtureRequest, store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _written(store_path, list(request.param), tmp_path_factory.mktemp("html") / "report.html")


def _digits(text: str) -> list[int]:
    """Where digits stand that a reader sees, that a figure draws, or that a table is sorted by."""
    begin, end = text.index("<main>"), text.index("</main>")
    inside = re.compile(r"<[^>]*>")
    covered = np.zeros(len(text), bool)
    for tag in inside.finditer(text, begin, end):
        covered[tag.start() : tag.end()] = True
    for value in re.finditer(r"data-v='([^']*)'", text[begin:end]):
        covered[begin + value.start(1) : begin + value.end(1)] = False
    return [at for at in range(begin, end) if text[at].isdigit() and text[at].isascii() and not covered[at]]


def _mutated(text: str, at: int) -> str:
    return text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]


def test_untouched_report_holds(report: Path) -> None:
    done = check_report(report)
    assert done.differences == ()
    assert done.numbers > 100


def test_every_changed_digit_is_seen(report: Path) -> None:
    """In titles, tables, the summary and the data of figures: a piece that is read back differs, and only there."""
    text = report.read_text(encoding="utf-8")
    known = pieces_of(text, markdown=False)
    for at in random.Random(0).sample(_digits(text), MUTATIONS):
        found = pieces_of(_mutated(text, at), markdown=False)
        assert len(found) == len(known)
        differing = [one.place for one, other in zip(found, known, strict=True) if one.text != other.text]
        places = [one.place for one, other in zip(found, known, strict=True) if one.place != other.place]
        assert differing, text[at - 60 : at + 20]
        # A label names the other cells of its row, so these are told with the label as it is now.
        assert len(differing) == 1 or places


@pytest.mark.parametrize("pattern", [r"<h2>[^<]*?(\d)", r"<td class=n data-v='[^']*'>[^<]*?(\d)", r'"layout":[^<]*?(\d)',
                                     r"<h1 id='findings'>.*?<td[^>]*><a[^>]*>[^<]*?(\d)", r"n = [^<]*?(\d)"])  # fmt: skip
def test_changed_digit_is_named_with_both_numbers(report: Path, tmp_path: Path, pattern: str) -> None:
    text = report.read_text(encoding="utf-8")
    found = re.search(pattern, text[text.index("<main>") :], re.S)
    assert found is not None
    at = text.index("<main>") + found.start(1)
    target = tmp_path / "report.html"
    target.write_text(_mutated(text, at), encoding="utf-8")
    done = check_report(target)
    assert done.differences
    for one in done.differences:
        assert one.report != one.store
        assert one.place


def test_removed_row_is_seen_and_does_not_shift_the_others(report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    at = text.index("<tr><td", text.index("id='nll'" if "id='nll'" in text else "id='compare_measures'"))
    end = text.index("</tr>", at) + len("</tr>")
    target = tmp_path / "report.html"
    target.write_text(text[:at] + text[end:], encoding="utf-8")
    assert check_report(target).differences


def test_changed_store_is_seen(store_path: Path, planted: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "runs.duckdb"
    copy.write_bytes(store_path.read_bytes())
    report = _written(copy, ["base"], tmp_path / "report.html")
    with duckdb.connect(str(copy)) as connection:
        connection.execute("UPDATE tokens SET nll = nll + 1 WHERE nll IS NOT NULL")
    done = check_report(report)
    assert any(one.section == "nll" and one.place == "title" for one in done.differences)


def test_run_that_is_gone_says_so(store_path: Path, planted: ModuleType, tmp_path: Path) -> None:
    copy = tmp_path / "runs.duckdb"
    copy.write_bytes(store_path.read_bytes())
    report = _written(copy, ["base"], tmp_path / "report.html")
    with Store(copy) as store:
        store.delete_run("base")
    with pytest.raises(InputError, match="run 'base' of this report is gone"):
        check_report(report)
    with Store(copy) as store:
        planted.plant(store, planted.Plan(lengths=[3]), name="base")
    with pytest.raises(InputError, match="another run of that name"):
        check_report(report)


def test_store_that_has_moved_is_found_beside_the_report_or_where_it_is_named(store_path: Path, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    new.mkdir()
    (old / "runs.duckdb").write_bytes(store_path.read_bytes())
    report = _written(old / "runs.duckdb", ["base"], old / "report.html")
    (old / "runs.duckdb").rename(new / "runs.duckdb")
    with pytest.raises(InputError, match="store of this report cannot be opened"):
        check_report(report)
    assert not check_report(report, store=new / "runs.duckdb").differences
    report.rename(new / "report.html")
    assert not check_report(new / "report.html").differences


@pytest.mark.parametrize("text", ["", "<html><main>0.5</main></html>", "<script type='application/json' id='moescope-report'>{",
                                  "<script type='application/json' id='moescope-report'>[1]</script>"])  # fmt: skip
def test_other_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.html").write_text(text)
    with pytest.raises(InputError, match="no report that can be checked"):
        check_report(tmp_path / "other.html")


def test_missing_and_binary_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.html").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="no report"):
        check_report(tmp_path / "binary.html")
    with pytest.raises(InputError, match="there is no file"):
        check_report(tmp_path / "none.html")


# Markdown


@pytest.fixture(scope="module")
def markdown(store_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kaleido.errors", None)  # as without the extra
        return _written(store_path, ["base", "cut"], tmp_path_factory.mktemp("md") / "report.md")


def test_markdown_without_images_is_tables_alone(markdown: Path) -> None:
    assert [path.name for path in markdown.parent.iterdir()] == ["report.md"]
    text = markdown.read_text(encoding="utf-8")
    assert "![" not in text
    assert "| mean NLL |" in text.replace("[", "").replace("](#compare_measures)", "")
    assert not check_report(markdown).differences


def test_every_changed_digit_of_markdown_is_seen(markdown: Path) -> None:
    text = markdown.read_text(encoding="utf-8")
    known = pieces_of(text, markdown=True)
    last = text.index("<!-- moescope-report")
    digits = [at for at in range(last) if text[at].isdigit() and text[at].isascii() and not _in_anchor(text, at)]
    for at in random.Random(0).sample(digits, MUTATIONS):
        found = pieces_of(_mutated(text, at), markdown=True)
        assert [one.text for one in found] != [one.text for one in known], text[at - 40 : at + 20]


def _in_anchor(text: str, at: int) -> bool:
    line = text[text.rfind("\n", 0, at) + 1 : text.find("\n", at)]
    return line.startswith("<a id=")


@pytest.mark.slow
def test_images_of_markdown_are_held_to_their_checksums(store_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("kaleido")
    report = _written(store_path, ["base", "cut"], tmp_path / "report.md")
    images = sorted((tmp_path / "report_files").glob("*.png"))
    if not images:
        pytest.skip("no browser to draw with")
    text = report.read_text(encoding="utf-8")
    for image in images:
        assert image.read_bytes().startswith(b"\x89PNG")
        assert f"](report_files/{image.name})" in text
    assert not check_report(report).differences
    images[0].write_bytes(images[0].read_bytes() + b"x")
    assert [one.place for one in check_report(report).differences] == [f"image {images[0].name}"]


def test_markdown_that_fails_leaves_the_files_before(
    store_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.report.markdown_files as module

    def broken(*_: object) -> str:
        raise ZeroDivisionError

    old = '<!-- moescope-report {"format": 1, "runs": [], "images": {"old": ""}} -->'
    (tmp_path / "report.md").write_text(old)
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "old.png").write_bytes(b"old")
    monkeypatch.setattr(module, "markdown_page", broken)
    monkeypatch.setitem(sys.modules, "kaleido.errors", None)  # as without the extra: no browser is started
    with pytest.raises(ZeroDivisionError):
        _written(store_path, ["base"], tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == old
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["report.md", "report_files", "old.png"]


def test_folder_of_other_things_is_left_alone(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "report_files").mkdir()
    (tmp_path / "report_files" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="something that no report wrote"):
        _written(store_path, ["base"], tmp_path / "report.md")
    assert (tmp_path / "report_files" / "thesis.tex").read_text() == "mine"


def test_folder_of_images_that_no_report_lists_is_left_alone(store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "photos_files").mkdir()
    (tmp_path / "photos_files" / "mine.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="something that no report wrote"):
        _written(store_path, ["base"], tmp_path / "photos.md")
    assert (tmp_path / "photos_files" / "mine.png").read_bytes() == b"mine"


def _small(planted: ModuleType, path: Path, name: str, nll: float = 1.0) -> None:
    with Store(path) as store:
        planted.plant(store, planted.Plan(lengths=[5] * 2, nll=np.full(10, nll)), name=name)


@pytest.fixture(scope="module")
def small_report(planted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    _small(planted, folder / "runs.duckdb", "base")
    return _written(folder / "runs.duckdb", ["base"], folder / "report.html")


def test_another_run_in_the_store_is_no_difference(planted: ModuleType, tmp_path: Path) -> None:
    _small(planted, tmp_path / "runs.duckdb", "base")
    report = _written(tmp_path / "runs.duckdb", ["base"], tmp_path / "report.html")
    _small(planted, tmp_path / "runs.duckdb", "next")
    assert check_report(report).differences == ()


def test_images_of_a_name_that_needs_quoting_hold(
    planted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moescope.report.markdown_files as module

    def drawn(answers: Any, folder: Path) -> None:
        for answer in answers:
            (folder / f"{answer.anchor}.png").write_bytes(b"drawn")

    monkeypatch.setattr(module, "_draw", drawn)
    _small(planted, tmp_path / "runs.duckdb", "base")
    report = _written(tmp_path / "runs.duckdb", ["base"], tmp_path / "my report é.md")
    assert "](my%20report%20%C3%A9_files/" in report.read_text(encoding="utf-8")
    assert check_report(report).differences == ()
    # Its own images may be replaced.
    assert _written(tmp_path / "runs.duckdb", ["base"], report) == report
    (tmp_path / "my report é_files" / "mine.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="something that no report wrote"):
        _written(tmp_path / "runs.duckdb", ["base"], report)


def test_one_of_two_stores_may_have_moved(planted: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        _small(planted, tmp_path / f"{name}.duckdb", name)
    with Store(tmp_path / "one.duckdb", read_only=True) as one, Store(tmp_path / "two.duckdb", read_only=True) as two:
        report = write_report([one.run("one"), two.run("two")], tmp_path / "both.html")
    (tmp_path / "two.duckdb").rename(tmp_path / "moved.duckdb")
    assert check_report(report, store=tmp_path / "moved.duckdb").differences == ()


def test_verdict_without_its_baseline_holds_when_the_store_has_changed(planted: ModuleType, tmp_path: Path) -> None:
    store, limits = tmp_path / "runs.duckdb", tmp_path / "limits.yaml"
    _small(planted, store, "base")
    limits.write_text("baseline: gone\nrules:\n  - {analysis: nll, metric: mean NLL, max_change: 1}\n")
    with Store(store, read_only=True) as opened:
        report = write_report(opened.run("base"), tmp_path / "report.html", thresholds=limits)
    _small(planted, store, "next")
    store.rename(tmp_path / "moved.duckdb")
    assert check_report(report, store=tmp_path / "moved.duckdb").differences == ()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"part":"all"', '"part":"some"'),
        ('"part":"all",', ""),
        ('"runs":[{', '"runs":[1,{'),
        ('"thresholds":null', '"thresholds":[1]'),
        ('"results":[{', '"results":5,"other":[{'),
        ('"results":[{', '"images":[1],"results":[{'),
        ('"named":', '"nambed":'),
    ],
)
def test_broken_provenance_is_refused(small_report: Path, tmp_path: Path, old: str, new: str) -> None:
    text = small_report.read_text(encoding="utf-8")
    report = tmp_path / "report.html"
    assert old in text
    report.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match="provenance that cannot be read"):
        check_report(report)


def test_what_no_text_shows_is_checked_too(report: Path) -> None:
    """Figures in each other's place, heights, links, added scripts and styles: some piece differs."""
    text = report.read_text(encoding="utf-8")
    known = pieces_of(text, markdown=False)
    first = re.findall(r"data-figure='(figure-[^']*)'", text)[0]
    for old, new in (
        (f"data-figure='{first}'", "data-figure='figure-of-another'"),
        (re.findall(r"style='height:\d+px'", text)[0], "style='height:0px'"),
        ("href='#findings'", "href='#nll'"),
        ("<main>", "<main><script>document.title = 1</script>"),
        ("<main>", "<main><style>td {display: none}</style>"),
    ):
        assert old in text
        assert pieces_of(text.replace(old, new, 1), markdown=False) != known, new


def test_run_called_otherwise_in_the_provenance_is_a_difference(small_report: Path, tmp_path: Path) -> None:
    text = small_report.read_text(encoding="utf-8")
    report = tmp_path / "report.html"
    report.write_text(text.replace('"name":"base","status":"complete"', '"name":"bass","status":"failed"'))
    assert [one.place for one in check_report(report).differences] == [
        "provenance, name of run 1",
        "provenance, status of run 1",
    ]


def test_missing_images_are_told_once(store_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                      monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "kaleido.errors", None)  # as without the extra
    _written(store_path, ["base"], tmp_path / "report.md")
    assert [record.getMessage()[:9] for record in caplog.records] == ["no images"]
