from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from moescope.analysis_api import analyze
from moescope.store.store import Store

pytestmark = pytest.mark.ui

_SPEC = importlib.util.spec_from_file_location("planted_records", Path(__file__).parents[1] / "routing" / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
records: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted_records"] = records
_SPEC.loader.exec_module(records)

CARD = "document.querySelector('.detail-title')?.textContent"
MAP = "document.querySelector('[data-panel=headmap] .heatmaplayer image')"
ROWS = "document.querySelector('#head-grid .ag-row')"


@pytest.fixture(scope="module")
def inside(serve_store: Any) -> tuple[str, Path]:
    def fill(store: Store) -> None:
        planted = records.everything(
            layers=3, n_experts=6, labels=["a", "<img src=x onerror=document.title='hit'>"] * 2
        )
        records.plant(store, records.Plan(**planted), name="full")
        records.plant(store, records.Plan(lengths=[6]), name="bare")

    return serve_store(fill)


def into_view(browser: Any, selector: str, ready: str) -> None:
    browser.wait(f"document.querySelector({selector!r})")
    browser.js(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
    browser.wait(ready)


def press(browser: Any, selector: str, across: float, down: float) -> None:
    """Click at a place of an element, as a share of its width and height."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    place = (
        f"const part = document.querySelector({selector!r}); part.scrollIntoView({{block: 'center'}});"
        "const box = part.getBoundingClientRect();"
        f"return [box.x + box.width * {across}, box.y + box.height * {down}]"
    )
    x, y = browser.js(place)
    while (moved := browser.js(place)) != [x, y]:  # figures above are still coming in
        x, y = moved
    actions = ActionChains(browser.driver)
    assert isinstance(actions.w3c_actions, ActionBuilder)
    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    actions.perform()
    actions.click().perform()


def test_the_chain_is_told_in_words_and_a_row_of_a_head_opens_its_card_and_the_lab(
    browser: Any, inside: tuple[str, Path]
) -> None:
    browser.open(inside[0] + "/phenomena?run=full", "document.querySelector('.chain-nodes')")
    assert "none by the rule" in browser.js("document.querySelector('.chain-nodes').innerText")
    into_view(browser, "#head-table", ROWS)
    name = browser.js("document.querySelector('#head-grid .ag-row[row-index=\"0\"] [col-id=name]').textContent")
    browser.click("#head-grid .ag-row[row-index='0'] [col-id=name]")
    assert browser.wait(CARD + f" === '{name}'")
    layer, head = name[1:].split("·H")
    assert browser.js("location.search") == f"?run=full&layer={layer}&head={head}"
    browser.js("document.querySelector('#mask-in-lab').click()")
    browser.wait("location.pathname === '/lab'")
    assert f"edits=mask_head+layer={layer}+heads={head}" in browser.js("location.search")
    browser.js("history.back()")
    assert browser.wait(CARD + f" === '{name}'")
    browser.js("document.querySelector('.detail .mantine-Drawer-close').click()")
    browser.wait(f"!location.search.includes('head=') && !({CARD})")


def test_another_score_is_in_the_address_and_a_shared_link_shows_it(browser: Any, inside: tuple[str, Path]) -> None:
    with Store(inside[1]) as store:
        best = analyze(store.run("full"), "head_map", metric="induction").df().sort_values("value").iloc[-1]
    name = f"L{best['layer']}·H{best['head']}"
    browser.open(inside[0] + "/phenomena?run=full&measure=induction", "document.querySelector('#head-table')")
    into_view(browser, "#head-table", ROWS)
    first = "document.querySelector('#head-grid .ag-row[row-index=\"0\"] [col-id=name]')?.textContent"
    assert browser.wait(first) == name
    into_view(browser, "[data-panel=headmap]", MAP)
    assert name in browser.js("document.querySelector('[data-panel=headmap] .panel-heading').innerText")
    chosen = browser.js("document.querySelector('.phenomena-page .controls input').value")
    assert chosen == "Induction score"
    press(browser, "[data-panel=headmap] .nsewdrag", 0.99, 0.99)
    assert browser.wait(CARD + " === 'L2·H3'")
    assert browser.js("location.search") == "?run=full&measure=induction&layer=2&head=3"


def test_a_cell_of_the_map_leads_to_its_token(browser: Any, inside: tuple[str, Path]) -> None:
    with Store(inside[1]) as store:
        frame = analyze(store.run("full"), "massive_map").df()
        token = int(frame[(frame["layer"] == 0) & (frame["first"] == 0)]["token"].iloc[0])
    browser.open(inside[0] + "/phenomena?run=full", "document.querySelector('[data-panel=massivemap]')")
    into_view(
        browser, "[data-panel=massivemap]", "document.querySelector('[data-panel=massivemap] .heatmaplayer image')"
    )
    press(browser, "[data-panel=massivemap] .nsewdrag", 0.01, 0.1)
    browser.wait(f"location.search.includes('token={token}') && document.querySelector('#token-link')")
    browser.js("document.querySelector('#token-link').click()")
    browser.wait(f"location.pathname === '/tokens' && location.search.includes('token={token}')")


def test_a_head_that_is_not_there_is_refused_in_its_place_and_the_rest_stays(
    browser: Any, inside: tuple[str, Path]
) -> None:
    browser.open(
        inside[0] + "/phenomena?run=full&layer=1&head=99&measure=wit", "document.querySelector('.detail .refusal')"
    )
    assert "heads 0 to 3 of that layer" in browser.js("document.querySelector('.detail .refusal').innerText")
    assert "no wit" in browser.wait("document.querySelector('#head-table .refusal')?.innerText")
    assert browser.js("document.title") != "hit"


def test_a_run_without_phenomena_leads_to_one_that_has_some(browser: Any, inside: tuple[str, Path]) -> None:
    browser.open(inside[0] + "/phenomena?run=bare", "document.querySelector('.empty .command')")
    assert "moescope phenomena planted --store" in browser.js("document.querySelector('.empty .command').innerText")
    browser.js("[...document.querySelectorAll('.empty a')].find((link) => link.textContent === 'full').click()")
    browser.wait("location.search === '?run=full' && document.querySelector('.chain-nodes')")
    assert browser.complaints() == []
