"""Numbers that compare or count over several places: what they leave out, what they pair, and what they call unknown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.dashboard import token_view
from moescope.dashboard.answers import Answers
from moescope.dashboard.compare import grounds, measures, side_by_side, texts
from moescope.dashboard.kept import forget_all
from moescope.dashboard.overview.value_cards import value_cards
from moescope.dashboard.paint import slots
from moescope.dashboard.records import Router, routers
from moescope.dashboard.token_changes import changes
from moescope.dashboard.token_colours import painted
from moescope.dashboard.token_view import find_part
from moescope.dashboard.url_state import Layer, ViewState
from moescope.store.run import Run
from moescope.store.store import Store

LEFT_OUT = "Generated tokens are left out."


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Tests change rows of complete runs, which nothing else does."""
    forget_all()


@pytest.fixture
def two(store_of: Callable[..., Store], Plan: Any) -> tuple[Run, Run]:
    """Two runs of the same texts with the same decisions and likelihoods."""
    store = store_of(Plan(name="first"), Plan(name="second"))
    return store.run("first"), store.run("second")


def execute(run: Run, query: str) -> None:
    """Change rows of a run; its id takes the place of the question mark."""
    run.store.connection.execute(query, [run.run_id])


def generate(run: Run, sequence: int = 2) -> None:
    """Give a sequence a generated token, with a likelihood, and a decision of expert 3 at layer 0."""
    token = 21
    run.store.connection.execute(
        "INSERT INTO tokens (run_id, token, sequence_id, position, token_id, phase, nll) VALUES (?, ?, ?, 6, 1, 'decode', 40)",
        [run.run_id, token, sequence],
    )
    run.store.connection.execute(
        "INSERT INTO routing (run_id, token, layer, block, experts, weights) VALUES (?, ?, 0, 'mlp', [3], [1])",
        [run.run_id, token],
    )
    execute(
        run,
        "INSERT INTO loads SELECT run_id, layer, block, NULL, 'decode', 3, 1, 1 FROM layers WHERE run_id = ? AND layer = 0",
    )


def words(tree: Any) -> str:
    """All text of a component, in order."""
    if isinstance(tree, (list, tuple)):
        return "".join(words(part) for part in tree)
    return words(tree.children) if hasattr(tree, "children") else "" if tree is None else str(tree)


def components(tree: Any) -> list[Any]:
    if isinstance(tree, (list, tuple)):
        return [c for part in tree for c in components(part)]
    return [tree, *components(getattr(tree, "children", None))] if hasattr(tree, "_namespace") else []


def sentence(found: Any) -> str:
    """The first words of the token view's heading."""
    return str(words(found.heading.children[0]))


def measured(run: Run, other: Run) -> dict[str, dict[str, Any]]:
    grid = next(
        c
        for c in components(measures.measures(Answers(run.store), run, other))
        if getattr(c, "id", None) == "cmp-measures"
    )
    return {row["metric"]: row for row in grid.rowData}


def test_generated_tokens_do_not_enter_the_comparison_of_texts(two: tuple[Run, Run]) -> None:
    run, other = two
    assert not any(LEFT_OUT in g.words for g in grounds.grounds(run, other).told)
    generate(other)
    generate(run)
    execute(other, "UPDATE tokens SET nll = 90 WHERE run_id = ? AND phase = 'decode'")
    execute(other, "UPDATE routing SET experts = [2] WHERE run_id = ? AND token = 21")
    assert {row["change"] for row in texts.changed_texts(run, other)} == {0}
    assert [pair.position for pair in side_by_side.pairs_of(run, other, 2)] == [0, 1, 2, 3, 4, 5]
    assert LEFT_OUT in grounds.grounds(run, other).told[0].words
    shown = side_by_side.side_by_side(run, other, ViewState(run="first", other="second", sequence=2))
    assert LEFT_OUT in words(shown)
    found = changes(run, other, find_part(run, ViewState()), routers(run)[0], None)
    assert found.swapped.tolist() == [0] * 21 + [-1]


def test_tokens_whose_phase_is_not_known_are_of_the_text(two: tuple[Run, Run]) -> None:
    run, other = two
    for each in two:
        execute(each, "UPDATE tokens SET phase = NULL WHERE run_id = ?")
    assert len(side_by_side.pairs_of(run, other, 0)) == 8
    assert {row["change"] for row in texts.changed_texts(run, other)} == {0}
    assert changes(run, other, find_part(run, ViewState()), routers(run)[0], None).swapped.tolist() == [0] * 21


def test_a_measure_that_was_0_is_told_with_its_difference(two: tuple[Run, Run]) -> None:
    run, other = two
    execute(run, "UPDATE routing SET entropy = 0 WHERE run_id = ?")
    execute(other, "UPDATE routing SET entropy = 0.5 + token / 100 WHERE run_id = ?")
    row = measured(run, other)["router entropy"]
    assert row["difference"].startswith("+0.")
    assert row["percent"] is None
    assert (row["apart"], row["verdict"]) == (True, "● leaves 0 out")
    same = measured(run, other)["mean NLL"]
    assert (same["difference"], same["apart"]) == ("0", False)


def test_experts_that_only_the_other_run_chose_have_changed(two: tuple[Run, Run]) -> None:
    run, other = two
    execute(run, "UPDATE routing SET experts = [0, 1] WHERE run_id = ?")
    execute(other, "UPDATE routing SET experts = [0, 1, 2] WHERE run_id = ?")
    for a, b in (two, two[::-1]):
        found = changes(a, b, find_part(a, ViewState()), routers(a)[0], None)
        assert found.swapped.tolist() == [1] * 21


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sequences SET n_tokens = n_tokens + 1 WHERE run_id = ?",
        "UPDATE sequences SET content_hash = NULL WHERE run_id = ?",
    ],
)
def test_texts_that_are_not_known_to_be_the_same_are_not_compared(two: tuple[Run, Run], change: str) -> None:
    run, other = two
    execute(other, change)
    with pytest.raises(InputError, match="read other texts"):
        changes(run, other, find_part(run, ViewState()), routers(run)[0], None)


def test_texts_without_ids_are_the_same_only_in_the_same_corpus(two: tuple[Run, Run]) -> None:
    run, other = two
    for each in two:
        execute(each, "UPDATE sequences SET content_hash = NULL WHERE run_id = ?")
    assert changes(run, other, find_part(run, ViewState()), routers(run)[0], None).swapped.max() == 0
    execute(other, "UPDATE runs SET corpus_fingerprint = NULL WHERE run_id = ?")
    with pytest.raises(InputError, match="read other texts"):
        changes(run, run.store.run("second"), find_part(run, ViewState()), routers(run)[0], None)


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (ViewState(piece=0), "2 tokens of 14 tokens"),
        (ViewState(layer=Layer(0), expert=2), "3 decisions of 14 tokens"),
        (ViewState(layer=Layer(0), expert=2, piece=0), "2 decisions of 14 tokens"),
    ],
)
def test_hits_on_several_pages_are_of_the_sequences_that_are_left(
    run: Run, state: ViewState, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences 0 and 2 have a kept context; sequence 1 has the same pieces and experts, and is left out."""
    execute(run, "UPDATE routing SET experts = [0, 1] WHERE run_id = ?")
    execute(run, "UPDATE routing SET experts = [2, 0] WHERE run_id = ? AND token IN (0, 8, 9, 15, 16)")
    execute(run, "UPDATE loads SET tokens = 0 WHERE run_id = ? AND label IS NOT NULL")
    execute(run, "UPDATE loads SET tokens = 5 WHERE run_id = ? AND label IS NULL AND layer = 0 AND expert = 2")
    run.store.connection.execute(
        "INSERT INTO feature_contexts (sae_id, run_id, feature, stratum, rank, sequence_id, position, value, first_position) "
        "VALUES ($sae, $run, 7, 0, 0, 0, 3, 2.5, 2), ($sae, $run, 7, 0, 1, 2, 3, 2.5, 2)",
        {"sae": "00000000-0000-0000-0000-000000000001", "run": run.run_id},
    )
    run.store.connection.execute(
        "INSERT INTO saes (sae_id, name, site) VALUES ('00000000-0000-0000-0000-000000000001', 'small', 'x')"
    )
    state = state.but(feature=7).with_rest(only="feature")
    whole = painted(run, state)
    monkeypatch.setattr(token_view, "PAGE_TOKENS", 8)
    forget_all()
    paged = painted(run, state)
    assert (whole.pages, paged.pages) == (1, 2)
    assert (sentence(whole), sentence(paged)) == (shown, shown)


@pytest.mark.parametrize("size", [100_000, 9])
def test_a_shared_expert_sees_every_token(run: Run, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_view, "PAGE_TOKENS", size)
    execute(run, "UPDATE layers SET n_shared = 1 WHERE run_id = ?")
    found = painted(run, ViewState(layer=Layer(0), expert=-1))
    assert "decision" not in words(found.heading)
    assert sentence(found).startswith("21 tokens")
    assert found.colours is not None
    assert found.colours["hits"] is None
    pieces = painted(run, ViewState(layer=Layer(0), expert=-1, piece=0))
    assert sentence(pieces) == "3 tokens of 21 tokens"


def test_the_place_among_the_chosen_is_read_from_the_records(run: Run) -> None:
    part, router = find_part(run, ViewState()), routers(run)[0]
    truth = run.store.fetch("SELECT coalesce(list_position(experts, 1), 0) FROM routing WHERE layer = 0 ORDER BY token")
    assert slots(run, part, router, 1).tolist() == [slot for (slot,) in truth]


def test_tokens_on_several_pages_are_counted_with_the_generated_ones(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(run)
    whole = painted(run, ViewState(layer=Layer(0), expert=3))
    monkeypatch.setattr(token_view, "PAGE_TOKENS", 9)
    forget_all()
    paged = painted(run, ViewState(layer=Layer(0), expert=3))
    assert paged.pages > 1
    assert sentence(whole) == sentence(paged)
    assert sentence(paged).endswith("of 22 tokens")
    assert find_part(run, ViewState(label=token_view.NO_LABEL)).total == 7
    first = find_part(run, ViewState(layer=Layer(0), expert=3).with_rest(only="expert"))
    kept = np.unique(
        [
            s
            for (s,) in run.store.fetch(
                "SELECT sequence_id FROM tokens JOIN routing USING (token) WHERE layer = 0 AND list_contains(experts, 3)"
            )
        ]
    )
    assert first.total == sum(
        n for s, n in run.store.fetch("SELECT sequence_id, count(*) FROM tokens GROUP BY 1") if s in kept
    )


def test_decisions_that_only_one_run_recorded_are_not_counted_as_the_same(two: tuple[Run, Run]) -> None:
    run, other = two
    execute(other, "DELETE FROM routing WHERE run_id = ? AND (layer = 1 OR token = 4)")
    execute(other, "UPDATE routing SET experts = [7] WHERE run_id = ? AND token = 2")
    pairs = side_by_side.pairs_of(run, other, 0)
    assert [len(pair.compared) for pair in pairs] == [1, 1, 1, 1, 0, 1, 1, 1]
    shown = words(side_by_side.side_by_side(run, other, ViewState(run="first", other="second", sequence=0)))
    assert "1 of 7 decisions (14.3 %) went to other experts, in 1 of 1 routers." in shown


def test_without_a_common_decision_nothing_is_said_of_switches(two: tuple[Run, Run]) -> None:
    run, other = two
    execute(other, "DELETE FROM routing WHERE run_id = ?")
    shown = words(side_by_side.side_by_side(run, other, ViewState(run="first", other="second", sequence=0)))
    assert "went to other experts" not in shown


@pytest.mark.parametrize("which", [("second",), ("first", "second")])
def test_models_that_are_not_recorded_are_not_called_the_same(two: tuple[Run, Run], which: tuple[str, ...]) -> None:
    for run in two:
        if run.name in which:
            execute(run, "UPDATE runs SET model = 'unknown', architecture = NULL, anatomy = '{}' WHERE run_id = ?")
    first, second = (run.store.run(run.name) for run in two)
    model = grounds.grounds(first, second).told[1]
    assert model.holds == "partly"
    assert f"not recorded in {' and '.join(which)}" in model.words


def test_likelihoods_that_are_not_numbers_are_told_as_such(run: Run) -> None:
    def card() -> str:
        return words(value_cards(run, run.info, routers(run), ViewState(run=run.name))[1])

    assert "n = 18" in card()
    execute(run, "UPDATE tokens SET nll = 'nan' WHERE run_id = ? AND token IN (3, 4)")
    assert "not a number in 2 tokens" in card()
    execute(run, "UPDATE tokens SET nll = NULL WHERE run_id = ?")
    assert "not recorded" in card()


def test_the_experts_card_tells_the_range_of_chosen_experts(run: Run) -> None:
    known = [Router(0, "mlp", 4, 2), Router(1, "mlp", 8, 6)]
    shown = words(value_cards(run, run.info, known, ViewState(run=run.name))[3])
    assert "4–8" in shown
    assert "a layer, 2–6 chosen a token" in shown
