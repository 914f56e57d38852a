from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from moescope.store.store import Store

pytestmark = pytest.mark.ui

FOUND = "document.querySelector('#sql-found')?.textContent"
EDITOR = "document.querySelector('#sql-text')"
SCHEMA = "document.querySelectorAll('#sql-tables details').length > 20"
ENDLESS = "WITH RECURSIVE t AS (SELECT 1 AS n UNION ALL SELECT n + 1 FROM t) SELECT max(n) FROM t"


def sql_in(browser: Any) -> str:
    return parse_qs(urlsplit(browser.driver.current_url).query).get("sql", [""])[0]


def type_query(browser: Any, text: str) -> None:
    """Replace what stands in the editor, and run it by the keyboard."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    editor = browser.driver.find_element(By.ID, "sql-text")
    editor.send_keys(Keys.CONTROL, "a")
    editor.send_keys(text)
    editor.send_keys(Keys.CONTROL, Keys.ENTER)


@pytest.fixture(scope="module")
def empty(serve_store: Any) -> str:
    return str(serve_store(lambda store: None)[0])


def test_a_link_shows_its_answer(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second&sql={quote('SELECT * FROM tokens WHERE run_id = $run')}", FOUND)
    assert browser.js(FOUND) == "21 rows"
    assert browser.js(f"{EDITOR}.value") == "SELECT * FROM tokens WHERE run_id = $run"
    browser.wait("document.querySelectorAll('#sql-grid .ag-row').length > 5")
    browser.wait(SCHEMA)
    assert browser.complaints() == []
    assert {
        url for url in browser.asked_for() if not url.startswith((moe[0] + "/", "data:", "blob:", "about:"))
    } == set()
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_typed_query_goes_into_the_address_and_back_undoes_it(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second", SCHEMA)
    type_query(browser, "SELECT 1 AS one")
    browser.wait(f"{FOUND} === '1 row'")
    type_query(browser, "SELECT * FROM range(5)")
    browser.wait(f"{FOUND} === '5 rows'")
    assert sql_in(browser) == "SELECT * FROM range(5)"
    browser.driver.back()
    browser.wait(f"{FOUND} === '1 row'")
    browser.wait(f"{EDITOR}.value === 'SELECT 1 AS one'")
    assert browser.js("document.querySelectorAll('#sql-session li').length") >= 2
    assert browser.complaints() == []


def test_parameters_become_fields_with_the_run_filled_in(browser: Any, moe: tuple[str, Path]) -> None:
    with_layer = "SELECT count(*) AS n FROM routing WHERE run_id = $run AND layer = $layer -- not $this, nor '$that'"
    browser.open(f"{moe[0]}/sql?run=second&p_layer=1&sql={quote(with_layer)}", FOUND)
    fields = browser.js("[...document.querySelectorAll('#sql-fields input')].map((i) => [i.name, i.value])")
    assert [name for name, _ in fields] == ["run", "layer"]
    assert fields[1][1] == "1"
    cell = "document.querySelector('#sql-grid .ag-row [col-id=c0]')?.textContent"
    browser.wait(f"{cell} === '21'")
    browser.js("const i = document.querySelector('#sql-fields input[name=layer]'); i.value = '9'; i.focus(); return 1")
    browser.click("#sql-run")
    browser.wait(f"{cell} === '0'")
    query = parse_qs(urlsplit(browser.driver.current_url).query)
    assert query["p_layer"] == ["9"]
    assert "p_run" not in query, "the run that the page shows stays the default"


def test_an_error_says_why_and_leaves_the_query(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second", SCHEMA)
    for query, said in (("SELECT nam FROM runs", "Candidate bindings"), ("DROP TABLE runs", "only reads")):
        type_query(browser, query)
        browser.wait(f"document.querySelector('#sql-result .refusal')?.innerText.includes({said!r})")
        assert browser.js(f"{EDITOR}.value") == query
        assert browser.js("document.querySelector('#sql-after').hidden")
    assert browser.complaints() == []


def test_a_query_without_an_end_can_be_cancelled(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second", SCHEMA)
    type_query(browser, ENDLESS)
    browser.wait("document.querySelector('#sql-clock').textContent.startsWith('running for')")
    browser.wait("!document.querySelector('#sql-cancel').disabled")
    browser.click("#sql-cancel")
    browser.wait("document.querySelector('#sql-result .refusal')?.innerText.includes('cancelled')")
    browser.wait("document.querySelector('#sql-clock').textContent === ''")


def test_a_name_of_the_schema_goes_into_the_query_and_undo_takes_it_out(browser: Any, moe: tuple[str, Path]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.open(f"{moe[0]}/sql?run=second", SCHEMA)
    browser.type("#sql-text", "SELECT * FROM")
    browser.js("document.querySelector('#sql-tables summary').click(); return 1")
    browser.click("#sql-tables details[open] .sql-name")
    assert browser.js(f"{EDITOR}.value") == "SELECT * FROM decisions"
    browser.driver.find_element(By.ID, "sql-text").send_keys(Keys.CONTROL, "z")
    browser.wait(f"{EDITOR}.value.trim() === 'SELECT * FROM'")
    browser.type("#sql-find", "median_abs")
    browser.wait("document.querySelectorAll('#sql-tables details').length === 1")
    assert browser.js("document.querySelector('#sql-tables summary').textContent").startswith("residual_sequences")


def test_an_example_runs_and_its_chart_is_in_the_address(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second", SCHEMA)
    browser.js(
        "[...document.querySelectorAll('.sql-examples a')].find((a) => a.textContent.startsWith('Load of')).click(); return 1"
    )
    browser.wait("document.querySelector('#sql-graph .heatmaplayer image')")
    assert "chart=heat" in browser.driver.current_url
    assert browser.js("document.querySelector('#sql-chart-title').textContent") == "relative_load by expert and layer"
    browser.js(
        "[...document.querySelectorAll('.sql-chart-controls label')].find((l) => l.textContent === 'Bars').click(); return 1"
    )
    browser.wait("document.querySelector('#sql-graph .barlayer .point')")
    address = browser.driver.current_url
    assert "chart=bar" in address
    browser.open(address, "document.querySelector('#sql-graph .barlayer .point')")
    browser.driver.back()
    assert browser.complaints() == []


def test_cells_that_name_things_lead_to_them(browser: Any, moe: tuple[str, Path]) -> None:
    query = "SELECT layer, expert, tokens FROM expert_load WHERE run_id = $run AND layer = 1 AND expert = 2"
    browser.open(
        f"{moe[0]}/sql?run=second&sql={quote(query)}", "document.querySelectorAll('#sql-grid a.cell-link').length === 3"
    )
    links = browser.js("[...document.querySelectorAll('#sql-grid a.cell-link')].map((a) => a.getAttribute('href'))")
    assert links == [
        "/tokens?run=second&layer=1",
        "/experts?run=second&layer=1&expert=2",
        "/tokens?run=second&layer=1&expert=2",
    ]
    browser.js("document.querySelectorAll('#sql-grid a.cell-link')[2].click(); return 1")
    browser.wait("location.pathname === '/tokens' && document.querySelector('.tok')")


def test_the_whole_result_is_saved_as_a_file(browser: Any, moe: tuple[str, Path]) -> None:
    browser.open(f"{moe[0]}/sql?run=second&sql={quote('SELECT * FROM range(20000)')}", FOUND)
    browser.wait("!document.querySelector('#sql-after').hidden")
    for kind in ("csv", "parquet"):
        browser.click(f"#sql-{kind}")
        browser.wait(f"document.querySelector('#sql-file-told').textContent === 'saved as query.{kind}'")
    assert browser.complaints() == []


def test_hostile_results_are_only_ever_text(browser: Any, moe: tuple[str, Path]) -> None:
    hostile = "<img src=x onerror=window.ran=1></script><script>window.ran=2</script>\u202e&amp;"
    name = hostile.replace('"', "")
    query = f"""SELECT '{hostile}' || chr(27) || '[31m' || repeat('x', 100000) AS "{name}", 3 AS "<b>n", '{hostile}' AS label"""
    browser.open(
        f"{moe[0]}/sql?run=second&chart=bar&z=label&sql={quote(query)}", "document.querySelector('#sql-graph .point')"
    )
    browser.wait("document.querySelector('#sql-grid .ag-row')")
    assert browser.js("typeof window.ran") == "undefined"
    assert browser.js("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.js("document.querySelector('#sql-grid .ag-row [col-id=c0]').textContent").startswith("<img src=x")
    assert browser.complaints() == []
    assert browser.js("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_an_empty_store_can_be_asked_too(browser: Any, empty: str) -> None:
    browser.open(f"{empty}/sql", SCHEMA)
    type_query(browser, "SELECT count(*) AS runs FROM runs")
    browser.wait(f"{FOUND} === '1 row'")
    type_query(browser, "SELECT * FROM tokens WHERE run_id = $run")
    browser.wait("document.querySelector('#sql-result .refusal')?.innerText.includes('without runs')")
    assert browser.complaints() == []


def test_nothing_was_written(moe: tuple[str, Path]) -> None:
    """After all of the above: the store is still open for writing in the app, and holds the two runs."""
    with Store(moe[1]) as store:
        assert sorted(run.name for run in store.runs()) == ["planted", "second"]
