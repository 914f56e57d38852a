"""Every page on every kind of store: quiet, complete in itself, and without a word to anyone else."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest

import moescope as ms
from moescope.core.pages import pages
from moescope.store.store import Store

pytestmark = pytest.mark.ui
TIMINGS = logging.getLogger("timings")
PATHS = [page.path for page in sorted(pages, key=lambda page: page.order)]
KINDS = (
    "everything",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("moe", "dense", "trace", "incomplete")),
    "empty",
)


def _planted_routing() -> ModuleType:
    path = Path(__file__).parents[1] / "routing" / "planted.py"
    name = "moescope_tests_planted_for_pages"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def _everything(store: Store) -> None:
    planted = _planted_routing()
    fields = planted.everything(layers=4, n_experts=8, labels=["a", "b", None, "a", "b", None])
    planted.plant(store, planted.Plan(**fields | {"features": False}), name="other")  # autoencoders are the store's
    planted.plant(store, planted.Plan(**fields), name="everything")


def _trace(store: Store) -> None:
    rows = [
        {"sequence_id": s, "position": p, "layer": layer, "experts": [(s + p + layer) % 8, (s + p + layer + 3) % 8]}
        for s in range(3)
        for p in range(20)
        for layer in (1, 2)
    ]
    store.import_trace(pa.Table.from_pylist(rows), name="trace", n_experts=8)


@pytest.fixture(scope="module")
def addresses(serve_store: Callable[..., Any], plan: Any, plant: Any, moe: tuple[str, Path]) -> dict[str, str]:
    return {
        "everything": serve_store(_everything)[0],
        "moe": moe[0],
        "dense": serve_store(lambda store: plant(store, plan(moe=False)))[0],
        "trace": serve_store(_trace)[0],
        "incomplete": serve_store(lambda store: plant(store, plan(status="incomplete")))[0],
        "empty": serve_store(lambda store: None)[0],
    }


def _opened(browser: Any, url: str) -> float:
    """Open a page and wait until all it asked for is there; seconds to its heading."""
    seconds: float = browser.open(url, "document.querySelector('.page-title')")
    browser.settle(120)
    return seconds


def _scroll_through(browser: Any) -> None:
    """Bring every part of the page into view once, as a reader would."""
    height = browser.js("document.documentElement.scrollHeight")
    for top in range(0, min(height, 12_000), 700):
        browser.js(f"window.scrollTo(0, {top}); return 1")
        browser.settle()


def _names_what_it_shows(browser: Any, path: str) -> None:
    """Title, heading and a name for each control."""
    page = next(p for p in pages if p.path == path)
    assert browser.js("document.title") == f"{page.name} · moescope"
    assert browser.js("[...document.querySelectorAll('h1')].map((h) => h.textContent)") == [page.name]
    unnamed = browser.js(
        """
        return [...document.querySelector('#page').querySelectorAll(
            'button, input:not([type=hidden], [type=file]), textarea, select, a')]
          .filter((e) => e.offsetParent !== null && !e.closest('.modebar, .ag-root-wrapper, [aria-hidden=true]'))
          .filter((e) => e.tabIndex >= 0 && !(e.textContent || e.getAttribute('aria-label') || e.getAttribute('aria-labelledby') || e.title
            || (e.labels && e.labels.length) || e.placeholder))
          .map((e) => e.outerHTML.slice(0, 200))
        """
    )
    assert unnamed == []


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_loads_quietly_names_its_parts_and_asks_no_one_else(
    browser: Any, addresses: dict[str, str], kind: str, path: str
) -> None:
    seconds = _opened(browser, addresses[kind] + path)
    TIMINGS.info("%s of a %s store: first text after %.2f s", path, kind, seconds)
    _names_what_it_shows(browser, path)
    _scroll_through(browser)
    assert browser.complaints() == []
    own = (addresses[kind] + "/", "data:", "blob:", "about:")
    assert {url for url in browser.asked_for() if not url.startswith(own)} == set()
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), (
        "no sideways scroll"
    )
    said = browser.js("document.body.innerText")
    assert "could not be made" not in said
    assert "NaN" not in said
    assert "undefined" not in said
    run_is_shown = kind == "incomplete" and next(p for p in pages if p.path == path).needs_run
    assert not run_is_shown or "incomplete run" in said
    without_runs = kind == "empty" and next(p for p in pages if p.path == path).needs_run
    assert not without_runs or "moescope profile demo --store" in said, "what to do to fill the store"


def test_the_pages_are_those_that_were_promised() -> None:
    assert {
        "/",
        "/tokens",
        "/experts",
        "/routing",
        "/phenomena",
        "/features",
        "/lab",
        "/compare",
        "/sql",
        "/work",
    } <= set(PATHS)
    assert len({page.path for page in pages}) == len(list(pages))


@pytest.mark.slow
def test_a_real_recording_shows_on_every_page(browser: Any, serve_store: Callable[..., Any]) -> None:
    texts = [
        {"text": f"The {word} sat on the mat and looked at it.", "label": word[0]} for word in ("cat", "dog", "cow")
    ]
    url, _ = serve_store(lambda store: ms.record(ms.load("demo"), texts, store, name="demo", progress=False))
    for path in PATHS:
        _opened(browser, url + path)
        _scroll_through(browser)
        assert browser.complaints() == [], path
        assert "could not be made" not in browser.js("document.body.innerText"), path
