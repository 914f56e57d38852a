from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from moescope.core.pages import pages
from moescope.dashboard.serve import serve
from moescope.store.store import Store

pytestmark = pytest.mark.ui
READY = "document.querySelector('#run-picker')?.value === 'planted' && document.querySelector('.page h1')"


def address(browser: Any) -> tuple[str, dict[str, list[str]]]:
    parts = urlsplit(browser.js("return location.href"))
    return parts.path, parse_qs(parts.query)


def press(browser: Any, *keys: str) -> None:
    """Keys pressed on the page itself."""
    from selenium.webdriver.common.action_chains import ActionChains

    browser.js("document.activeElement?.blur()")
    ActionChains(browser.driver).send_keys(*keys).perform()


def test_links_keep_the_selection_and_leave_the_page_s_own_parameters(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/tokens?run=planted&layer=1&expert=2&edits=top_k+k=1&mode=nll", READY)
    wanted = "run=planted&layer=1&expert=2&edits=top_k+k=1"
    hrefs = browser.wait(
        "[...document.querySelectorAll('.nav-link')].map((a) => a.getAttribute('href')).every((h) => h.includes('edits'))"
        " && [...document.querySelectorAll('.nav-link')].map((a) => a.getAttribute('href'))"
    )
    assert hrefs == [f"{page.path}?{wanted}" for page in _ordered()]
    assert browser.js("document.querySelector('.nav-link[data-active]').getAttribute('aria-label')") == "Tokens"
    browser.js("document.querySelector('.nav-link[aria-label=Experts]').click()")
    browser.wait("location.pathname === '/experts'")
    assert address(browser)[1] == {"run": ["planted"], "layer": ["1"], "expert": ["2"], "edits": ["top_k k=1"]}


def _ordered() -> list[Any]:
    from moescope.dashboard.navigation import ordered_pages

    return ordered_pages()


def test_two_pages_never_share_their_letters_or_their_key() -> None:
    from moescope.dashboard.navigation import page_keys

    keys = page_keys()
    assert sorted(keys) == sorted(page.path for page in pages)
    assert len(set(keys.values())) == len(keys)
    assert all(keys.values())
    assert len({page.name[:2].lower() for page in pages}) == len(keys)


def test_chips_name_what_is_selected_and_take_it_away(browser: Any, moe: tuple[str, Path]) -> None:
    edits = "ablate+layer=1+experts=2;top_k+k=1"
    browser.open(f"{moe[0]}/?run=planted&layer=1&expert=2&token=5&feature=17&edits={edits}", READY)
    shown = browser.wait(
        "document.querySelectorAll('.selected').length > 3 && [...document.querySelectorAll('.selected a')].map((a) => a.textContent)"
    )
    assert shown == ["L1·E2", "token 5", "feature 17", "2 edits → Lab"]
    browser.click("[aria-label^='Remove L1·E2']")
    browser.wait("document.querySelectorAll('.selected').length === 3")
    assert address(browser)[1] == {
        "run": ["planted"],
        "token": ["5"],
        "feature": ["17"],
        "edits": ["ablate layer=1 experts=2;top_k k=1"],
    }
    browser.js("[...document.querySelectorAll('.selected a')][0].click()")
    browser.wait("location.pathname === '/tokens'")
    assert address(browser)[1]["token"] == ["5"]


@pytest.mark.parametrize(
    ("search", "name"),
    [
        ("layer=1", "L1"),
        ("layer=1&head=3", "L1·H3"),
        ("layer=1&expert=-1", "L1·S1"),
        ("sae=<b>x", "SAE <b>x"),
        ("layer=0.attn&expert=2", "L0 attn·E2"),
    ],
)
def test_a_chip_says_what_it_stands_for(browser: Any, moe: tuple[str, Path], search: str, name: str) -> None:
    browser.open(f"{moe[0]}/analyses?run=planted&{search}", READY)
    assert browser.wait("document.querySelector('.selected a')?.textContent") == name
    assert browser.js("document.querySelector('.selected b')") is None


def test_keys_open_pages_and_go_back_but_not_while_typing(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/?run=planted&layer=1&expert=2", READY)
    assert browser.wait("document.querySelector('#undo').disabled") is True
    press(browser, "g", "t")
    browser.wait("location.pathname === '/tokens'")
    assert address(browser)[1]["expert"] == ["2"]
    press(browser, "u")
    browser.wait("location.pathname === '/'")
    assert browser.wait("document.querySelector('#undo').disabled") is True
    press(browser, "u")
    time.sleep(0.2)
    assert browser.js("location.pathname") == "/", "undo does not leave the app"
    browser.click("#run-picker")
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser.driver).send_keys("g", "t").perform()
    time.sleep(0.2)
    assert browser.js("location.pathname") == "/", "what is typed into a field is text"


def test_the_question_mark_lists_the_keys_and_escape_closes(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    browser.open(f"{moe[0]}/?run=planted", READY)
    press(browser, "?")
    listed = browser.wait("document.querySelector('dialog[open]')?.innerText")
    for page in pages:
        assert page.name in listed
    ActionChains(browser.driver).send_keys(Keys.ESCAPE).perform()
    browser.wait("!document.querySelector('dialog')")


def test_the_first_key_of_the_page_skips_to_the_content(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(f"{moe[0]}/?run=planted", READY)
    press(browser, Keys.TAB)
    assert browser.js("document.activeElement.textContent") == "Skip to the content"
    press_now(browser, Keys.ENTER)
    assert browser.js("document.activeElement.id") == "content"


def press_now(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser.driver).send_keys(*keys).perform()


def test_the_document_itself_shows_names_before_any_script(moe: tuple[str, Path]) -> None:
    import urllib.request

    with urllib.request.urlopen(f"{moe[0]}/tokens") as answer:
        text = answer.read().decode()
    entry = text[text.index('id="react-entry-point"') : text.index("<footer>")]
    for page in pages:
        assert page.name in entry
    assert '<h1 class="page-title">Tokens</h1>' in entry
    assert "/dash_ag_grid/" not in text.partition("<body>")[2], "the grid is asked for by the first grid"


def test_scripts_come_small_and_read_the_same(moe: tuple[str, Path]) -> None:
    import re
    import urllib.request

    import brotli

    with urllib.request.urlopen(f"{moe[0]}/") as answer:
        script = re.search(r'src="([^"]*dash_mantine_components[^"]*)"', answer.read().decode())
    assert script is not None
    url = moe[0] + script[1]
    with urllib.request.urlopen(url) as answer:
        plain = answer.read()
        assert answer.headers.get("Content-Encoding") is None
    with urllib.request.urlopen(urllib.request.Request(url, headers={"Accept-Encoding": "gzip, br"})) as answer:
        small = answer.read()
        assert answer.headers["Content-Encoding"] == "br"
    assert brotli.decompress(small) == plain
    assert len(small) < len(plain) / 4


def test_a_page_without_a_grid_does_not_load_it_and_a_grid_does(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/analyses?run=planted&analysis=router_entropy", "document.querySelector('.panel-answer')")
    assert not any("dash_ag_grid" in url for url in browser.asked_for())
    browser.click("[data-view=table]")
    browser.wait("document.querySelectorAll('.panel-detail .ag-row').length > 1")
    assert browser.complaints() == []


def test_saved_pictures_carry_title_and_n(browser: Any, moe: tuple[str, Path], tmp_path: Path) -> None:
    browser.open(f"{moe[0]}/analyses?run=planted&analysis=load", "document.querySelector('.panel-answer .main-svg')")
    browser.js(
        """
        window.saved = [];
        HTMLAnchorElement.prototype.click = function () { window.saved.push([this.download, this.href]); };
        return 1
        """
    )
    browser.click(".tool-image:nth-of-type(5), .tool-image")
    name, url = browser.wait("return window.saved[0]")
    assert name == "load-planted.png"
    assert base64.b64decode(url.partition(",")[2])[:8] == b"\x89PNG\r\n\x1a\n"
    browser.js("[...document.querySelectorAll('.tool-image')].find((b) => b.textContent === 'SVG').click()")
    name, url = browser.wait("return window.saved[1]")
    from urllib.parse import unquote

    text = unquote(url.partition(",")[2])
    assert name == "load-planted.svg"
    title = browser.js("document.querySelector('.panel-heading h2').textContent")
    assert title.split()[0] in text
    assert "n = " in text
    assert browser.complaints() == []


def test_a_control_of_an_analysis_changes_the_address_and_the_answer(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(
        f"{moe[0]}/analyses?run=planted&analysis=router_entropy&p_seed=3", "document.querySelector('.panel-answer')"
    )
    assert browser.wait("document.querySelector('input[id*=p_seed]')?.value") == "3"
    browser.click("[data-view=python]")
    assert "seed=3" in browser.wait("document.querySelector('.panel-detail pre')?.textContent")
    browser.js("window.moescope.change({ p_seed: 4 })")
    browser.wait("document.querySelector('.panel-detail pre')?.textContent.includes('seed=4')")
    browser.js("window.moescope.change({ p_seed: 'x' })")
    said = browser.wait("document.querySelector('.panel .refusal')?.innerText")
    assert "'seed' cannot be 'x'" in said
    assert browser.js("document.querySelector('input[id*=p_seed]').value") == "x", "what was typed stays"


def test_the_query_opens_on_the_sql_page_line_by_line(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/analyses?run=planted&analysis=router_entropy", "document.querySelector('.panel-answer')")
    browser.click("[data-view=query]")
    shown = browser.wait("document.querySelector('.panel-detail pre')?.textContent")
    browser.click("[data-open]")
    browser.wait("location.pathname === '/sql'")
    assert browser.js("new URLSearchParams(location.search).get('sql')") == shown
    assert "\n" in shown


def test_an_analysis_that_has_no_records_says_which(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/analyses?run=planted&analysis=effects", "document.querySelector('.empty')")
    assert "Not recorded: effects" in browser.js("document.querySelector('.empty').innerText")
    browser.open(f"{moe[0]}/analyses?run=planted&analysis=nothing", "document.querySelector('.refusal')")
    assert browser.complaints() == []


def test_every_analysis_is_listed_with_its_question(browser: Any, moe: tuple[str, Path]) -> None:
    from moescope.core.analysis import analyses

    browser.open(f"{moe[0]}/analyses?run=planted", "document.querySelectorAll('.plain-list li').length > 20")
    shown = browser.js("[...document.querySelectorAll('.plain-list li')].map((li) => li.textContent)")
    assert len(shown) == len(list(analyses))
    for one in analyses:
        assert any(one.summary in line for line in shown)


def test_a_server_that_went_away_is_said_and_asked_again(
    browser: Any, serve_store: Callable[..., Any], plan: Any, plant: Any, tmp_path: Path
) -> None:
    path = tmp_path / "runs.duckdb"
    with Store(path) as store:
        plant(store, plan())
    port, first, stopped = _served(path, 0)
    browser.open(f"http://127.0.0.1:{port}/?run=planted", READY)
    first.shutdown()
    stopped.join(10)
    browser.js("window.moescope.open('/tokens?run=planted')")
    said = browser.wait("document.querySelector('#lost')?.innerText")
    assert "moescope dashboard" in said
    assert f"--port {port}" in said
    _, second, stopped = _served(path, port)
    try:
        browser.wait(
            "document.querySelector('.page h1')?.textContent === 'Tokens' && !document.querySelector('#lost').innerText",
            seconds=60,
        )
    finally:
        browser.driver.get("about:blank")
        second.shutdown()
        stopped.join(10)
    browser.forget()


def _served(path: Path, port: int) -> tuple[int, Any, threading.Thread]:
    up, seen = threading.Event(), {}

    def ready(url: str, server: Any) -> None:
        seen.update(url=url, server=server)
        up.set()

    thread = threading.Thread(target=serve, args=(path,), kwargs={"port": port, "ready": ready}, daemon=True)
    thread.start()
    assert up.wait(30)
    return urlsplit(seen["url"]).port or 0, seen["server"], thread
