from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.analysis_api import analyze
from moescope.dashboard.routing_page import body
from moescope.store.store import Store

pytestmark = pytest.mark.ui
FIRST = "document.querySelector('[data-panel=routing-balance] .js-plotly-plot')"
CURRENT = "document.querySelector('.tab-link[aria-current]')?.textContent"
CARD = "document.querySelector('[data-simulator={}] .sim-card .card-value')?.textContent"


@pytest.fixture(scope="module")
def values(serve_store: Callable[..., Any], plan: Any, plant: Any) -> tuple[str, dict[int, str]]:
    """A served run, and the hit rate of LRU at each size as its card writes it."""
    found: dict[int, str] = {}

    def fill(store: Store) -> None:
        run = plant(store, plan(texts=plan().texts * 20))
        frame = analyze(run, "expert_cache", policy="lru").df()
        for row in frame[frame["layer"].isna()].to_dict("records"):
            found[row["size"]] = f"{100 * row['value']:.1f} %"

    return serve_store(fill)[0], found


def test_tabs_change_the_address_and_keep_the_page_and_what_was_set(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/routing?run=planted", FIRST)
    browser.js("document.querySelector('.tab-links').dataset.kept = 'yes'")
    browser.js("document.querySelector('[data-tab=capacity]').click()")
    browser.wait("document.querySelector('[data-simulator=capacity]')")
    assert browser.js("location.search") == "?run=planted&tab=capacity"
    assert browser.js(CURRENT) == "Capacity"
    browser.js("window.moescope.change({priority: 'token'})")
    browser.js("document.querySelector('[data-tab=balance]').click()")
    browser.wait(FIRST)
    assert browser.js("location.search") == "?run=planted"
    browser.js("document.querySelector('[data-tab=capacity]').click()")
    browser.wait("document.querySelector('[data-simulator=capacity]')")
    assert "priority=token" in browser.js("location.search"), "what was set on a tab is there again"
    browser.js("history.back()")
    browser.wait(CURRENT + " === 'Balance'")
    browser.wait(FIRST)
    assert browser.js("document.querySelector('.tab-links').dataset.kept") == "yes", "the page was not loaded again"
    assert browser.complaints() == []


def test_arrow_keys_walk_the_tabs_and_enter_opens_one(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(moe[0] + "/routing?run=planted", FIRST)
    browser.js("document.querySelector('.tab-link').focus()")
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    assert browser.js("document.activeElement.dataset.tab") == "placement"
    browser.driver.switch_to.active_element.send_keys(Keys.ENTER)
    browser.wait(CURRENT + " === 'Placement'")
    browser.wait("document.querySelector('[data-simulator=placement]')")


def test_the_slider_moves_cards_marker_and_address(browser: Any, values: tuple[str, dict[int, str]]) -> None:
    from selenium.webdriver.common.keys import Keys

    address, rates = values
    browser.open(address + "/routing?tab=cache&slots=2", CARD.format("cache"))
    browser.wait(
        "document.querySelector('[data-panel=routing-expert-cache] .js-plotly-plot')?.layout.shapes?.length > 0"
    )
    assert browser.js(CARD.format("cache")) == rates[2]
    browser.js("document.querySelector('[data-simulator=cache] [role=slider]').focus()")
    assert browser.js("document.activeElement.getAttribute('aria-label')") == "Slots a layer"
    browser.driver.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    browser.wait(CARD.format("cache") + f" === '{rates[3]}'")
    marker = "document.querySelector('[data-panel=routing-expert-cache] .js-plotly-plot').layout.shapes.at(-1).x0"
    browser.wait(marker + " === 3")
    browser.wait("location.search.includes('slots=3')")
    browser.wait(
        "document.querySelector('[data-simulator=prefetch] [role=slider]').getAttribute('aria-valuenow') === '3'"
    )
    browser.js("history.back()")
    browser.wait(CARD.format("cache") + f" === '{rates[2]}'")
    link = browser.js("document.querySelector('[data-simulator=cache] .card-link').getAttribute('href')")
    browser.js("document.querySelector('[data-simulator=cache] .card-link').click()")
    browser.wait("location.pathname === '/tokens' && document.querySelector('#token-heading .sentence')")
    assert browser.js("location.pathname + location.search") == link
    assert browser.complaints() == []


def test_a_policy_changes_the_cards_without_a_new_answer(browser: Any, values: tuple[str, dict[int, str]]) -> None:
    browser.open(values[0] + "/routing?tab=cache&slots=2", CARD.format("cache"))
    browser.js("window.moescope.change({policy: 'belady'})")
    browser.wait("document.querySelector('[data-simulator=cache] .card-label').textContent === 'Hit rate, Belady'")
    cards = browser.js(
        "[...document.querySelectorAll('[data-simulator=cache] .card-value')].slice(0, 2).map((c) => c.textContent)"
    )
    assert cards[0] == cards[1], "Belady is the best there is"


def test_a_way_in_the_diagram_leads_to_its_tokens(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(
        moe[0] + "/routing?run=planted&tab=paths&layers=2",
        "document.querySelector('[data-panel=routing-path-map] .sankey-link')",
    )
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    link = browser.driver.find_element(By.CSS_SELECTOR, ".sankey-link")
    ActionChains(browser.driver).move_to_element(link).click().perform()
    browser.wait("location.search.includes('way=0:')")
    title = browser.wait("document.querySelector('.detail-title')?.textContent")
    assert title.startswith("L0·E")
    href = browser.js("document.querySelector('.way-list td a').getAttribute('href')")
    assert href.startswith("/tokens?run=planted&layer=1&expert=")
    browser.js("document.querySelector('.detail .mantine-Drawer-close').click()")
    browser.wait("!location.search.includes('way=')")
    assert browser.wait("document.querySelector('#path-grid .ag-row a')?.getAttribute('href')").startswith("/routing?")
    assert browser.complaints() == []


def test_a_long_computation_waits_to_be_asked_for(
    browser: Any, moe: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body, "choices", lambda run: 25_000_000)
    browser.open(moe[0] + "/routing?run=second&tab=cache", "document.querySelector('.ask-first button')")
    assert not browser.js("document.querySelector('[data-panel=routing-expert-cache]')")
    browser.js("document.querySelector('.ask-first button').click()")
    browser.wait("document.querySelector('[data-panel=routing-expert-cache] .js-plotly-plot')")
    browser.wait(CARD.format("cache"))
    assert browser.complaints() == []


def test_hostile_pieces_on_a_way_are_text(
    browser: Any, serve_store: Callable[..., Any], plan: Any, plant: Any, text: Any
) -> None:
    raw = [
        b"<img src=x onerror=window.hit=1>",
        b"</script><script>window.hit=1</script>",
        "\u202eabc".encode(),
        b"\x1b[31m\x00",
    ]
    address, _ = serve_store(lambda store: plant(store, plan(texts=[text("<b onclick=1>", raw * 20)] * 4)))
    browser.open(address + "/routing?tab=paths", "document.querySelector('#path-grid .ag-row a')")
    browser.js("document.querySelector('#path-grid .ag-row a').click()")
    browser.wait("document.querySelector('.way-list .piece')")
    said = browser.js("document.querySelector('.way-list').textContent")
    assert "<img" in said or "<script>" in said or "abc" in said
    assert browser.js("window.hit") is None
    assert browser.js("document.querySelectorAll('.way-list img, .way-list script').length") == 0


@pytest.mark.parametrize(
    "search", ["?tab=nothing", "?tab=routers", "?tab=paths&way=9:9-1:1", "?tab=consistency&segment=x"]
)
def test_an_address_that_cannot_be_shown_says_why(browser: Any, moe: tuple[str, Path], search: str) -> None:
    browser.open(moe[0] + "/routing" + search, "document.querySelector('.refusal')")
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
