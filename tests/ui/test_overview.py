"""The overview in a browser: two runs ticked are compared, findings arrive and open, the address holds what is chosen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui

SHOWN = "document.querySelectorAll('#ov-runs .ag-row').length > 0"
DONE = "/findings of/.test(document.querySelector('#ov-progress')?.textContent || '')"
HOSTILE = "<script>alert(1)</script>\u202e<img src=x onerror=alert(2)>"


@pytest.fixture(scope="module")
def pair(serve_store: Callable[..., Any], plan: Any, plant: Any) -> tuple[str, Path]:
    def fill(store: Store) -> None:
        plant(store, plan(name="older"))
        plant(store, plan(name=HOSTILE, seed=1, status="incomplete"))
        plant(store, plan(name="newer", seed=2))

    return serve_store(fill)


@pytest.fixture(autouse=True)
def _leave(browser: Any) -> Any:
    """Findings are asked for while the page is open: leave it, so that nothing computes when the server stops."""
    yield
    browser.driver.get("about:blank")


def _tick(browser: Any, name: str) -> None:
    """Tick the box of a run's row."""
    browser.js(
        "const row = [...document.querySelectorAll('#ov-runs .ag-row')].find((r) => r.textContent.includes(arguments[0]));"
        "row.querySelector('input[type=checkbox]').click(); return 1",
        name,
    )


def test_two_ticked_runs_are_compared_the_older_first(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=newer", SHOWN)
    button = "document.querySelector('#ov-compare')"
    assert browser.js(f"{button}.disabled && {button}.textContent === 'Tick two to compare'")
    browser.wait("/3\\.|\\d/.test(document.querySelector('#ov-runs [col-id=bytes].ag-cell')?.textContent)")
    _tick(browser, "newer")
    assert browser.js(f"{button}.disabled")
    _tick(browser, "older")
    browser.wait(f"!{button}.disabled")
    browser.click("#ov-compare")
    browser.wait("location.pathname === '/compare'")
    assert browser.js("location.search") == "?run=older&other=newer"
    assert browser.complaints() == []


def test_runs_show_why_one_is_incomplete_and_hostile_names_as_text(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=newer", SHOWN)
    said = browser.js("document.querySelector('#ov-runs').innerText")
    assert "▲ incomplete" in said
    assert "3 events are missing" in said
    assert "<script>alert(1)</script>" in said
    assert browser.js("document.querySelectorAll('#ov-runs script, #ov-runs img').length") == 0
    assert browser.complaints() == []


def test_a_click_on_a_run_opens_it(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=newer", SHOWN)
    browser.js("[...document.querySelectorAll('#ov-runs a')].find((a) => a.textContent === 'older').click()")
    browser.wait("location.search === '?run=older'")
    browser.wait("document.querySelector('#run-picker')?.value === 'older'")


def test_findings_arrive_open_and_close_with_back(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=newer", SHOWN)
    browser.wait(DONE, 60)
    total = int(browser.js("return document.querySelector('#ov-progress').textContent.split(' findings')[0]"))
    assert total > 10
    href = browser.js("document.querySelector('#ov-findings a.cell-link').getAttribute('href')")
    name = href.partition("finding=")[2]
    browser.js("document.querySelector('#ov-findings a.cell-link').click()")
    browser.wait(f"new URLSearchParams(location.search).get('finding') === '{name}'")
    title = browser.js("document.querySelector('#ov-findings a.cell-link').textContent")
    browser.wait(f"document.querySelector('.ov-chosen .section-title')?.textContent === {title!r}")
    browser.js("history.back()")
    browser.wait("!document.querySelector('.ov-chosen')")
    assert browser.complaints() == []


def test_cancelled_findings_stop_and_go_on(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=older", SHOWN)
    browser.js(
        "window.stop = setInterval(() => { if (/^[1-9]\\d* of/.test(document.querySelector('#ov-progress').textContent)) {"
        " clearInterval(window.stop); document.querySelector('#ov-cancel').click(); } }, 10); return 1"
    )
    browser.wait("/cancelled/.test(document.querySelector('#ov-progress').textContent) || " + DONE, 30)
    if not browser.js(f"return {DONE}"):
        browser.click("#ov-cancel")
        browser.wait(DONE, 60)
    rows = browser.js("return document.querySelector('#ov-progress').textContent")
    assert int(rows.split()[0]) > 10


def test_a_shared_link_shows_the_finding_the_measure_and_the_layer(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(
        pair[0] + "/?run=newer&layer=1&finding=load&measure=load_cv",
        "document.querySelector('.ov-chosen .js-plotly-plot') && document.querySelector('.ov-layer-links')",
    )
    assert browser.js("document.querySelector('.ov-layer-links').textContent.startsWith('L1: ')")
    browser.js("document.querySelector('#map').scrollIntoView()")
    browser.wait("/^CV of expert load/.test(document.querySelector('#map .panel-heading')?.innerText || '')")
    assert browser.complaints() == []


def test_the_measure_is_chosen_in_the_page_and_kept_in_the_address(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/?run=newer", SHOWN)
    browser.js("document.querySelector('#map').scrollIntoView()")
    browser.wait("document.querySelector('#map .js-plotly-plot')")
    assert "8 measures" in browser.js("document.querySelector('#map .panel-heading').innerText")
    browser.js("window.moescope.change({ measure: 'residual_norm' })")
    browser.wait("/residual norm/i.test(document.querySelector('#map .panel-heading').innerText)")
    assert browser.js("[...document.querySelectorAll('#map input')].some((i) => i.value.startsWith('residual norm'))")


@pytest.mark.parametrize("search", ["?finding=astrology", "?measure=charm", "?layer=99"])
def test_an_address_that_cannot_be_shown_says_so(browser: Any, pair: tuple[str, Path], search: str) -> None:
    browser.open(pair[0] + "/" + search, SHOWN)
    browser.js("document.querySelector('#map').scrollIntoView()")
    browser.wait("document.querySelector('.refusal') || /no layer 99/.test(document.body.innerText)")
    assert browser.complaints() == []
