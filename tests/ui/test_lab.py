"""The lab in a browser: what it shows equals a plain forward pass and `moescope.effect`; sliders, undo, JSON, hostile prompts."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import moescope as ms
from moescope.core.edit_text import read_edit
from moescope.dashboard.serve import serve
from moescope.store.store import Store

PROMPTS = ["And God said unto him, Arise, and go up to the mountain.", "def f(x):\n    return x + 1"]
BOX = "\n".join(prompt.replace("\n", "\\n") for prompt in PROMPTS)
EDIT = "ablate layer=3 experts=0-7"
READY = "return document.querySelector('#lab-next tr[data-p]') !== null"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A dashboard with the demo model over a store without runs."""
    path = tmp_path_factory.mktemp("lab") / "runs.duckdb"
    Store(path).close()
    up, seen = threading.Event(), {}

    def ready(url: str, server: Any) -> None:
        seen.update(url=url, server=server)
        up.set()

    options = {"port": 0, "ready": ready, "model": "demo"}
    thread = threading.Thread(target=serve, args=(path,), kwargs=options, daemon=True)
    thread.start()
    assert up.wait(30)
    yield seen["url"].rstrip("/"), path
    seen["server"].shutdown()
    thread.join(20)


@pytest.fixture(scope="module")
def model(lab: Any, browser: Any) -> ms.LiveModel:
    """A model of the test's own, loaded after the page's: libraries do not load two at a time."""
    browser.driver.get(f"{lab[0]}/lab")
    browser.wait(READY, 120)
    return ms.load("demo")


def address(lab: tuple[str, Path], edits: str = "", prompt: str = BOX, more: str = "") -> str:
    return f"{lab[0]}/lab?prompt={quote(prompt)}" + (f"&edits={quote(edits)}" if edits else "") + more


def answered(browser: Any, edits: str = "", *, edited: bool = True) -> None:
    """Wait until what is painted answers these edits."""
    browser.wait(
        f"const l = [...document.querySelectorAll('.lab-edit-text')].map((x) => x.textContent).join(';');"
        f"return l === {json.dumps(edits)} && !document.querySelector('.lab-stale')"
        f" && Boolean(document.querySelector('table[data-side=edited]')) === {str(edited).lower()}",
        40,
    )


def measured(browser: Any) -> dict[str, float]:
    return browser.js(
        "return Object.fromEntries([...document.querySelectorAll('.lab-card')].map((c) => [c.dataset.measure, Number(c.dataset.value)]))"
    )


def next_tokens(browser: Any, side: str) -> dict[int, float]:
    rows = browser.js(
        "return [...document.querySelectorAll(`table[data-side=${arguments[0]}] tr[data-p]`)]"
        ".map((r) => [Number(r.dataset.token), Number(r.dataset.p)])",
        side,
    )
    return {int(token): p for token, p in rows}


def cut(line: str = EDIT) -> ms.Intervention:
    return ms.Intervention([read_edit(line)])


def test_what_is_shown_under_an_ablation_equals_a_plain_forward_pass_and_the_effect(
    lab: Any, browser: Any, model: Any, tmp_path: Path
) -> None:
    import torch

    browser.open(address(lab), READY)
    browser.wait("return document.getElementById('lab-line').value === 'ablate'")
    browser.driver.execute_script("document.getElementById('lab-line').focus()")
    browser.type("#lab-line", Keys.CONTROL + "a")
    browser.type("#lab-line", EDIT + Keys.ENTER)
    answered(browser, EDIT)
    with Store(tmp_path / "truth.duckdb") as store:
        truth = ms.effect(model, PROMPTS, cut(), store, controls=0, progress=False).df()
    shown = measured(browser)
    for metric in ("delta_nll", "kl", "flips"):
        (value,) = truth[(truth.kind == "target") & (truth.metric == metric)].value
        assert shown[metric] == pytest.approx(value, abs=2e-6)
    assert shown["delta_nll"] != 0
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        plain = model.module(input_ids=ids).logits[0, -1].double().softmax(-1)
        with model.edited(cut()):
            changed = model.module(input_ids=ids).logits[0, -1].double().softmax(-1)
    for side, truth_p in (("base", plain), ("edited", changed)):
        found = next_tokens(browser, side)
        assert list(found) == truth_p.topk(10).indices.tolist()
        assert list(found.values()) == pytest.approx(truth_p.topk(10).values.tolist(), abs=1e-6)
    assert browser.complaints() == []
    assert all(url.startswith((lab[0], "data:")) for url in browser.asked_for())


def test_a_slider_changes_the_strength_and_at_0_the_answer_is_exactly_the_unedited_one(lab: Any, browser: Any) -> None:
    browser.open(address(lab, EDIT), READY)
    answered(browser, EDIT)
    whole = measured(browser)["delta_nll"]
    slider = browser.driver.find_element(By.CSS_SELECTOR, ".lab-slider")
    slider.send_keys(Keys.ARROW_LEFT * 5)
    browser.wait("return location.search.includes('strength=0.75')")
    browser.wait(f"return Number(document.querySelector('.lab-card').dataset.value) !== {whole}")
    assert measured(browser)["delta_nll"] != 0
    browser.driver.find_element(By.CSS_SELECTOR, ".lab-on").click()
    browser.wait("return location.search.includes('strength=0') && !location.search.includes('0.75')")
    browser.wait("return Number(document.querySelector('.lab-card').dataset.value) === 0")
    assert set(measured(browser).values()) == {0}
    assert next_tokens(browser, "edited") == next_tokens(browser, "base")
    browser.driver.find_element(By.CSS_SELECTOR, ".lab-on").click()  # on again: as strong as it was
    browser.wait("return location.search.includes('strength=0.75')")


def test_undo_redo_and_back_bring_edits_back(lab: Any, browser: Any) -> None:
    browser.open(address(lab, EDIT), READY)
    answered(browser, EDIT)
    browser.js(f"return window.moescope.change({{edits: '{EDIT};bias layer=2 experts=4 value=2.0'}})")
    answered(browser, f"{EDIT};bias layer=2 experts=4 value=2.0")
    browser.click("#lab-undo")
    answered(browser, EDIT)
    browser.click("#lab-redo")
    answered(browser, f"{EDIT};bias layer=2 experts=4 value=2.0")
    browser.click(".lab-edit:nth-child(2) .lab-up")
    answered(browser, f"bias layer=2 experts=4 value=2.0;{EDIT}")
    browser.click(".lab-edit:nth-child(1) .lab-gone")
    answered(browser, EDIT)
    browser.driver.back()
    answered(browser, f"bias layer=2 experts=4 value=2.0;{EDIT}")


def test_an_intervention_goes_out_as_json_and_comes_back_with_its_vectors(lab: Any, browser: Any, model: Any) -> None:
    whole = ms.Intervention(
        [read_edit(EDIT), ms.edits.Add(layer=2, vector=[0.5] * model.anatomy.d_model, strength=0.5)]
    )
    browser.open(address(lab), READY)
    browser.js(
        "window.copied = null; navigator.clipboard.writeText = (t) => { window.copied = t; return Promise.resolve(); }; return 1"
    )
    browser.js("document.querySelector('.lab-part .lab-more').open = true; return 1")
    browser.driver.execute_script("document.getElementById('lab-paste').focus()")
    # Typed as one event: key by key, a vector takes long.
    browser.driver.execute_cdp_cmd("Input.insertText", {"text": whole.to_json()})
    browser.click("#lab-take")
    browser.wait("return document.querySelectorAll('.lab-edit').length === 2")
    browser.wait("return Boolean(document.querySelector('table[data-side=edited]'))")
    browser.click("#lab-copy-json")
    assert ms.Intervention.from_json(browser.wait("return window.copied")) == whole
    browser.driver.find_elements(By.CSS_SELECTOR, ".lab-on")[1].click()
    browser.js("window.copied = null; return 1")
    browser.wait("return document.querySelectorAll('.lab-exact')[1].value === '0'")
    browser.wait("return !document.querySelector('.lab-stale')")
    browser.click("#lab-copy-json")
    assert ms.Intervention.from_json(browser.wait("return window.copied")).edits[1].strength == 0
    browser.click("#lab-clear")
    answered(browser, edited=False)


def test_a_hostile_prompt_is_text(lab: Any, browser: Any) -> None:
    hostile = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'> \u202eevil\u202c \x1b[31mred\x1b[0m"
    browser.open(address(lab, EDIT, prompt=hostile), READY)
    answered(browser, EDIT)
    browser.wait("return document.querySelectorAll('#lab-writing .lab-passage').length === 2")
    strip = browser.js("return document.querySelector('.lab-strip').textContent")
    assert "<script>window.hacked=1</script>" in strip
    assert browser.js(
        "return window.hacked === undefined && !document.querySelector('.lab-page img, .lab-page script')"
    )
    isolated = browser.js(
        "return [...document.querySelectorAll('.lab-strip .lab-tok')].every((t) => getComputedStyle(t).unicodeBidi === 'isolate')"
    )
    assert isolated
    assert browser.complaints() == []


def test_a_link_opened_fresh_shows_the_same(lab: Any, browser: Any) -> None:
    browser.open(address(lab, EDIT, more="&row=1&at=3&tint=kl&tokens=5"), READY)
    answered(browser, EDIT)
    seen = (
        "const chosen = document.querySelector('.lab-chosen'); return [document.querySelector('#lab-next').textContent,"
        " document.querySelector('#lab-legend').textContent, chosen.parentElement.dataset.row, chosen.dataset.at]"
    )
    first, link = browser.js(seen), browser.js("return location.href")
    assert first[2:] == ["1", "3"]
    browser.open(link, READY)
    answered(browser, EDIT)
    assert browser.js(seen) == first
    browser.wait("return document.querySelectorAll('#lab-writing .lab-passage').length === 2")
    assert "5" in browser.js("return document.querySelector('#lab-writing tbody tr:last-child').textContent")


def test_what_the_model_refuses_stands_beside_the_edit_and_the_unedited_answer_stays(lab: Any, browser: Any) -> None:
    browser.open(address(lab, f"{EDIT};ablate layer=3 experts=99"), READY)
    browser.wait(
        "return (document.querySelectorAll('.lab-edit')[1] || {textContent: ''}).textContent.includes('no expert 99')"
    )
    assert (
        browser.js("return document.querySelector('.lab-edit .lab-problem').closest('.lab-edit').dataset.key")
        == "ablate layer=3 experts=99"
    )
    assert len(next_tokens(browser, "base")) == 10
    assert next_tokens(browser, "edited") == {}
    browser.open(address(lab, "ablate layer=3 experts=what"), READY)
    browser.wait("return document.querySelector('.lab-edit .lab-problem')")
    assert "what" in browser.js("return document.querySelector('.lab-edit-text').textContent")


def test_the_controls_shown_are_those_of_the_effect(lab: Any, browser: Any, model: Any, tmp_path: Path) -> None:
    browser.open(address(lab, "ablate layer=3 experts=5"), READY)
    answered(browser, "ablate layer=3 experts=5")
    browser.click("#lab-controls")
    browser.wait("return document.querySelector('#lab-measured tr[data-metric=kl]')", 60)
    shown = browser.js(
        "return Object.fromEntries([...document.querySelectorAll('#lab-measured tr[data-metric]')]"
        ".map((r) => [r.dataset.metric, [Number(r.dataset.value), r.textContent]]))"
    )
    with Store(tmp_path / "truth.duckdb") as store:
        truth = ms.effect(
            model, PROMPTS, cut("ablate layer=3 experts=5"), store, controls=5, batch_size=16, progress=False
        ).df()
    for metric in ("delta_nll", "kl", "flips"):
        (value,) = truth[(truth.kind == "target") & (truth.metric == metric)].value
        assert shown[metric][0] == pytest.approx(value, abs=1e-9)
    drawn = truth[(truth.kind == "control") & (truth.metric == "kl")].value
    assert f"{drawn.min():.4f} to {drawn.max():.4f}" in shown["kl"][1]


def test_a_run_is_saved_under_the_edits_and_can_be_compared(lab: Any, browser: Any, model: Any) -> None:
    browser.open(address(lab, "ablate layer=3 experts=5"), READY)
    answered(browser, "ablate layer=3 experts=5")
    browser.driver.execute_script("document.getElementById('lab-run-name').focus()")
    browser.driver.execute_cdp_cmd("Input.insertText", {"text": "five gone"})
    browser.wait("return document.getElementById('lab-run-name').value === 'five gone'")
    browser.click("#lab-save")
    browser.wait("return (document.querySelector('#lab-progress a') || {href: ''}).href.includes('/compare?run=')", 60)
    assert browser.js("return document.querySelector('#lab-progress a').href").endswith("other=five+gone")
    browser.js("document.getElementById('lab-save').click(); return 1")
    browser.wait("return document.getElementById('lab-measure-problem').textContent.includes('already has a run')")


def test_without_a_model_it_says_how_to_choose_one_and_loads_it_on_a_click(
    browser: Any, serve_store: Callable[[Callable[[Store], None]], tuple[str, Path]]
) -> None:
    url, _ = serve_store(lambda _store: None)
    browser.open(f"{url}/lab", "return document.body.innerText.includes('No model is loaded')")
    assert browser.js("return getComputedStyle(document.querySelector('.lab-needs')).display") == "none"
    browser.click("#lab-load")
    browser.wait(READY, 120)
    assert browser.complaints() == []
