"""Reports: one file that opens offline, ledger first, gaps marked, nothing pretended, nothing from outside let through."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from moescope.core.analysis import SECTION_TITLES, analyses
from moescope.core.errors import InputError
from moescope.report.write import write_report
from moescope.store.run import Run
from moescope.store.store import Store

Plant = Callable[..., Run]
REPORTED = [analysis.name for analysis in analyses if analysis.section is not None and analysis.runs == 1]
EXPERT_WORDS = ("never chosen", "busiest expert", "Router entropy runs", "expert–label", "largest expert output")


class Page(HTMLParser):
    """A report as a browser reads it: tags with attributes, and text with the tag it stands in."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self._going_on = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._going_on = False
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "img", "link", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self._going_on = False
        while self._open and self._open.pop() != tag:
            continue

    def handle_data(self, data: str) -> None:
        tag = self._open[-1] if self._open else ""
        if self._going_on and self.texts:
            data = self.texts.pop()[1] + data  # the parser hands long texts over in pieces
        self.texts.append((tag, data))
        self._going_on = True

    @property
    def sections(self) -> list[str]:
        """Names of results, in order."""
        return [attributes["id"] or "" for tag, attributes in self.tags if tag == "section"]

    @property
    def words(self) -> str:
        """What a reader sees."""
        return "\n".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def headings(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def _fields(planted: ModuleType, labels: list[str | None], *, tokens: int = 40) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    total = tokens * len(labels)
    kinds = sorted({label for label in labels if label is not None})
    of_token = np.repeat([kinds.index(label) if label is not None else 0 for label in labels], tokens)
    experts = np.stack([2 * of_token, 2 * of_token + 1], 1)
    n_experts = 2 * max(len(kinds), 1)
    peaks = [
        {"layer": 0, "block": "mlp", "expert": e, "tokens": 9, "weight_sum": 1.0, "output_norm_mean": 1.0, "weighted_norm_sum": 1.0,
         "max_abs_out": 1.0 + e, "max_abs_channel": 2, "max_abs_token": e}
        for e in range(n_experts)
    ]  # fmt: skip
    entropy = generator.uniform(0.1, 0.6, total)
    return {
        "lengths": [tokens] * len(labels), "labels": labels, "nll": generator.exponential(2, total),
        "routers": [planted.Router(experts, n_experts, entropy=entropy)],
        "streams": {0: planted.Stream(generator.uniform(1, 9, total), median=np.full(len(labels), 0.5))},
        "experts": peaks, "vocabulary": {i: f" t{i}".encode() for i in range(50)},
    }  # fmt: skip


@pytest.fixture(scope="module")
def plant(store: Store, planted: ModuleType) -> Plant:
    number = count()

    def make(
        *, status: str = "complete", name: str | None = None, summary: dict[str, Any] | None = None, **fields: Any
    ) -> Run:
        plan = planted.Plan(**fields)
        return planted.plant(store, plan, name=name or f"run {next(number)}", status=status, summary=summary)

    return make


def _page(run: Run, folder: Path) -> Page:
    return Page(write_report(run, folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole_file(plant: Plant, planted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = plant(name="base", **planted.everything(layers=3, n_experts=6, labels=["code", "law"] * 3, tokens=40))
    return write_report(run, tmp_path_factory.mktemp("whole") / "report.html")


@pytest.fixture(scope="module")
def whole(whole_file: Path) -> Page:
    return Page(whole_file.read_text(encoding="utf-8"))


def test_report_fetches_nothing(whole: Page) -> None:
    names = {tag for tag, _ in whole.tags}
    assert not names & {"link", "img", "iframe", "object", "embed", "base", "audio", "video", "source", "form"}
    for tag, attributes in whole.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


def _unpacked_library(page: Page) -> str:
    ids = [attributes.get("id") for tag, attributes in page.tags if tag == "script"]
    scripts = [text for tag, text in page.texts if tag == "script"]
    assert ids.count("figure-library") == 1
    (packed,) = [text for text in scripts if len(text) > 500_000]
    return gzip.decompress(base64.b64decode(packed)).decode()


def test_figure_library_is_in_the_file_once(whole: Page) -> None:
    from plotly.offline import get_plotlyjs

    assert _unpacked_library(whole) == get_plotlyjs()


def test_every_result_has_its_figure_or_an_open_table(whole: Page) -> None:
    figures = [a["data-figure"] for tag, a in whole.tags if tag == "div" and "data-figure" in a]
    held = [a.get("id") for tag, a in whole.tags if tag == "script" and str(a.get("id")).startswith("figure-")]
    assert sorted(held) == sorted([*figures, "figure-library"])
    # Where there is no figure, the table lies open.
    opened = sum(tag == "details" and "open" in attributes for tag, attributes in whole.tags) - 1  # the contents
    assert len(figures) + opened == len(whole.sections)
    assert len(figures) > opened > 0


def test_whole_report_is_lighter_than_its_figure_library_alone(whole_file: Path) -> None:
    from plotly.offline import get_plotlyjs

    assert whole_file.stat().st_size < len(get_plotlyjs().encode())


def test_report_holds_every_analysis_of_its_section_order(whole: Page) -> None:
    assert set(whole.sections) == {"coverage", *REPORTED}
    places = [list(SECTION_TITLES).index(analyses[name].section or "overview") for name in whole.sections[1:]]
    assert places == sorted(places)


def test_ledger_comes_before_every_analysis(whole: Page) -> None:
    assert whole.sections[0] == "coverage"
    assert whole.headings("h1").index("Coverage") < whole.headings("h1").index("Predictions")


def test_report_says_what_was_run(whole: Page) -> None:
    for words in ("Run base", "planted", "PlantedForCausalLM", "3 MoE layers of 6 experts, top-2", "f" * 64, "240"):
        assert words in whole.words


def test_every_finding_links_to_its_section(whole: Page) -> None:
    ids = {attributes["id"] for _, attributes in whole.tags if "id" in attributes}
    links = Counter((attributes["href"] or "")[1:] for tag, attributes in whole.tags if tag == "a")
    assert set(links) <= ids
    # Once in the contents, once in the findings.
    assert all(links[section] == 2 for section in whole.sections[1:])


def test_every_result_says_n_definition_and_query(whole: Page) -> None:
    muted = [text for tag, text in whole.texts if tag == "p" and text.startswith("n = ")]
    assert len(muted) == len(whole.sections)
    assert whole.words.count("What it shows") == len(whole.sections)
    assert whole.words.count("Query") + whole.words.count("Computed by") >= len(whole.sections)


def test_complete_run_is_not_marked(whole: Page) -> None:
    assert "INCOMPLETE" not in whole.words
    assert "⚠" not in whole.words


@pytest.mark.parametrize(
    "status", ["incomplete", *(pytest.param(other, marks=pytest.mark.slow) for other in ("failed", "running"))]
)
def test_run_that_is_not_whole_is_marked_at_the_top_and_on_every_result(
    plant: Plant, planted: ModuleType, tmp_path: Path, status: str
) -> None:
    summary = {"tokens": 5, "stopped": "the power <went> out"}
    run = plant(status=status, summary=summary, **_fields(planted, ["a", "a", "b", "b"]))
    page = _page(run, tmp_path)
    assert f"This run is {status}" in page.words
    assert "the power <went> out" in page.words
    assert page.words.count("INCOMPLETE RUN") == len(page.sections)
    assert {"nll", "load", "local_consistency"} <= set(page.sections)


@pytest.mark.slow
def test_gap_of_the_ledger_is_shown(plant: Plant, planted: ModuleType, tmp_path: Path) -> None:
    page = _page(plant(status="incomplete", **_fields(planted, ["a", "b"])), tmp_path)
    assert "1 of 1 sites" in page.words
    assert "7 events are missing" in page.words


def test_analyses_left_out_are_listed_with_the_reason(plant: Plant, planted: ModuleType, tmp_path: Path) -> None:
    fields = _fields(planted, [None, None])
    fields["routers"][0].entropy = None
    page = _page(plant(**fields | {"streams": {}}), tmp_path)
    listed = page.words[page.words.index("Not in this report") :]
    for name, reason in (
        ("specialization", "fewer than two labels"),
        ("router_entropy", "without router logits"),
        ("residual_norms", "residual"),
        ("residual_maxima", "residual"),
    ):
        assert name in listed
        assert reason in listed[listed.index(name) :]
        assert name not in page.sections
    assert {"nll", "load", "expert_maxima", "passages"} <= set(page.sections)


def test_nothing_is_left_out_of_a_full_run(whole: Page) -> None:
    assert "Not in this report" not in whole.words
    assert "Told by other reports" in whole.words


def test_dense_run_pretends_no_experts(plant: Plant, planted: ModuleType, tmp_path: Path) -> None:
    fields = _fields(planted, ["a", "b"])
    page = _page(
        plant(lengths=fields["lengths"], labels=["a", "b"], nll=fields["nll"], streams=fields["streams"]), tmp_path
    )
    residual = {"residual_norms", "residual_maxima", "massive_activations"}
    assert set(page.sections) == {"coverage", "anatomy_map", "nll", "passages", "massive_map"} | residual
    assert not {"Experts", "Routing"} & set(page.headings("h1"))
    assert "dense: no routers, no experts" in page.words
    for words in EXPERT_WORDS:
        assert words not in page.words


def test_run_with_nothing_recorded_still_has_a_report(store: Store, tmp_path: Path) -> None:
    page = _page(store.begin_run(name="stopped at once"), tmp_path)
    assert page.sections == ["coverage"]
    assert "did not finish" in page.words
    assert "This run is running" in page.words


@pytest.fixture(scope="module")
def hostile(plant: Plant, planted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Page:
    labels = [text for text in planted.HOSTILE for _ in range(6)]
    fields = _fields(planted, labels)
    fields["vocabulary"] = {i: planted.HOSTILE[i % len(planted.HOSTILE)].encode() for i in range(50)}
    evil = "".join(planted.HOSTILE)
    run = plant(
        name=planted.HOSTILE[5] + evil, summary={"stopped": evil, "skipped_records": 2, "first_skipped": evil}, **fields
    )
    connection = run.store.connection
    for column in ("model", "architecture", "revision", "corpus_fingerprint"):
        connection.execute(f"UPDATE runs SET {column} = ? WHERE run_id = ?", [evil, run.run_id])
    settings = json.dumps({"corpus": evil, "probes": [evil], "device": evil, "dtype": evil})
    connection.execute(
        "UPDATE runs SET settings = ?, versions = ? WHERE run_id = ?", [settings, json.dumps({evil: evil}), run.run_id]
    )
    planted.insert(run, "coverage", [{"site": evil, "expected": 1, "recorded": 0, "status": "absent", "detail": evil}])
    return _page(run, tmp_path_factory.mktemp("hostile"))


def test_hostile_names_labels_and_texts_add_no_tag(hostile: Page, whole: Page) -> None:
    allowed = {tag for tag, _ in whole.tags} | {"li", "b"}
    assert {tag for tag, _ in hostile.tags} <= allowed
    for tag, attributes in hostile.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert set(attributes) <= {
            "id",
            "class",
            "style",
            "href",
            "lang",
            "charset",
            "name",
            "content",
            "open",
            "type",
            "http-equiv",
            "aria-label",
            "data-v",
            "data-figure",
        }, tag
        assert (attributes.get("href") or "#").startswith("#")


def test_hostile_text_cannot_end_a_script(hostile: Page, whole: Page) -> None:
    """A `</script>` in a label would close the figure's script and open one of its own."""
    counts = []
    for page in (hostile, whole):
        scripts = sum(tag == "script" for tag, _ in page.tags)
        counts.append(scripts - sum(tag == "div" and "data-figure" in attributes for tag, attributes in page.tags))
    assert counts[0] == counts[1]
    for tag, text in hostile.texts:
        if tag == "script" and text.startswith("{"):
            json.loads(text)


def test_hostile_texts_are_shown_as_they_are(hostile: Page, planted: ModuleType) -> None:
    for text in planted.HOSTILE[:5]:
        assert text in hostile.words


def test_direction_marks_from_outside_turn_no_words_of_ours(hostile: Page, planted: ModuleType) -> None:
    """After U+202E a browser draws the rest of the block from right to left: nothing of ours may follow it there."""
    theirs = sorted(("".join(text.split()) for text in planted.HOSTILE), key=len, reverse=True)
    for tag, text in hostile.texts:
        if tag not in ("script", "style") and "\u202e" in text:
            after = "\u202e" + "".join(text.split("\u202e", 1)[1].split())
            for known in theirs:
                after = after.replace(known, "")
            assert not re.search(r"[^\W\d_]", after), f"<{tag}> goes on after the mark: {text[:200]!r}"


@pytest.mark.slow
def test_report_of_an_incomplete_run_survives_ids_out_of_range(
    plant: Plant, planted: ModuleType, tmp_path: Path
) -> None:
    """Design, section 3: an id out of range makes the run incomplete, everywhere it is shown; so it must be shown."""
    fields = _fields(planted, ["a", "a", "b", "b"])
    fields["routers"][0].experts[3, 0] = 4096
    page = _page(plant(status="incomplete", **fields), tmp_path)
    assert "nll" in page.sections
    assert "This run is incomplete" in page.words


def test_report_of_an_incomplete_run_survives_nan_everywhere(plant: Plant, planted: ModuleType, tmp_path: Path) -> None:
    fields = _fields(planted, ["a", "a", "b", "b"])
    tokens = 4 * 40
    nan = np.full(tokens, np.nan)
    stream = planted.Stream(nan, np.full((tokens, 3), np.nan), np.zeros((tokens, 3), int), np.full(4, np.nan))
    fields |= {"streams": {0: stream}, "experts": [row | {"max_abs_out": float("nan")} for row in fields["experts"]]}
    run = plant(status="incomplete", **fields)
    run.store.connection.execute("UPDATE tokens SET nll = 'nan'::FLOAT WHERE run_id = ? AND position > 0", [run.run_id])
    page = _page(run, tmp_path)
    assert "load" in page.sections
    assert "This run is incomplete" in page.words


@pytest.mark.parametrize("name", ["report.pdf", "report", "report.htm", "report.html.txt"])
def test_other_ending_is_refused(plant: Plant, tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"ending in \.html or \.md"):
        write_report(plant(lengths=[3]), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_refused(plant: Plant, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_report(plant(lengths=[3]), tmp_path / "no" / "report.html")


def test_report_that_fails_leaves_the_one_before(plant: Plant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import moescope.report.html_page as module

    def broken(*_: object) -> str:
        raise ZeroDivisionError

    target = tmp_path / "report.html"
    target.write_text("old")
    monkeypatch.setattr(module, "html_page", broken)
    with pytest.raises(ZeroDivisionError):
        write_report(plant(lengths=[3]), target)
    assert target.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_path_may_be_text_and_is_given_back(plant: Plant, tmp_path: Path) -> None:
    assert write_report(plant(lengths=[3]), str(tmp_path / "r.html")) == tmp_path / "r.html"
