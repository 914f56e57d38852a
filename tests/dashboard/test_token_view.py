from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moescope.core.errors import InputError
from moescope.dashboard import token_view
from moescope.dashboard.kept import forget_all
from moescope.dashboard.paint import choose_pins, decisions
from moescope.dashboard.palette import luminance, palette
from moescope.dashboard.records import find_router, routers
from moescope.dashboard.token_card import token_card
from moescope.dashboard.token_colours import painted
from moescope.dashboard.token_path import token_path
from moescope.dashboard.token_view import find_part, text_of
from moescope.dashboard.url_state import Layer, ViewState
from moescope.store.store import Store


@pytest.fixture(autouse=True)
def nothing_kept() -> None:
    """Tests change rows of complete runs, which nothing else does."""
    forget_all()


def unpack(packed: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(base64.b64decode(packed["data"]), dtype=f"<u{packed['width']}")


def words(tree: Any) -> str:
    """All text of a component, in order."""
    if isinstance(tree, (list, tuple)):
        return "".join(words(part) for part in tree)
    return words(tree.children) if hasattr(tree, "children") else "" if tree is None else str(tree)


def test_the_text_of_a_run_is_its_texts(run: Any) -> None:
    payload = text_of(run, find_part(run, ViewState()))
    shown = [payload["pieces"][number] for number in unpack(payload["numbers"])]
    assert "".join(shown).replace("↵\n", "\n") == "".join(
        text for (text,) in run.store.fetch("SELECT text FROM sequences ORDER BY sequence_id")
    )
    assert [s[:2] for s in payload["sequences"]] == [[0, 0], [8, 1], [15, 2]]
    assert payload["stretches"] == [[0, 0]]
    assert {payload["pieces"][number] for number in payload["special"]} == {"<bos>"}


def test_a_filter_keeps_the_numbers_of_its_tokens(store_of: Callable[..., Store], Plan: Any, Text: Any) -> None:
    texts = [Text("a", [b"x", b"y"]), Text("b", [b"z"]), Text("a", [b"w", b"v"])]
    run = store_of(Plan(texts=texts)).run("planted")
    part = find_part(run, ViewState(label="a"))
    assert part.token.tolist() == [0, 1, 3, 4]
    assert text_of(run, part)["stretches"] == [[0, 0], [2, 3]]


def test_without_a_vocabulary_ids_are_shown(store_of: Callable[..., Store], Plan: Any) -> None:
    run = store_of(Plan(vocabulary=False)).run("planted")
    assert text_of(run, find_part(run, ViewState()))["pieces"][1:3] == ["[0]", "[1]"]


def test_pages_together_are_the_run(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_view, "PAGE_TOKENS", 9)
    first = find_part(run, ViewState())
    parts = [find_part(run, ViewState(page=page)) for page in range(1, first.pages + 1)]
    assert first.pages > 1
    assert np.concatenate([part.token for part in parts]).tolist() == list(range(21))
    assert first.total == 21
    with pytest.raises(InputError, match="page"):
        find_part(run, ViewState(page=first.pages + 1))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (ViewState(label="klingon"), "klingon"),
        (ViewState(sequence=99), "sequences 0 to 2"),
        (ViewState(sequence=0, label="japanese"), "label"),
    ],
)
def test_a_filter_that_finds_nothing_says_so(run: Any, state: ViewState, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_part(run, state)


@pytest.mark.parametrize("layer", [0, 1])
def test_pins_carry_the_top_expert_of_each_token(run: Any, layer: int) -> None:
    colours, _, _, _ = painted(run, ViewState(layer=Layer(layer)))
    truth = run.store.fetch("SELECT experts[1] FROM routing WHERE layer = ? ORDER BY token", [layer])
    assert unpack(colours).tolist() == [expert for (expert,) in truth]


def test_hits_are_the_tokens_that_chose_the_expert_by_slot(run: Any) -> None:
    colours, _, heading, _ = painted(run, ViewState(layer=Layer(1), expert=2))

    truth = run.store.fetch("SELECT coalesce(list_position(experts, 2), 0) FROM routing WHERE layer = 1 ORDER BY token")
    assert unpack(colours["hits"]).tolist() == [slot for (slot,) in truth]
    assert f"{sum(slot > 0 for (slot,) in truth)} decisions of 21 tokens" in words(heading)
    assert "wherelayer = 1×andexpert = 2×" in words(heading)


def test_hits_on_several_pages_are_counted_over_all_of_them(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, whole, _ = painted(run, ViewState(layer=Layer(0), expert=1, piece=0))
    monkeypatch.setattr(token_view, "PAGE_TOKENS", 9)
    forget_all()
    _, _, paged, pages = painted(run, ViewState(layer=Layer(0), expert=1, piece=0))
    assert pages > 1
    assert words(whole).split(" of ")[0] == words(paged).split(" of ")[0]


@pytest.mark.parametrize(("mode", "column"), [("weight", "weights[1]"), ("margin", "margin"), ("entropy", "entropy")])
def test_a_scale_orders_tokens_as_the_records_do(run: Any, mode: Any, column: str) -> None:
    colours, _, _, _ = painted(run, ViewState(mode=mode))
    steps = unpack(colours).astype(float)
    truth = np.array(
        [value for (value,) in run.store.fetch(f"SELECT {column} FROM routing WHERE layer = 0 ORDER BY token")]
    )
    inside = (truth > colours["low"]) & (truth < colours["high"])
    again = colours["low"] + steps / 254 * (colours["high"] - colours["low"])
    assert np.abs(again - truth)[inside].max() <= (colours["high"] - colours["low"]) / 254
    assert colours["recorded"] == 21


def test_tokens_without_a_likelihood_are_marked_not_invented(run: Any) -> None:
    colours, legend, _, _ = painted(run, ViewState(mode="nll"))
    missing = np.flatnonzero(unpack(colours) == 255).tolist()
    assert missing == [
        token for (token,) in run.store.fetch("SELECT token FROM tokens WHERE nll IS NULL ORDER BY token")
    ]
    assert "3 tokens" in words(legend)


def test_a_layer_without_a_router_is_refused_in_the_legend(run: Any) -> None:
    colours, legend, _, _ = painted(run, ViewState(layer=Layer(7)))
    assert colours is None
    assert "no router at layer 7" in str(legend)


def test_pins_are_those_with_the_highest_lift_or_those_picked(store_of: Callable[..., Store], Plan: Any) -> None:
    texts = Plan().texts * 40
    run = store_of(Plan(texts=texts)).run("planted")
    state = ViewState(label="japanese")
    part, router = find_part(run, state), find_router(run, state, routers(run))
    top = decisions(run, part, router).top
    pins = choose_pins(run, part, router, top, ())
    share = dict(run.store.fetch("SELECT experts[1], count(*) FROM routing WHERE layer = 0 GROUP BY 1"))
    total = sum(share.values())
    for pin in pins:
        assert pin.tokens == int((top == pin.expert).sum())
        assert pin.lift == pytest.approx(pin.tokens / len(top) / (share[pin.expert] / total))
    assert [pin.lift for pin in pins] == sorted((pin.lift for pin in pins), reverse=True)
    assert [pin.expert for pin in choose_pins(run, part, router, top, (3, 1))] == [3, 1]


def test_the_path_of_a_token_is_what_was_recorded(run: Any) -> None:
    path = {row["name"]: row for row in token_path(run, 12, ViewState(run="planted", layer=Layer(1)))}
    for layer, experts, weights, margin in run.store.fetch(
        "SELECT layer, experts, weights, margin FROM routing WHERE token = 12"
    ):
        row = path[f"L{layer}"]
        assert [(e["name"], e["weight"]) for e in row["experts"]] == [
            (f"E{e}", f"{w:.3f}") for e, w in zip(experts, weights, strict=True)
        ]
        assert row["margin"] == f"{margin:.3f}"
        assert row["largest"] == ["channel 1: 1.00", "channel 2: 0.50", "channel 3: −0.20"]
        assert row["here"] is (layer == 1)
    nll = run.store.fetch("SELECT nll FROM tokens WHERE token = 12")[0][0]
    assert f"{nll:.3f} nats" in words(token_card(run, ViewState(run="planted", token=12)))


def test_norms_of_slots_and_massive_activations_stand_in_the_path(run: Any) -> None:
    run.store.connection.execute(
        "INSERT INTO expert_outputs SELECT run_id, token, layer, block, [2.5, 0.75] FROM routing WHERE layer = 1"
    )
    run.store.connection.execute("INSERT INTO massive_activations VALUES (?, 1, 3, 77, -400.0, 1000.0)", [run.run_id])
    first, second = token_path(run, 3, ViewState(run="planted"))
    assert [e["norm"] for e in first["experts"]] == ["", ""]
    assert [e["norm"] for e in second["experts"]] == ["2.50", "0.75"]
    assert (first["massive"], second["massive"]) == ([], ["channel 77: −400.0, 1,000 × the median"])


def test_what_a_run_lacks_is_called_not_recorded(store_of: Callable[..., Store], Plan: Any) -> None:
    store = store_of(Plan(residual=False))
    store.connection.execute("DELETE FROM routing WHERE layer = 1")
    store.connection.execute("UPDATE routing SET margin = NULL")
    first, second = token_path(store.run("planted"), 3, ViewState(run="planted"))
    assert (first["margin"], first["residual"]) == ("not recorded", "not recorded")
    assert [second[name] for name in ("experts", "margin", "entropy", "residual")] == ["not recorded"] * 4


def test_a_token_that_is_not_there_is_refused(run: Any) -> None:
    with pytest.raises(InputError, match="tokens 0 to 20"):
        token_card(run, ViewState(token=21))


def test_every_colour_of_the_scale_can_be_read() -> None:
    for background, ink in palette():
        light, dark = sorted(
            (
                luminance(tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)))
                for colour in (background, {"#000": "#000000", "#fff": "#ffffff"}[ink])
            ),
            reverse=True,
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_a_quantity_that_never_changes_gets_no_invented_range(run: Any) -> None:
    run.store.connection.execute("UPDATE routing SET entropy = 1.25")
    colours, legend, _, _ = painted(run, ViewState(mode="entropy"))
    assert colours is not None
    assert (colours["low"], colours["high"]) == (1.25, 1.25)
    assert set(unpack(colours).tolist()) == {127}
    assert "1.25 nats nearly everywhere" in words(legend)
