from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moescope.core.analysis import PROBE_OF_TABLE, analyses
from moescope.core.edit_text import read_edit
from moescope.core.errors import InputError
from moescope.core.site_names import read_site
from moescope.dashboard.answers import Answers
from moescope.dashboard.overview.effects_list import effects_section
from moescope.dashboard.pages import compare, tokens
from moescope.dashboard.routing_page import body
from moescope.dashboard.routing_page.tabs import TABS
from moescope.dashboard.url_state import ViewState
from moescope.store.run import Run
from moescope.store.store import Store

MODEL = "it's a model"
Parse = Callable[[str], dict[str, Any]]


def commands_in(tree: Any) -> list[str]:
    """Everything that a page shows as a command."""
    if isinstance(tree, (list, tuple)):
        return [found for part in tree for found in commands_in(part)]
    if not hasattr(tree, "_namespace"):
        return []
    children = getattr(tree, "children", None)
    shown = "command" in (getattr(tree, "className", None) or "").split()
    return [*([children] if shown else []), *commands_in(children)]


@pytest.fixture
def awkward(tmp_path: Path, Plan: Any) -> Iterator[Run]:
    """A run whose model and store a shell would take apart."""
    store: Store = sys.modules["planted"].planted_store(tmp_path / "my runs; old.duckdb", Plan())
    store.connection.execute("UPDATE runs SET model = ?", [MODEL])
    yield store.run("planted")
    store.close()


def test_without_tokens_the_runs_model_is_to_be_recorded_into_its_store(awkward: Run, parsed: Parse) -> None:
    awkward.store.connection.execute("DELETE FROM tokens")
    [said] = commands_in(tokens.layout(awkward, ViewState(run=awkward.name)))
    read = parsed(said)
    assert (read["model"], read["store"], read["probe"]) == (MODEL, awkward.store.path, ["tokens,routing"])


def test_the_only_run_is_to_be_joined_by_one_of_the_same_store(awkward: Run, parsed: Parse) -> None:
    [said] = commands_in(compare.layout(awkward, ViewState(run=awkward.name)))
    read = parsed(said)
    assert (read["model"], read["store"], read["name"]) == (MODEL, awkward.store.path, "second")


def test_without_effects_one_is_to_be_measured_against_the_run(awkward: Run, parsed: Parse) -> None:
    [said] = commands_in(effects_section(Answers(awkward.store), awkward))
    read = parsed(said)
    assert (read["model"], read["store"], read["base"]) == (MODEL, awkward.store.path, awkward.name)
    assert [read_edit(edit).kind for edit in read["edit"]] == ["ablate"]


@pytest.mark.parametrize("tab", TABS, ids=lambda tab: tab.name)
def test_each_panel_of_routing_offers_a_recording_of_all_it_needs(awkward: Run, parsed: Parse, tab: Any) -> None:
    for shown in tab.panels:
        needs = analyses[shown.analysis].needs
        [said] = commands_in(body.not_recorded(awkward, needs, needs))
        read = parsed(said)
        assert (read["model"], read["store"]) == (MODEL, awkward.store.path)
        probes = read["probe"][0].split(",")
        assert len(probes) == len(set(probes))
        assert set(probes) == {"routing"} | {PROBE_OF_TABLE.get(table, table) for table in needs}
        sites = [read_site(site) for site in read["site"] or []]
        assert bool(sites) == ("activations" in needs), "the probe of vectors is refused without a site"


def test_vectors_are_recorded_where_a_router_can_be_read_from_them(awkward: Run, parsed: Parse) -> None:
    store = awkward.store
    store.connection.execute("DELETE FROM layers WHERE layer = 0")
    layers = [row[0] for row in store.fetch("SELECT layer FROM layers WHERE n_experts IS NOT NULL ORDER BY layer")]
    read = parsed(body.recorded_by(awkward, ["activations"]))
    assert read["site"] == [f"blocks.{layers[0] - 1}.hook_resid_post"]


def test_a_tab_without_its_records_is_refused_with_the_command_that_makes_them(awkward: Run, parsed: Parse) -> None:
    with pytest.raises(InputError) as refused:
        body.chosen(awkward, ViewState(run=awkward.name).with_rest(tab="routers"))
    assert refused.value.fix is not None
    assert parsed(refused.value.fix.split("`")[1])["probe"] == ["routing,router_logits"]


def test_a_run_whose_choices_are_missing_is_to_be_recorded_anew_and_a_dense_one_not(
    awkward: Run, parsed: Parse
) -> None:
    assert parsed(*commands_in(body.empty_state(awkward)))["model"] == MODEL
    awkward.store.connection.execute("UPDATE layers SET n_experts = NULL")
    read = parsed(*commands_in(body.empty_state(awkward)))
    assert (read["model"], read["store"]) == ("demo", awkward.store.path)
