from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.ui

PAINTED = "document.querySelector('#tokview[data-ready=painted] .tok')"


def test_the_run_picker_changes_the_run_and_keeps_the_page(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens", PAINTED)
    assert browser.js("location.search") == "?run=planted", "the run that is shown is written into the address"
    browser.click("#run-picker")
    browser.wait("[...document.querySelectorAll('[role=option]')].some((o) => o.textContent === 'second')")
    browser.js("[...document.querySelectorAll('[role=option]')].find((o) => o.textContent === 'second').click()")
    browser.wait("document.querySelector('#token-heading')?.textContent.startsWith('21 tokens')")
    assert browser.js("location.pathname + location.search") == "/tokens?run=second"


@pytest.mark.parametrize(
    "search",
    [
        "?run=nobody",
        "?layer=77",
        "?expert=99&layer=0",
        "?sequence=123456",
        "?token=999999",
        "?page=7",
        "?label=x",
        "?mode=x",
    ],
)
def test_an_address_that_cannot_be_shown_is_answered_with_the_reason(
    browser: Any, moe: tuple[str, Path], search: str
) -> None:
    browser.open(moe[0] + "/tokens" + search, "document.querySelector('.refusal')")
    said = browser.js("document.querySelector('.refusal').innerText")
    assert "What to do:" in said or "Found:" in said
    assert browser.complaints() == []
