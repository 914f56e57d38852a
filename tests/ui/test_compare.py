"""The comparison in a browser: the other run, the settings, the tokens side by side; all of it in the address."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui

READY = "document.querySelector('#cmp-measures .ag-row') && document.querySelector('#cmp-texts .ag-row')"
TOKENS = "document.querySelectorAll('#cmp-tokens .ag-row').length > 0"
HOSTILE = "</script><b>x</b>\u202e"


@pytest.fixture(scope="module")
def pair(serve_store: Callable[..., Any], plan: Any, text: Any, plant: Any) -> tuple[str, Path]:
    def fill(store: Store) -> None:
        plant(store, plan(name="first"))
        plant(store, plan(name="second", seed=5))
        plant(store, plan(name="dense", moe=False))
        other = [text(HOSTILE, [b"<bos>", b"<img src=x onerror=alert(1)>", b" b"])] * 2
        plant(store, plan(name=HOSTILE, texts=other, status="incomplete"))

    return serve_store(fill)


def _truth(path: Path) -> tuple[float, int]:
    """Difference of mean NLL, and decisions of sequence 0 that went to another set of experts."""
    with Store(path, read_only=True) as store:
        names = dict(store.fetch("SELECT name, run_id FROM runs"))
        nll = [
            store.fetch("SELECT avg(nll::DOUBLE) FROM tokens WHERE run_id = ?", [names[n]])[0][0]
            for n in ("first", "second")
        ]
        switched = store.fetch(
            """
            SELECT count(*)
            FROM routing a
            JOIN routing b ON b.token = a.token AND b.layer = a.layer AND b.run_id = ?
            JOIN tokens t ON t.run_id = a.run_id AND t.token = a.token
            WHERE a.run_id = ? AND t.sequence_id = 0 AND list_sort(a.experts) != list_sort(b.experts)
            """,
            [names["second"], names["first"]],
        )[0][0]
    return nll[1] - nll[0], switched


@pytest.fixture(scope="module")
def truth(serve_store: Callable[..., Any], plan: Any, plant: Any) -> tuple[float, int]:
    """Of an equal store that no one serves, since a served one cannot be opened a second time."""
    import tempfile

    path = Path(tempfile.mkdtemp()) / "runs.duckdb"
    with Store(path) as store:
        plant(store, plan(name="first"))
        plant(store, plan(name="second", seed=5))
    return _truth(path)


def test_without_another_run_candidates_are_offered_those_of_the_same_texts_first(
    browser: Any, pair: tuple[str, Path]
) -> None:
    browser.open(pair[0] + "/compare?run=first", "document.querySelector('#cmp-body li a')")
    browser.js("[...document.querySelectorAll('#cmp-body li a')].find((a) => a.textContent === 'second').click()")
    browser.wait("location.search === '?run=first&other=second'")
    browser.wait(READY)
    assert browser.complaints() == []


def test_the_difference_is_the_one_in_the_tables(
    browser: Any, pair: tuple[str, Path], truth: tuple[float, int]
) -> None:
    browser.open(pair[0] + "/compare?run=first&other=second&sequence=0", f"{READY} && {TOKENS}")
    shown = browser.js("document.querySelector('#cmp-measures .ag-row [col-id=difference]').textContent")
    assert float(shown.replace("−", "-")) == pytest.approx(truth[0], abs=0.01)
    switches = browser.js(
        "return [...document.querySelectorAll('#cmp-tokens [col-id=switched].ag-cell')]"
        ".reduce((sum, cell) => sum + Number(cell.textContent), 0)"
    )
    assert switches == truth[1]
    tinted = browser.js(
        "return [...document.querySelectorAll('#cmp-tokens .cmp-changed')].every((c) => c.textContent.trim())"
    )
    assert tinted, "only cells that say a change are tinted"
    settings = browser.js("document.querySelector('#cmp-settings').innerText")
    assert "seed" in settings
    assert "planted-model" not in settings
    assert browser.complaints() == []


def test_rows_and_tokens_follow_the_address_and_back_undoes(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/compare?run=first&other=second&rows=all&sequence=1&show=changed", f"{READY} && {TOKENS}")
    browser.wait("/planted-model/.test(document.querySelector('#cmp-settings').innerText)")
    switched = (
        "[...document.querySelectorAll('#cmp-tokens [col-id=switched].ag-cell')].map((c) => Number(c.textContent))"
    )
    assert browser.js(f"return {switched}.every((n) => n > 0)")
    browser.js("window.moescope.change({ rows: '', show: '' })")
    browser.wait("!/planted-model/.test(document.querySelector('#cmp-settings').innerText)")
    browser.wait(f"{switched}.some((n) => n === 0)")
    browser.js("history.back()")
    browser.wait("/planted-model/.test(document.querySelector('#cmp-settings').innerText)")
    assert browser.js("location.search").endswith("rows=all&sequence=1&show=changed")


def test_a_text_of_the_list_is_laid_side_by_side_and_leads_to_its_tokens(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/compare?run=first&other=second", READY)
    browser.js("document.querySelector('#cmp-texts a.cell-link').click()")
    browser.wait(TOKENS)
    assert "sequence=" in browser.js("location.search")
    href = browser.js("document.querySelector('#cmp-tokens [col-id=piece] a').getAttribute('href')")
    assert href.startswith("/tokens?run=first&token=")
    browser.js("document.querySelector('#cmp-tokens [col-id=in_other] a').click()")
    browser.wait("location.pathname === '/tokens' && location.search.startsWith('?run=second&')")


def test_swap_exchanges_the_two(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/compare?run=first&other=second", READY)
    browser.js("document.querySelector('.cmp-swap').click()")
    browser.wait("location.search === '?run=second&other=first'")
    browser.wait("document.querySelector('.cmp-first')?.textContent === 'second'")
    browser.wait(READY)


def test_runs_that_cannot_be_aligned_say_what_can_be_said(browser: Any, pair: tuple[str, Path]) -> None:
    from urllib.parse import quote

    address = f"/compare?run=first&other={quote(HOSTILE)}"
    browser.open(pair[0] + address, "document.querySelector('#cmp-measures .ag-row')")
    said = browser.js("document.querySelector('.cmp-grounds').innerText")
    assert "no sequence is in both" in said
    assert "is incomplete" in said
    assert browser.js("document.querySelector('#cmp-texts') === null")
    assert browser.js("document.querySelectorAll('#cmp-body b, #cmp-body script, #cmp-body img').length") == 0
    assert browser.complaints() == []


def test_a_dense_run_beside_one_with_experts(browser: Any, pair: tuple[str, Path]) -> None:
    browser.open(pair[0] + "/compare?run=dense&other=first&sequence=0", f"{READY} && {TOKENS}")
    said = browser.js("document.querySelector('#cmp-body').innerText")
    assert "No decisions in dense" in said
    assert "What cannot be asked of these two" in said
    assert browser.complaints() == []


@pytest.mark.parametrize("search", ["other=nobody", "other=second&sequence=77", "other=second&sequence=0&show=odd"])
def test_what_cannot_be_compared_is_refused(browser: Any, pair: tuple[str, Path], search: str) -> None:
    browser.open(pair[0] + "/compare?run=first&" + search, "document.querySelector('#cmp-body .refusal')")
    assert browser.complaints() == []
