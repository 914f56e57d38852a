from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ui
FORM = "document.querySelector('#work-start')"


@pytest.fixture(scope="module")
def empty(serve_store: Any) -> tuple[str, Path]:
    return serve_store(lambda store: None)


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("The cat sat on the mat.\n\nThe dog looked at the cat.\n")
    return path


def _fill(browser: Any, label: str, text: str) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.js(
        "const label = [...document.querySelectorAll('label')].find((l) => l.textContent === arguments[0]);"
        "document.getElementById(label.getAttribute('for')).focus(); return 1",
        label,
    )
    field = browser.driver.switch_to.active_element
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys(text)


def test_a_recording_started_on_the_page_becomes_a_run(browser: Any, empty: tuple[str, Path], texts: Path) -> None:
    url, _ = empty
    browser.open(url + "/work", FORM)
    _fill(browser, "Texts", str(texts))
    _fill(browser, "Name", "from the page")
    browser.wait("document.querySelector('#work-command').innerText.includes(\"--name 'from the page'\")")
    browser.click("#work-start")
    browser.wait("document.querySelector('#work-jobs')?.innerText.includes('Record a run: from the page')")
    browser.wait("document.querySelector('#work-jobs')?.innerText.includes('✓ done')", seconds=90)
    assert browser.js("document.querySelector('.job-link').getAttribute('href')") == "/?run=from+the+page"
    browser.click(".job-link")
    browser.wait("document.body.innerText.includes('✓ complete')")
    assert browser.complaints() == []


def test_a_job_that_fails_says_why_and_what_to_do(browser: Any, empty: tuple[str, Path]) -> None:
    url, _ = empty
    browser.open(url + "/work", FORM)
    _fill(browser, "Texts", "/nowhere/at/all.txt")
    browser.click("#work-start")
    browser.wait("document.querySelector('#work-jobs')?.innerText.includes('✕ failed')", seconds=60)
    assert "/nowhere/at/all.txt" in browser.js("document.querySelector('#work-jobs').innerText")
    assert "What to do:" in browser.js("document.querySelector('#work-jobs').innerText")


def test_the_list_of_jobs_is_there_again_in_a_new_tab(browser: Any, empty: tuple[str, Path], texts: Path) -> None:
    url, _ = empty
    browser.open(url + "/work", FORM)
    _fill(browser, "Texts", str(texts))
    browser.click("#work-start")
    browser.wait("document.querySelector('#work-jobs')?.innerText.includes('Record a run')")
    browser.open(url + "/work", "document.querySelector('#work-jobs')?.innerText.includes('Record a run')")
    browser.wait(
        "![...document.querySelectorAll('#work-jobs .status')].some((s) => s.innerText.includes('running'))", 60
    )


def test_the_kind_of_work_is_in_the_address(browser: Any, empty: tuple[str, Path]) -> None:
    url, _ = empty
    browser.open(url + "/work?do=effect&edits=ablate+layer=3+experts=5", FORM)
    assert browser.js("document.querySelector('#work-form').innerText.includes('moescope intervene effect')")
    assert (
        browser.js("[...document.querySelectorAll('#work-form input')].map((i) => i.value)").count(
            "ablate layer=3 experts=5"
        )
        == 1
    )
    browser.js("[...document.querySelectorAll('label')].find((l) => l.textContent === 'Train an autoencoder').click()")
    browser.wait("document.querySelector('#work-form').innerText.includes('moescope sae study')")
    assert "do=study" in browser.js("location.search")
    browser.driver.back()
    browser.wait("document.querySelector('#work-form').innerText.includes('moescope intervene effect')")
