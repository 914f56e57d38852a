from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ui
READY = "document.querySelector('#run-picker')?.value === 'planted' && document.querySelector('.page h1')"
NAMES = "[...document.querySelectorAll('.palette-entry .palette-name')].map((e) => e.textContent)"


@pytest.fixture
def palette(browser: Any, moe: tuple[str, Path]) -> Any:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    start = "/analyses?run=planted&edits=top_k+k=1"
    if browser.js("return location.origin") == moe[0]:
        browser.js(f"document.querySelector('dialog')?.close(); window.moescope.open('{start}'); return 1")
        browser.wait(f"location.pathname + location.search === '{start}' && {READY}")
        browser.js("document.activeElement.blur()")
    else:
        browser.open(moe[0] + start, READY)
    browser.wait("!document.querySelector('dialog')")
    browser.driver.find_element("css selector", "body").click()  # keys go to the page, wherever the last test left them
    ActionChains(browser.driver).key_down(Keys.CONTROL).send_keys("k").key_up(Keys.CONTROL).perform()
    browser.wait("document.activeElement.id === 'palette-text'")
    return browser


def typed(browser: Any, text: str) -> list[str]:
    browser.type("#palette-text", text)
    names: list[str] = browser.js(NAMES)
    return names


def test_it_opens_with_pages_and_their_keys(palette: Any) -> None:
    assert palette.js(NAMES)[0] == "Overview"
    assert palette.js("[...document.querySelectorAll('.palette-entry')][0].querySelectorAll('kbd').length") == 2


@pytest.mark.parametrize("text", ["L1·E2", "l1e2", "1.2", "L1 E2"])
def test_an_expert_may_be_typed(palette: Any, text: str) -> None:
    assert typed(palette, text)[:2] == ["L1·E2", "L1·E2"]
    palette.type("#palette-text", "\ue007")
    palette.wait("location.pathname === '/experts'")
    assert palette.js("location.search") == "?run=planted&layer=1&expert=2&edits=top_k+k=1"
    assert palette.js("document.querySelector('dialog')") is None


@pytest.mark.parametrize("text", ["L1·E4", "L9·E0", "#999999", "L9·H1", "zzzz"])
def test_what_the_run_does_not_have_is_not_offered(palette: Any, text: str) -> None:
    assert typed(palette, text) == []
    assert "Nothing of that name" in palette.js("document.querySelector('.palette-list').innerText")


@pytest.mark.parametrize(
    ("text", "name", "path", "part"),
    [
        ("#12", "token 12", "/tokens", "token=12"),
        ("L1 H0", "L1·H0", "/phenomena", "head=0"),
        ("f17", "feature 17", "/features", "feature=17"),
        ("router entropy", "router entropy", "/analyses", "analysis=router_entropy"),
        ("tokens", "Tokens", "/tokens", "run=planted"),
    ],
)
def test_a_name_leads_to_its_place(palette: Any, text: str, name: str, path: str, part: str) -> None:
    assert typed(palette, text)[0] == name
    palette.type("#palette-text", "\ue007")
    palette.wait(f"location.pathname === '{path}'")
    assert part in palette.js("location.search")


def test_a_question_finds_its_analysis(palette: Any) -> None:
    assert "router entropy" in typed(palette, "undecided each router")


def test_a_run_is_chosen_by_name(palette: Any) -> None:
    assert typed(palette, "second")[0] == "second"
    palette.type("#palette-text", "\ue007")
    palette.wait("document.querySelector('#run-picker')?.value === 'second'")


def test_arrows_move_and_escape_closes(palette: Any) -> None:
    palette.type("#palette-text", "\ue015\ue015")
    assert palette.js("document.querySelector('#palette-list [aria-selected=true]').id") == "palette-2"
    assert palette.js("document.querySelector('#palette-text').getAttribute('aria-activedescendant')") == "palette-2"
    palette.type("#palette-text", "\ue00c")
    palette.wait("!document.querySelector('dialog')")


def test_it_changes_the_colours(palette: Any) -> None:
    before = palette.js("document.documentElement.getAttribute('data-mantine-color-scheme')")
    typed(palette, "light or dark")
    palette.type("#palette-text", "\ue007")
    palette.wait(f"document.documentElement.getAttribute('data-mantine-color-scheme') !== '{before}'")
    palette.js("document.getElementById('scheme').click()")
    palette.wait(f"document.documentElement.getAttribute('data-mantine-color-scheme') === '{before}'")
    palette.js("localStorage.clear()")


def test_foreign_names_are_text(browser: Any, serve_store: Any, plan: Any, plant: Any) -> None:
    name = "<img src=x onerror=alert(1)>\u202e"
    url, _ = serve_store(lambda store: plant(store, plan(name=name)))
    browser.open(
        f"{url}/analyses", "document.querySelector('#run-picker')?.value && document.querySelector('.page h1')"
    )
    browser.js("window.moescope.palette.open()")
    browser.type("#palette-text", "onerror")
    assert browser.js(NAMES) == [name]
    assert browser.js("document.querySelector('dialog img')") is None
    assert browser.complaints() == []
