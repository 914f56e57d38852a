from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ui
READY = "document.querySelector('#load-map .heatmaplayer image') && document.querySelector('#expert-grid .ag-row')"
CARD = "document.querySelector('.detail-title')?.textContent"


def test_a_row_and_a_cell_open_the_expert_card_and_its_count_leads_to_the_tokens(
    browser: Any, moe: tuple[str, Path]
) -> None:
    browser.open(moe[0] + "/experts?run=planted", READY)
    name = browser.js("document.querySelector('#expert-grid .ag-row [col-id=name]').textContent")
    browser.click("#expert-grid .ag-row [col-id=name]")
    assert browser.wait(CARD) == name
    browser.js("document.querySelector('.detail .mantine-Drawer-close').click()")
    browser.wait("location.search === '?run=planted' && !document.querySelector('.detail-title')")
    box = browser.js(
        "const box = document.querySelector('#load-map .nsewdrag').getBoundingClientRect();"
        "return [box.x + box.width * .625, box.y + box.height * .75]"
    )
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.action_builder import ActionBuilder

    actions = ActionChains(browser.driver)
    assert isinstance(actions.w3c_actions, ActionBuilder)
    actions.w3c_actions.pointer_action.move_to_location(int(box[0]), int(box[1]))
    actions.perform()
    actions.click().perform()
    assert browser.wait(CARD) == "L1·E2"
    count = browser.js("document.querySelector('.detail .card-detail').textContent.split(' of ')[0]")
    browser.js("document.querySelector('.detail .card-link').click()")
    browser.wait("location.pathname === '/tokens' && document.querySelector('#token-heading .sentence')")
    assert browser.js("document.querySelector('#token-heading').innerText").startswith(f"{count} of 630 tokens")


def test_a_typed_name_opens_the_card_and_a_wrong_one_is_kept_with_the_reason(
    browser: Any, moe: tuple[str, Path]
) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(moe[0] + "/experts?run=planted", READY)
    browser.type("#expert-box", "L9·E9" + Keys.ENTER)
    assert "L0, L1" in browser.wait("document.querySelector('.mantine-InputWrapper-error')?.textContent")
    assert browser.js("document.querySelector('#expert-box').value") == "L9·E9"
    browser.type("#expert-box", Keys.CONTROL + "a")
    browser.type("#expert-box", "l1e3" + Keys.ENTER)
    browser.wait(CARD + " === 'L1·E3'")
    assert browser.js("location.search") == "?run=planted&layer=1&expert=3"


def test_the_theme_follows_the_system_and_the_switch(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/experts?run=planted", READY)
    before = browser.js("document.documentElement.dataset.agThemeMode")
    browser.click(".mantine-AppShell-header button[aria-label='Light or dark']")
    browser.wait(f"document.documentElement.dataset.agThemeMode !== '{before}'")
    assert browser.js(
        "document.documentElement.dataset.mantineColorScheme === document.documentElement.dataset.agThemeMode"
    )
    browser.click(".mantine-AppShell-header button[aria-label='Light or dark']")
