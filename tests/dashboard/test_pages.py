from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import plotly.utils
import pytest

from moescope.core.errors import InputError
from moescope.core.pages import pages
from moescope.dashboard import shell
from moescope.dashboard.app import create_app
from moescope.dashboard.pages.experts import typed_expert
from moescope.dashboard.records import find_run
from moescope.dashboard.url_state import Layer, ViewState
from moescope.store.store import Store

PATHS = [page.path for page in pages]


def shown(store: Store, path: str, search: str = "") -> tuple[str, tuple[Any, ...]]:
    """The JSON that goes to the browser for an address, and the parts of the frame."""
    create_app(store)
    parts = shell.frame(store, path, search)
    return json.dumps(parts, cls=plotly.utils.PlotlyJSONEncoder, ensure_ascii=False), parts


def components(tree: Any) -> Iterator[Any]:
    """Every component of a layout."""
    if isinstance(tree, (list, tuple)):
        for part in tree:
            yield from components(part)
    elif hasattr(tree, "_namespace"):
        yield tree
        yield from components(getattr(tree, "children", None))


def nested_lists(tree: Any) -> bool:
    """Whether a list of children holds a list, which the browser cannot draw."""
    return any(
        isinstance(child, (list, tuple))
        for c in components(tree)
        for child in (c.children if isinstance(getattr(c, "children", None), list) else [])
    )


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["moe", "dense", "incomplete", "bare"])
def test_every_page_builds_on_every_kind_of_run(
    store_of: Callable[..., Store], Plan: Any, path: str, kind: str
) -> None:
    plan = {
        "moe": Plan(),
        "dense": Plan(moe=False),
        "incomplete": Plan(status="incomplete"),
        "bare": Plan(texts=[], residual=False, moe=False),
    }[kind]
    text, parts = shown(store_of(plan), path)
    assert '"title": "This view could not be made"' not in text
    assert not nested_lists(parts[0])
    assert ("incomplete run" in text) == (kind == "incomplete")


def test_an_address_without_a_run_shows_the_newest_complete_one_else_the_newest(
    store_of: Callable[..., Store], Plan: Any
) -> None:
    old, done, cut = Plan(name="old"), Plan(name="done"), Plan(name="cut short", status="incomplete")
    assert find_run(store_of(old, done, cut), ViewState()).name == "done"
    assert find_run(store_of(cut), ViewState()).name == "cut short"
    assert find_run(store_of(), ViewState()) is None
    assert find_run(store_of(done, cut), ViewState(run="cut short")).name == "cut short"


@pytest.mark.parametrize("path", [page.path for page in pages if page.needs_run])
def test_a_store_without_runs_says_how_to_record_one(store_of: Callable[..., Store], path: str) -> None:
    store = store_of()
    text, _ = shown(store, path)
    assert f"moescope profile demo --store {store.path}" in text


def test_the_overview_shows_what_was_run(run: Any) -> None:
    text, _ = shown(run.store, "/")
    nll = run.store.fetch("SELECT avg(nll::DOUBLE) FROM tokens")[0][0]
    for expected in (
        "planted-model",
        "f" * 64,
        "r1",
        f"{nll:.3f} nats",
        "perplexity",
        "2026-01-02 00:00:00 UTC",
        "blocks.0.mlp.hook_expert_indices",
    ):
        assert expected in text


def test_problems_of_coverage_come_first(store_of: Callable[..., Store], Plan: Any) -> None:
    _, parts = shown(store_of(Plan(status="incomplete")), "/")
    grid = next(c for c in components(parts[0]) if getattr(c, "id", None) == "coverage-grid")
    assert [row["status"] for row in grid.rowData] == ["short", "complete"]
    assert grid.rowData[0]["missing"] == 3


def test_the_bar_of_an_incomplete_run_leads_to_the_ledger(store_of: Callable[..., Store], Plan: Any) -> None:
    for path in PATHS:
        _, parts = shown(store_of(Plan(status="failed")), path)
        anchor = next(c for c in components(parts[2]) if type(c).__name__ == "Anchor")
        assert anchor.href == "/?run=planted#coverage"


def test_a_dense_run_says_that_it_has_no_experts(store_of: Callable[..., Store], Plan: Any) -> None:
    text, _ = shown(store_of(Plan(moe=False)), "/experts")
    assert "none of its layers has a router" in text
    assert "expert-grid" not in text


def test_a_dense_run_is_offered_no_router_modes(store_of: Callable[..., Store], Plan: Any) -> None:
    _, parts = shown(store_of(Plan(moe=False)), "/tokens")
    control = next(c for c in components(parts[0]) if getattr(c, "id", None) == {"url": "mode"})
    assert [option["value"] for option in control.data] == ["nll", "norm"]


@pytest.mark.parametrize(
    ("path", "search", "message"),
    [
        ("/", "?run=nobody", "no run called 'nobody'"),
        ("/tokens", "?run=%00%3Cscript%3E", "no run called"),
        ("/experts", "?layer=9", "no router at layer 9"),
        ("/experts", "?layer=1&expert=99", "no expert 99"),
        ("/tokens", "?layer=x", "layer"),
        ("/tokens", "?mode=rainbow", "rainbow"),
        ("/nowhere", "", "no page"),
    ],
)
def test_an_address_that_cannot_be_shown_says_why(run: Any, path: str, search: str, message: str) -> None:
    text, _ = shown(run.store, path, search)
    assert message.lower() in text.lower()


def test_without_a_name_the_newest_run_is_shown(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(name="first"), Plan(name="second"))
    _, parts = shown(store, "/")
    assert parts[4] == ["first", "second"]
    assert parts[5] == "second"
    assert shown(store, "/", "?run=first")[1][5] == "first"


def test_the_table_of_experts_counts_what_the_loads_count(run: Any) -> None:
    _, parts = shown(run.store, "/experts")
    grid = next(c for c in components(parts[0]) if getattr(c, "id", None) == "expert-grid")
    truth = {
        (layer, expert): n
        for layer, expert, n in run.store.fetch("SELECT layer, expert, sum(tokens) FROM loads GROUP BY layer, expert")
    }
    assert {(row["layer"], int(row["id"].split(":")[1])): row["tokens"] for row in grid.rowData} == truth
    shares = [row["share_pct"] for row in grid.rowData]
    assert shares == sorted(shares, reverse=True)
    assert all("layer=" in row["tokens_href"] or row["layer"] == 0 for row in grid.rowData)


@pytest.mark.parametrize("typed", ["L1·E2", "l1e2", "1.2", "L1 E2", " L1 · E2 ", "1/2", "L1 mlp·E2"])
def test_an_expert_may_be_typed_in_many_ways(run: Any, typed: str) -> None:
    state = typed_expert(run, typed)
    assert (state.layer and state.layer.number, state.expert) == (1, 2)


@pytest.mark.parametrize("typed", ["", "12", "E2", "L1", "L9·E0", "L1·E4", "<b>"])
def test_what_is_no_expert_is_refused(run: Any, typed: str) -> None:
    with pytest.raises(InputError):
        typed_expert(run, typed)


def test_a_layer_control_of_a_second_router_keeps_its_block() -> None:
    assert str(Layer(3, "attn")) == "3.attn"
