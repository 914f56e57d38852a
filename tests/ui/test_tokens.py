from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui
PAINTED = "document.querySelector('#tokview[data-ready=painted] .tok')"
CLASSES = "return [...document.querySelectorAll('.tok')].map((t) => t.dataset.i + ':' + t.className).join('|')"


def rows(path: Path, query: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Rows of the store that is being served: this process has it open already."""
    with Store(path) as store:
        return store.fetch(query, list(parameters))


def test_a_click_on_a_token_shows_the_path_that_was_recorded(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted", PAINTED)
    browser.click(".tok[data-i='12']")
    browser.wait("document.querySelectorAll('.path tbody tr').length === 2")
    assert browser.js("new URLSearchParams(location.search).get('token')") == "12"
    shown = browser.js(
        "return [...document.querySelectorAll('.path tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    query = """
        SELECT r.layer, r.experts, r.weights, r.margin, r.entropy, s.norm
        FROM routing r
        JOIN runs USING (run_id)
        JOIN residual s ON s.run_id = r.run_id AND s.token = r.token AND s.layer = r.layer
        WHERE runs.name = 'planted' AND r.token = 12
        ORDER BY r.layer
    """
    assert shown == [
        [
            f"L{layer}",
            "".join(f"E{e} {w:.3f}" for e, w in zip(experts, weights, strict=True)),
            f"{margin:.3f}",
            f"{entropy:.3f}",
            f"{norm:.2f}",
        ]
        for layer, experts, weights, margin, entropy, norm in rows(moe[1], query)
    ]


def test_a_shared_address_reproduces_the_view_in_a_fresh_browser(
    browser: Any, browser_of: Callable[..., Any], moe: tuple[str, Path]
) -> None:
    browser.open(moe[0] + "/tokens?run=planted&label=japanese&layer=1&expert=1", PAINTED)
    browser.click(".tok[data-i='9']")
    browser.wait("document.querySelectorAll('.path tbody tr').length === 2")
    view = (
        browser.js(CLASSES),
        browser.js("document.querySelector('#token-heading').innerText"),
        browser.js("document.querySelector('.detail-title').innerText"),
    )
    fresh = browser_of()
    fresh.open(browser.js("location.href"), PAINTED)
    fresh.wait("document.querySelectorAll('.path tbody tr').length === 2")
    fresh.wait("document.querySelector('.tok.selected')")
    other = (
        fresh.js(CLASSES),
        fresh.js("document.querySelector('#token-heading').innerText"),
        fresh.js("document.querySelector('.detail-title').innerText"),
    )
    assert strip_current(view) == strip_current(other)


def strip_current(view: tuple[str, ...]) -> tuple[str, ...]:
    """The view without the cursor, which is where the reader is, not what is shown."""
    return tuple(part.replace(" current", "").replace(" cursor", "") for part in view)


def test_a_control_writes_the_address_and_back_undoes_it(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted", PAINTED)
    before = browser.js(CLASSES)
    browser.js(
        "[...document.querySelectorAll('.mantine-SegmentedControl-label')].find((l) => l.textContent === 'Entropy').click()"
    )
    browser.wait("location.search === '?run=planted&mode=entropy' && document.querySelector('.ramp')")
    browser.wait("document.querySelector('.tok').style.background !== ''")
    browser.driver.back()
    browser.wait("location.search === '?run=planted' && document.querySelector('.chip')")
    browser.wait("document.querySelector('.tok').style.background === ''")
    assert browser.js(CLASSES) == before
    chosen = "return [...document.querySelectorAll('.mantine-SegmentedControl-root input:checked')].map((i) => i.value)"
    assert browser.js(chosen) == ["text", "pins"]


def test_the_search_box_finds_text_across_tokens_that_is_not_drawn(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted", PAINTED)
    browser.type("input[placeholder=text]", "日本 aé")
    browser.wait("document.querySelector('#match-count').textContent === '1 of 30'")
    for _ in range(29):
        browser.js("document.querySelector('#match-next').click()")
    assert browser.js("document.querySelector('#match-count').textContent") == "30 of 30"
    assert (
        browser.js("return [...document.querySelectorAll('.tok.current')].map((t) => t.textContent).join('')") == "日"
    )
    assert browser.js("document.querySelector('#tokview').scrollTop") > 500
    assert "q=" in browser.js("location.search")


def test_the_keyboard_moves_and_opens(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(moe[0] + "/tokens?run=planted", PAINTED)
    browser.js("document.querySelector('#tokview').focus({preventScroll: true})")
    browser.type("#tokview", Keys.ARROW_RIGHT + Keys.ARROW_RIGHT + Keys.ENTER)
    browser.wait("document.querySelector('.detail-title')?.textContent === 'Token 2'")
    browser.click(".detail .mantine-Drawer-close")
    browser.wait("location.search === '?run=planted'")


def test_a_hundred_thousand_tokens_draw_only_what_is_in_sight(
    browser: Any, serve_store: Any, plan: Any, plant: Any
) -> None:
    def fill(store: Store) -> None:
        run = plant(store, plan(texts=[plan().texts[0]]))
        store.connection.execute("DELETE FROM tokens")
        store.connection.execute("DELETE FROM routing")
        store.connection.execute("UPDATE sequences SET n_tokens = 99000")
        store.connection.execute(
            "INSERT INTO tokens SELECT ?, i, 0, i, i % 8, 'prefill', 1.0, 1, false, 'word' FROM range(99000) t(i)",
            [run.run_id],
        )
        store.connection.execute(
            "INSERT INTO routing SELECT ?, i, l, 'mlp', [i % 4, (i + 1) % 4], [0.6, 0.4], 0.1, 1.0 FROM range(99000) t(i), range(2) u(l)",
            [run.run_id],
        )

    url, _ = serve_store(fill)
    seconds = browser.open(url + "/tokens", PAINTED)
    nodes = browser.js("document.querySelectorAll('#tokview *').length")
    repaint = browser.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1], begun = performance.now();
        window.moescope.change({ layer: 1 });
        const before = document.querySelector('.tok');
        (function look() { document.querySelector('.tok') !== before ? done(performance.now() - begun) : requestAnimationFrame(look); })();
        """
    )
    __import__("logging").getLogger("timings").info(
        "99,000 tokens: %.2f s, %d nodes, layer change %.0f ms", seconds, nodes, repaint
    )
    assert nodes < 4000
    browser.js("document.querySelector('#tokview').scrollTop = 1e9")
    browser.wait("document.querySelector(\".tok[data-i='98999']\")")


def test_the_line_below_names_all_experts_of_the_token_under_the_pointer(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted&layer=1", PAINTED)
    over = "document.querySelector(\".tok[data-i='12']\").dispatchEvent(new MouseEvent('mouseover', {bubbles: true}))"
    browser.wait(f"{over}; return document.querySelector('.toktip').textContent.includes('L1: ')")
    experts, weights = rows(
        moe[1],
        "SELECT experts, weights FROM routing JOIN runs USING (run_id) WHERE name = 'planted' AND token = 12 AND layer = 1",
    )[0]
    said = browser.js("document.querySelector('.toktip').textContent")
    assert "token 12 · 5 of 7 in sequence 1" in said
    assert "L1: " + ", ".join(f"E{e} {w:.3f}" for e, w in zip(experts, weights, strict=True)) in said


def test_changed_tokens_are_marked_and_the_switch_leaves_the_others_plain(browser: Any, moe: tuple[str, Path]) -> None:
    query = """
        SELECT list_sort(a.experts) != list_sort(b.experts), list_contains(a.experts, 1), list_contains(b.experts, 1)
        FROM routing a
        JOIN runs ar ON ar.run_id = a.run_id AND ar.name = 'second'
        JOIN routing b ON b.token = a.token AND b.layer = a.layer
        JOIN runs br ON br.run_id = b.run_id AND br.name = 'planted'
        WHERE a.layer = 1
        ORDER BY a.token
    """
    truth = rows(moe[1], query)
    marked = """
        const kinds = {};
        for (const t of document.querySelectorAll('.tok')) kinds[t.dataset.i] = /change-(\\w+)/.exec(t.className)?.[1] ?? 'rest';
        return Object.values(kinds);
    """
    browser.open(moe[0] + "/tokens?run=second&mode=changed&other=planted&layer=1", PAINTED)
    assert browser.js(marked) == ["changed" if differs else "rest" for differs, _, _ in truth]
    browser.open(moe[0] + "/tokens?run=second&mode=changed&other=planted&layer=1&expert=1&change=lost", PAINTED)
    assert browser.js(marked) == ["lost" if before and not now else "rest" for _, now, before in truth]
    lost = sum(before and not now for _, now, before in truth)
    browser.wait(f"document.querySelector('.chip.chosen').textContent === 'lost {lost}'")


def test_the_table_sorts_all_tokens_on_the_server(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted&view=table&layer=1", "document.querySelector('.ag-row .cell-link')")
    first = "document.querySelector(\".ag-center-cols-container [row-index='0'] [col-id='token']\").textContent"
    assert browser.js(first) == "0"
    header = "document.querySelector(\".ag-header-cell[col-id='entropy'] .ag-header-cell-label\").click()"
    browser.js(header)
    browser.js(header)
    most = rows(
        moe[1],
        """
        SELECT token
        FROM routing JOIN runs USING (run_id)
        WHERE name = 'planted' AND layer = 1
        ORDER BY entropy DESC, token
        LIMIT 1
        """,
    )[0][0]
    browser.wait(f"{first} === '{most}'")
    browser.js("document.querySelector(\".ag-center-cols-container [row-index='0'] .cell-link\").click()")
    browser.wait(f"new URLSearchParams(location.search).get('token') === '{most}' && {PAINTED}")


def test_a_selection_by_keyboard_is_copied_as_text(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.open(moe[0] + "/tokens?run=planted&sequence=0", PAINTED)
    browser.js("document.querySelector('#tokview').focus({preventScroll: true})")
    browser.type("#tokview", Keys.ARROW_RIGHT + Keys.SHIFT + Keys.ARROW_RIGHT * 4 + Keys.SHIFT)
    copied = browser.js(
        """
        const data = new DataTransfer();
        const event = new ClipboardEvent('copy', { clipboardData: data, bubbles: true, cancelable: true });
        document.querySelector('#tokview').dispatchEvent(event);
        return data.getData('text/plain');
        """
    )
    assert copied == "The cat sat.\nIt"


def test_texts_without_a_label_can_be_had_alone(browser: Any, moe: tuple[str, Path]) -> None:
    from urllib.parse import quote

    browser.open(moe[0] + "/tokens?run=second&label=" + quote("\N{SYMBOL FOR NULL}"), PAINTED)
    assert browser.js("document.querySelector('.clause .foreign').textContent") == "no label"
    shown = browser.js("return [...document.querySelectorAll('.tok')].map((t) => t.textContent).join('')")
    assert shown.replace("↵", "").replace("\n", "") == "<bos>def f():    pass"


def test_sequences_are_turned_one_by_one(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(moe[0] + "/tokens?run=planted&sequence=3&label=english", PAINTED)
    browser.js("document.querySelector('#sequence-next').click()")
    browser.wait("new URLSearchParams(location.search).get('sequence') === '6'")
    browser.open(moe[0] + "/tokens?run=planted", PAINTED)
    for _ in range(40):
        browser.js("document.querySelector('#sequence-next').click()")
    browser.wait("[...document.querySelectorAll('.sequence a')].some((a) => a.textContent === 'Sequence 40')")


def test_a_trace_without_texts_shows_positions(browser: Any, serve_store: Any) -> None:
    import pyarrow as pa

    trace = pa.table(
        {"sequence_id": [0, 0, 1], "position": [0, 1, 0], "layer": [3, 3, 3], "experts": [[5, 1], [2, 0], [1, 5]]}
    )
    url, _ = serve_store(lambda store: store.import_trace(trace, name="trace", n_experts=8))
    browser.open(url + "/tokens?layer=3&expert=5", PAINTED)
    assert browser.js("return [...document.querySelectorAll('.tok')].map((t) => t.textContent.trim())") == [
        "·0",
        "·1",
        "·0",
    ]
    assert browser.js("document.querySelectorAll('.tok.hit').length") == 2
    browser.wait("document.querySelector('.sentence').textContent === '2 decisions of 3 tokens'")
    browser.js("document.querySelector('.tok').click()")
    browser.wait("document.querySelectorAll('.path tbody tr').length === 1")
    assert browser.complaints() == []
