from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ui
TIMINGS = logging.getLogger("timings")

READY = {
    "/": "document.querySelectorAll('#coverage-grid .ag-row, .empty').length > 0",
    "/experts": "document.querySelector('#atlas .heatmaplayer image') && document.querySelector('#expert-grid .ag-row')"
    " || document.querySelector('.empty')",
    "/tokens": "document.querySelector('#tokview[data-ready=painted] .tok') || document.querySelector('.empty')",
}


@pytest.fixture(scope="module")
def kinds(serve_store: Callable[..., Any], plan: Any, plant: Any, moe: tuple[str, Path]) -> dict[str, str]:
    return {
        "moe": moe[0],
        "dense": serve_store(lambda store: plant(store, plan(moe=False)))[0],
        "incomplete": serve_store(lambda store: plant(store, plan(status="incomplete")))[0],
        "empty": serve_store(lambda store: None)[0],
    }


@pytest.mark.parametrize("path", list(READY))
@pytest.mark.parametrize("kind", ["moe", "dense", "incomplete", "empty"])
def test_a_page_loads_quietly_and_asks_no_one_else(browser: Any, kinds: dict[str, str], kind: str, path: str) -> None:
    seconds = browser.open(kinds[kind] + path, READY[path])
    TIMINGS.info("%s of a %s store: useful after %.2f s", path, kind, seconds)
    assert browser.complaints() == []
    strangers = {
        url for url in browser.asked_for() if not url.startswith((kinds[kind] + "/", "data:", "blob:", "about:"))
    }
    assert strangers == set()
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
        "no sideways scrolling"
    )
    page = browser.js("document.body.innerText")
    assert "could not be made" not in page
    assert ("incomplete run" in page) == (kind == "incomplete")
    assert ("moescope profile demo --store" in page) == (kind == "empty")


def test_the_run_picker_changes_the_run_and_keeps_the_page(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens", READY["/tokens"])
    assert browser.js("location.search") == "?run=planted", "the run that is shown is written into the address"
    browser.click("#run-picker")
    browser.wait("[...document.querySelectorAll('[role=option]')].some((o) => o.textContent === 'second')")
    browser.js("[...document.querySelectorAll('[role=option]')].find((o) => o.textContent === 'second').click()")
    browser.wait("document.querySelector('#token-heading')?.textContent.startsWith('21 tokens')")
    assert browser.js("location.pathname + location.search") == "/tokens?run=second"


@pytest.mark.parametrize(
    "search",
    [
        "?run=nobody",
        "?layer=77",
        "?expert=99&layer=0",
        "?sequence=123456",
        "?token=999999",
        "?page=7",
        "?label=x",
        "?mode=x",
    ],
)
def test_an_address_that_cannot_be_shown_is_answered_with_the_reason(
    browser: Any, moe: tuple[str, Path], search: str
) -> None:
    browser.open(moe[0] + "/tokens" + search, "document.querySelector('.refusal')")
    said = browser.js("document.querySelector('.refusal').innerText")
    assert "What to do:" in said or "Found:" in said
    assert browser.complaints() == []
