from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui

_SPEC = importlib.util.spec_from_file_location("planted_records", Path(__file__).parents[1] / "routing" / "planted.py")
assert _SPEC is not None
assert _SPEC.loader is not None
records: Any = importlib.util.module_from_spec(_SPEC)
sys.modules["planted_records"] = records
_SPEC.loader.exec_module(records)

HOSTILE = "<img src=x onerror=document.title='hit'>\u202e</script>"
SHOWN = "[...document.querySelectorAll('#latent-grid .ag-center-cols-container .ag-row')].map((row) => row.getAttribute('row-id'))"
READY = "document.querySelector('#latent-grid .ag-row[row-id] [col-id=feature]')?.textContent.trim()"


@pytest.fixture(scope="module")
def inside(serve_store: Any) -> tuple[str, Path]:
    def fill(store: Store) -> None:
        planted = records.everything(layers=3, n_experts=6, labels=["a", HOSTILE] * 2)
        planted["vocabulary"] = {i: f" t{i}".encode() for i in range(50)} | {3: HOSTILE.encode()}
        records.plant(store, records.Plan(**planted), name="full")
        records.plant(store, records.Plan(lengths=[6]), name="bare")

    return serve_store(fill)


def test_a_search_is_of_the_whole_list_and_in_the_address_and_a_row_opens_the_latent(
    browser: Any, inside: tuple[str, Path]
) -> None:
    browser.open(inside[0] + "/features?run=full&sae=planted+sae", READY)
    assert browser.js("document.querySelector('#latent-count').innerText") == "12 latents"
    assert len(browser.js(SHOWN)) == 12
    browser.type("input[placeholder^='for instance']", "7")
    browser.wait("location.search.endsWith('&q=7')")
    browser.wait("document.querySelector('#latent-count').innerText !== '12 latents'")
    browser.wait(f"({SHOWN}).includes('7')")
    browser.click("#latent-grid .ag-row[row-id='7'] [col-id=density]")
    browser.wait("document.querySelector('.feature-view .detail-title')?.textContent === 'Latent 7 of planted sae'")
    assert "feature=7" in browser.js("location.search")
    browser.js("history.back()")
    assert browser.wait(READY)
    assert browser.js("document.querySelector(\"input[placeholder^='for instance']\").value") == "7"


def test_a_shared_link_shows_the_latent_with_hostile_text_as_text_and_leads_to_tokens_and_lab(
    browser: Any, inside: tuple[str, Path]
) -> None:
    browser.open(inside[0] + "/features?run=full&sae=planted+sae&feature=0", "document.querySelector('.context-text')")
    text = browser.js("document.querySelector('.feature-view').innerText")
    assert "<img src=x onerror" in text
    assert browser.js("document.querySelectorAll('.feature-view img').length") == 0
    assert browser.js("document.title") != "hit"
    token = browser.js("document.querySelector('.fires-peak').getAttribute('href')")
    assert token.startswith("/tokens?run=full&token=")
    browser.js("document.querySelector('#steer-in-lab').click()")
    browser.wait("location.pathname === '/lab'")
    assert "edits=latents+layer=0" in browser.js("location.search")
    assert "latents=0" in browser.js("location.search")


def test_every_tab_shows_its_figures_without_a_complaint(browser: Any, inside: tuple[str, Path]) -> None:
    for tab in ("quality", "experts"):
        browser.open(
            inside[0] + f"/features?run=full&tab={tab}",
            "document.querySelector('.features-page [data-panel] .panel-answer')",
        )
        assert browser.complaints() == []


def test_features_of_another_run_are_named_so_and_an_unknown_autoencoder_is_refused(
    browser: Any, inside: tuple[str, Path]
) -> None:
    browser.open(inside[0] + "/features?run=bare&sae=planted+sae", READY)
    assert "not from bare" in browser.js("document.querySelector('.numbers-of').innerText")
    browser.open(inside[0] + "/features?run=full&sae=wit", "document.querySelector('.refusal')")
    assert "planted sae" in browser.js("document.querySelector('.refusal').innerText")
