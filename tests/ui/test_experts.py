from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui
READY = "document.querySelector('#atlas .heatmaplayer image') && document.querySelector('#expert-grid .ag-row')"
CARD = "document.querySelector('.detail .detail-title')?.textContent"
LINE = "document.getElementById('atlas-line').textContent"
FIRST = "document.querySelector('#expert-grid .ag-row [col-id=name]')?.textContent"


def point(browser: Any, right: float, down: float) -> None:
    """Move the mouse to a place of the map, in shares of its width and height."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    box = browser.js(
        "const box = document.querySelector('#atlas .nsewdrag[data-subplot=xy]').getBoundingClientRect();"
        f"return [box.x + box.width * {right}, box.y + box.height * {down}]"
    )
    actions = ActionChains(browser.driver)
    assert isinstance(actions.w3c_actions, ActionBuilder)
    actions.w3c_actions.pointer_action.move_to_location(int(box[0]), int(box[1]))
    actions.perform()


def hover(browser: Any, right: float, down: float, name: str) -> str:
    """Point at a cell, again where the map was drawn anew meanwhile; what the line says of it."""
    end = time.monotonic() + 40
    step = 0
    while time.monotonic() < end:
        step += 1
        point(browser, right + 0.01 * (step % 2), down)
        time.sleep(0.2)
        if (said := str(browser.js(LINE))).startswith(f"{name} · "):
            return said
    raise AssertionError(f"the line never told of {name}: {browser.js(LINE)}")


def click(browser: Any) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser.driver).click().perform()


def keys(browser: Any, *names: str) -> None:
    """Press keys where the focus is."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(browser.driver).send_keys(*[getattr(Keys, name) for name in names]).perform()


def test_a_row_and_a_cell_open_the_expert_card_and_its_count_leads_to_the_tokens(
    browser: Any, moe: tuple[str, Path]
) -> None:
    browser.open(moe[0] + "/experts?run=planted", READY)
    name = browser.wait(FIRST)
    browser.click("#expert-grid .ag-row [col-id=name]")
    assert browser.wait(CARD + f" === '{name}'")
    browser.js("document.querySelector('.detail .mantine-Drawer-close').click()")
    browser.wait("location.search === '?run=planted' && !document.querySelector('.detail-title')?.offsetParent")
    hover(browser, 0.62, 0.75, "L1·E2")
    time.sleep(1)  # the map had another width while the panel was open
    hover(browser, 0.62, 0.75, "L1·E2")
    click(browser)
    assert browser.wait(CARD + " === 'L1·E2'"), "the closed panel keeps its last card until the next one is there"
    assert browser.js("location.search") == "?run=planted&layer=1&expert=2"
    count = browser.js("document.querySelector('.detail .card-detail').textContent.split(' of ')[0]")
    browser.js("document.querySelector('.detail .card-link').click()")
    browser.wait("location.pathname === '/tokens' && document.querySelector('#token-heading .sentence')")
    heading = browser.js("document.querySelector('#token-heading').innerText")
    assert heading.startswith(f"{count} ")
    assert "of 630 tokens" in heading
    assert browser.complaints() == []


def test_the_line_tells_the_value_of_the_cell_and_no_label_jumps_about(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted&measure=weight", READY)
    said = hover(browser, 0.375, 0.25, "L0·E1")
    with Store(moe[1]) as store:
        weight, tokens = store.fetch(
            """
            SELECT sum(weight_sum) / sum(tokens), sum(tokens)
            FROM loads l
            JOIN runs r USING (run_id)
            WHERE r.name = 'planted' AND layer = 0 AND expert = 1
            """
        )[0]
    assert float(said.split(" · ")[1].split(" ")[0]) == pytest.approx(weight, rel=1e-3)
    assert f"n = {tokens:,}" in said
    shown = "[...document.querySelectorAll('#atlas .hovertext')].map((t) => getComputedStyle(t).visibility)"
    assert set(browser.js(shown)) <= {"hidden"}
    assert browser.js("document.querySelector('#atlas .atlas-cell').checkVisibility()")


def test_arrow_keys_move_the_cell_and_enter_opens_its_card(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted&sort=load", READY)
    browser.wait("document.querySelector('#atlas .js-plotly-plot')._atlas")
    browser.js("document.getElementById('atlas').focus()")
    keys(browser, "ARROW_DOWN")
    browser.wait(LINE + ".startsWith('L0·')")
    keys(browser, "ARROW_DOWN", "ARROW_RIGHT")
    with Store(moe[1]) as store:
        second = store.fetch(
            """
            SELECT expert
            FROM loads l
            JOIN runs r USING (run_id)
            WHERE r.name = 'planted' AND layer = 1
            GROUP BY expert
            ORDER BY sum(tokens) DESC
            LIMIT 1 OFFSET 1
            """
        )[0][0]
    browser.wait(LINE + f".startsWith('L1·E{second} · ')")
    keys(browser, "ENTER")
    assert browser.wait(CARD + f" === 'L1·E{second}'")
    browser.wait("document.querySelector('#atlas .atlas-selected').checkVisibility()")


def test_measure_order_and_layer_are_in_the_address_and_back_undoes_them(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted", READY)
    browser.js("[...document.querySelectorAll('.controls label')].find((l) => l.textContent === 'load').click()")
    browser.wait("location.search === '?run=planted&sort=load'")
    browser.wait("document.querySelector('#atlas .xtick')?.textContent === '#1'")
    browser.driver.back()
    browser.wait("location.search === '?run=planted'")
    browser.wait("document.querySelector('#atlas .xtick')?.textContent === 'E0'")
    browser.open(moe[0] + "/experts?run=planted&measure=label_lift&only=1&rank=low", READY)
    browser.wait("document.querySelector('#expert-grid .ag-header')?.textContent.includes('Preferred label')")
    browser.wait("document.getElementById('expert-table-words').textContent === '4 experts'")
    assert browser.js(FIRST).startswith("L1·")
    browser.wait("document.querySelector('#atlas .panel-heading').textContent.startsWith('Preferred label: L')")
    browser.wait("document.querySelectorAll('#atlas .ytick').length === 1")
    assert browser.complaints() == []


def test_the_card_fills_its_parts_and_opens_as_a_page_of_its_own(browser: Any, moe: tuple[str, Path]) -> None:
    whole = (
        "document.querySelectorAll('.card-part .small-table').length >= 6"
        " && !document.querySelector('.expert-card .mantine-Skeleton-root')"
    )
    browser.open(moe[0] + "/experts?run=planted&layer=1&expert=2", "document.querySelector('.card-part')")
    browser.wait(whole, 60)
    beside = browser.js("document.querySelector('.expert-card .card-parts').innerText")
    assert "Partners" in beside
    browser.js(
        "[...document.querySelectorAll('.card-actions a')].find((a) => a.textContent.startsWith('Full')).click()"
    )
    browser.wait("location.search.includes('view=card') && document.querySelector('.wide-card')")
    browser.wait(whole, 60)
    assert browser.js("document.querySelector('.wide-card .card-parts').innerText") == beside
    assert not browser.js("document.querySelector('#expert-grid').checkVisibility({visibilityProperty: true})")
    browser.open(moe[0] + "/experts?run=planted&layer=1&expert=2&view=card", "document.querySelector('.card-part')")
    browser.wait(whole, 60)
    assert browser.js("document.querySelector('.wide-card .card-parts').innerText") == beside, (
        "a shared link, opened fresh"
    )
    browser.driver.refresh()
    browser.wait(whole, 60)
    assert browser.complaints() == []


def test_the_lab_link_adds_the_ablation_to_the_edits_there_are(browser: Any, moe: tuple[str, Path]) -> None:
    edits = "ablate+layer=0+experts=1"
    browser.open(
        moe[0] + f"/experts?run=planted&layer=1&expert=2&edits={edits}", "document.querySelector('#expert-lab')"
    )
    href = browser.wait(
        "document.querySelector('#expert-lab').href.includes('edits') && document.querySelector('#expert-lab').href"
    )
    from urllib.parse import parse_qs, urlsplit

    assert parse_qs(urlsplit(href).query)["edits"] == ["ablate layer=0 experts=1;ablate layer=1 experts=2"]


def test_experts_are_pinned_from_their_cards_and_stand_side_by_side(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted&layer=1&expert=2", READY + " && document.querySelector('#expert-pin')")
    browser.wait("document.querySelector('#expert-pin').textContent === 'Pin to compare'")
    browser.js("document.querySelector('#expert-pin').click()")
    browser.wait("location.search.includes('pinned=1:2')")
    browser.wait("document.querySelector('#expert-pin').textContent === 'Unpin'")
    browser.js("window.moescope.change({layer: '0', expert: '3'})")
    browser.wait(CARD + " === 'L0·E3'")
    browser.wait("document.querySelector('#expert-pin').textContent === 'Pin to compare'")
    browser.js("document.querySelector('#expert-pin').click()")
    heads = "[...document.querySelectorAll('#expert-pins th')].map((th) => th.textContent).join()"
    browser.wait(heads + " === ',L1·E2,L0·E3'")
    browser.js("document.querySelector('#experts-unpin').click()")
    browser.wait("!location.search.includes('pinned') && !document.querySelector('#expert-pins').textContent")
    assert browser.complaints() == []


def test_a_typed_name_opens_the_card_and_a_wrong_one_is_kept_with_the_reason(
    browser: Any, moe: tuple[str, Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(moe[0] + "/experts?run=planted&sort=load", READY)
    browser.type("#expert-box", "L9·E9" + Keys.ENTER)
    assert "L0, L1" in browser.wait("document.querySelector('.mantine-InputWrapper-error')?.textContent")
    assert browser.js("document.querySelector('#expert-box').value") == "L9·E9"
    browser.type("#expert-box", Keys.CONTROL + "a")
    browser.type("#expert-box", "l1e3" + Keys.ENTER)
    browser.wait(CARD + " === 'L1·E3'")
    assert browser.js("location.search") == "?run=planted&layer=1&expert=3&sort=load", "the rest of the view stays"


@pytest.mark.parametrize("search", ["?measure=beauty", "?layer=9&expert=1", "?layer=1&expert=77", "?rank=x"])
def test_an_address_that_cannot_be_had_is_answered_with_the_reason(
    browser: Any, moe: tuple[str, Path], search: str
) -> None:
    browser.open(moe[0] + "/experts" + search, "document.querySelector('.refusal')")
    said = browser.js("document.querySelector('.refusal').innerText")
    assert "Expected:" in said or "Found:" in said
    assert browser.complaints() == []


def test_the_theme_follows_the_system_and_the_switch(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted", READY)
    before = browser.js("document.documentElement.dataset.agThemeMode")
    browser.click(".mantine-AppShell-header button[aria-label='Light or dark']")
    browser.wait(f"document.documentElement.dataset.agThemeMode !== '{before}'")
    assert browser.js(
        "document.documentElement.dataset.mantineColorScheme === document.documentElement.dataset.agThemeMode"
    )
    browser.click(".mantine-AppShell-header button[aria-label='Light or dark']")
