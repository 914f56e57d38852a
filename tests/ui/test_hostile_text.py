from __future__ import annotations

import time
from typing import Any
from urllib.parse import quote

import pytest

from moescope.core.pages import pages
from moescope.store.store import Store

pytestmark = pytest.mark.ui
NAME = "</script><script>window.ran=1</script>\u202e&amp;'\""
LABEL = "<img src=x onerror=window.ran=2>"
SOURCE = "javascript:window.ran=3"
TOKENS = [
    b"<bos>",
    b"<script>window.ran=4</script>",
    b"</script>",
    b"<img src=x onerror=window.ran=5>",
    "\u202egnihtemos".encode(),
    b"\x00\x01\x1b[31m",
    b"{{7*7}}${7*7}",
    b"x" * 100_000,
    b"\n",
    b"\xff\xfe",
    b"\xe2\x80",
    b"end",
]
READY = {
    "/": "document.querySelector('#coverage-grid .ag-row')",
    "/experts": "document.querySelector('#atlas .heatmaplayer image') && document.querySelector('#expert-grid .ag-row')"
    " && document.querySelector('.passage')",
    "/tokens": "document.querySelector('#tokview[data-ready=painted] .tok') && document.querySelector('.path')",
}
SEARCH = {"/": "", "/experts": "?layer=0&expert=0", "/tokens": "?token=1&q=%3Cscript%3E"}


@pytest.fixture(scope="module")
def hostile(serve_store: Any, plan: Any, text: Any, plant: Any) -> str:
    def fill(store: Store) -> None:
        plant(
            store,
            plan(
                name=NAME,
                status="incomplete",
                texts=[text(LABEL, TOKENS, source=SOURCE), text(NAME, [b"<bos>", NAME.encode()])],
            ),
        )
        store.connection.execute(
            "UPDATE runs SET model = ?, revision = ?, settings = json_object('probes', ?)", [LABEL, NAME, LABEL]
        )
        store.connection.execute("UPDATE coverage SET detail = ?", [LABEL])

    url: str
    url, _ = serve_store(fill)
    return url


@pytest.mark.parametrize("path", list(READY))
def test_text_from_outside_is_only_ever_text(browser: Any, hostile: str, path: str) -> None:
    browser.open(hostile + path + SEARCH[path], READY[path])
    assert browser.js("typeof window.ran") == "undefined"
    assert browser.js("document.querySelectorAll('img[src=x], script:not([src]):not([id])').length") <= 1, (
        "at most the framework's own inline script"
    )
    assert "window.ran" in browser.js("document.body.innerText"), "it is shown"
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_hostile_tokens_stay_in_their_place(browser: Any, hostile: str) -> None:
    browser.open(hostile + "/tokens" + SEARCH["/tokens"], READY["/tokens"])
    shown = browser.js("return [...document.querySelectorAll('.tok')].slice(0, 8).map((t) => t.textContent)")
    assert shown[1] == "<script>window.ran=4</script>"
    assert shown[4] == "⟨202E⟩gnihtemos"
    assert shown[5] == "␀␁␛[31m"
    assert browser.js(
        "return [...document.querySelectorAll('.tok')].every((t) => getComputedStyle(t).unicodeBidi === 'isolate')"
    )
    widest = browser.js(
        "return Math.max(...[...document.querySelectorAll('.tokline')].map((l) => l.scrollWidth - l.clientWidth))"
    )
    assert widest <= 0, "a token of 100,000 characters is broken into lines"


def test_the_label_of_a_filter_is_text_in_every_place(browser: Any, hostile: str) -> None:
    browser.open(f"{hostile}/tokens?label={quote(LABEL)}", READY["/tokens"].split(" && ")[0])
    assert browser.js("document.querySelector('.clause .foreign').textContent") == f"label = {LABEL}"
    assert browser.js("typeof window.ran") == "undefined"


# Addresses that put hostile text where a page reads it, beside what each page shows by itself.
EVERY = sorted(page.path for page in pages)
ASKED = ("", f"&label={quote(LABEL)}&sae={quote(NAME)}&q={quote(NAME)}&edits={quote(LABEL)}&tab={quote(NAME)}")


@pytest.mark.parametrize(
    "asked", [pytest.param(ASKED[0], marks=pytest.mark.slow), ASKED[1]], ids=["as it opens", "hostile address"]
)
@pytest.mark.parametrize("path", EVERY)
def test_no_page_runs_what_it_shows(browser: Any, hostile: str, path: str, asked: str) -> None:
    browser.open(f"{hostile}{path}?run={quote(NAME)}{asked}", "document.querySelector('.page-title')")
    browser.settle()
    time.sleep(0.2)  # parts that ask once they have come into view
    browser.settle()
    assert browser.js("document.querySelector('#run-picker').value") == NAME
    assert browser.js("typeof window.ran") == "undefined"
    assert browser.js("document.querySelectorAll('img[src=x], [onerror]').length") == 0
    assert browser.js("document.querySelectorAll('script:not([src]):not([id])').length") <= 1
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
