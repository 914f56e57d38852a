"""axe-core over every page, light and dark: nothing serious, nothing critical."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from moescope.core.pages import pages

pytestmark = pytest.mark.ui
SETTLED = """
    return !document.querySelector('.waiting') && document.querySelector('.page h1, .page .refusal')
        && !document.querySelector('[data-dash-is-loading=true]')
"""
RUN = """
    const done = arguments[arguments.length - 1];
    axe.run(document, { resultTypes: ['violations'], runOnly: arguments[0] }).then((found) => done(found.violations
        .filter((one) => ['serious', 'critical'].includes(one.impact))
        .map((one) => one.id + ': ' + one.nodes.slice(0, 4).map((node) => node.html.slice(0, 160) + ' | '
            + (node.any[0] ? node.any[0].message.slice(0, 120) : '')).join(' ;; '))), (failure) => done([String(failure)]));
"""


@pytest.fixture(scope="module")
def axe() -> str:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not installed: pip install --no-deps axe-playwright-python")
    return (Path(found.origin).parent / "axe.min.js").read_text(encoding="utf-8")


def findings(browser: Any, axe: str, rules: list[str]) -> list[str]:
    if not browser.js("return Boolean(window.axe)"):
        browser.driver.execute_script(axe)
    browser.driver.set_script_timeout(30)
    found: list[str] = browser.driver.execute_async_script(RUN, rules)
    return found


def scheme(browser: Any, name: str) -> None:
    browser.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": name}]}
    )
    browser.wait(f"document.documentElement.getAttribute('data-mantine-color-scheme') === '{name}'")
    # Colours that still turn.
    browser.wait(
        "document.getAnimations().every((one) => !(one instanceof CSSTransition) || one.playState !== 'running')"
    )


# Between them these show every kind of part: cards, grids, heat maps, tokens, forms and tabs.
ALWAYS = ("/", "/experts", "/lab", "/routing", "/tokens")


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.path, marks=() if page.path in ALWAYS else pytest.mark.slow)
        for page in sorted(pages, key=lambda page: page.path)
    ],
)
def test_a_page_has_no_serious_finding(browser: Any, moe: tuple[str, Path], axe: str, page: Any) -> None:
    browser.open(f"{moe[0]}{page.path}", SETTLED)
    scheme(browser, "light")
    try:
        assert findings(browser, axe, ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]) == []
        scheme(browser, "dark")
        assert findings(browser, axe, ["wcag2aa"]) == [], "in the dark"
    finally:
        scheme(browser, "light")


def test_the_palette_and_the_keys_have_no_serious_finding(browser: Any, moe: tuple[str, Path], axe: str) -> None:
    browser.open(f"{moe[0]}/", SETTLED)
    for opened in ("open", "keys"):
        browser.js(f"window.moescope.palette.{opened}()")
        browser.wait("document.querySelector('dialog[open]')")
        assert findings(browser, axe, ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]) == []


def test_the_views_below_a_panel_have_no_serious_finding(browser: Any, moe: tuple[str, Path], axe: str) -> None:
    browser.open(f"{moe[0]}/analyses?analysis=router_entropy", "document.querySelector('.panel-answer')")
    for view in ("how", "table", "query", "python"):
        browser.click(f"[data-view={view}]")
        browser.wait(f"document.querySelector('[data-view={view}][aria-expanded=true]')")
        browser.wait("document.querySelector('.panel-detail:not(:empty)')")
        assert findings(browser, axe, ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]) == [], view
