"""Pinned experts side by side: the numbers of their cards in one table."""

from __future__ import annotations

import re
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard import cards, expert_records, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.expert_parts import expert_link, figure, quiet, small_table, tokens_link
from moescope.dashboard.records import Router, find_router, layer_of
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import Layer, ViewState, decode
from moescope.routing.context import pieces
from moescope.store.run import Run

MOST = 8
_PIN = re.compile(r"(\d{1,5})(?:\.([a-z]+(?:\.\d+)?))?:(-?\d{1,9})", re.ASCII)


def pinned(run: Run, state: ViewState, known: list[Router]) -> list[tuple[Router, int]]:
    """The experts pinned in the address: `pinned=3:7,4.attn:2`, and `pins` of the layer that is shown.

    Raises:
        InputError: what is no expert's place, no expert of the run, or too many.
    """
    found: list[tuple[Router, int]] = []
    for text in filter(None, state.given("pinned").split(",")):
        match = _PIN.fullmatch(text)
        if match is None:
            raise InputError(f"{text!r} is no pinned expert", expected="layer:expert, for instance 3:7,4:2")
        place = ViewState(layer=Layer(int(match[1]), match[2]), expert=int(match[3]))
        found.append((find_router(run, place, known), int(match[3])))
    if state.pins and state.layer is not None:
        router = find_router(run, ViewState(layer=state.layer, pins=state.pins), known)
        found += [(router, expert) for expert in state.pins]
    unique = list(dict.fromkeys(found))
    if len(unique) > MOST:
        raise InputError(f"{len(unique)} experts are pinned", expected=f"at most {MOST}")
    return unique


def comparison(answers: Answers, run: Run, search: str | None, known: list[Router]) -> Any:
    """A column an expert; nothing where none is pinned."""
    experts = pinned(run, decode(search), known)
    if not experts:
        return html.Div()
    columns = [_column(answers, run, router, known, expert) for router, expert in experts]
    names = [_name(router, known, expert, run) for router, expert in experts]
    rows = [[label, *(column[i] for column in columns)] for i, label in enumerate(_ROWS)]
    note = "Pin one more expert from its card to compare." if len(experts) == 1 else None
    table = small_table(["", *names], rows, name="Pinned experts")
    unpin = dmc.Button("Unpin all", id="experts-unpin", size="compact-xs", variant="default")
    return cards.section("Pinned experts", dmc.Stack([table, unpin], gap="xs", align="flex-start"), note=note)


_ROWS = (
    "Load ÷ fair share",
    "Tokens, n/N",
    "Mean weight",
    "Mean output norm",
    "Largest |output|",
    "Neurons active",
    "Label it takes most of, lift",
    "Most frequent token",
    "Importance (REAP), rank",
    "ΔNLL when taken out",
)


def _name(router: Router, known: list[Router], expert: int, run: Run) -> Any:
    return expert_link(router, known, expert, ViewState(run=run.name), words=router.expert_name(expert))


def _column(answers: Answers, run: Run, router: Router, known: list[Router], expert: int) -> list[Any]:
    """The values of one expert, in the order of the rows."""
    here = ViewState(run=run.name, layer=layer_of(router, known), expert=expert)
    found = expert_records.counts(run, router, expert)
    row = expert_records.reductions(run, router, expert) or {}
    mine, tokens = found.mine, found.tokens
    fair = None if not found.decisions or mine is None or expert < 0 else mine / found.decisions * router.experts
    return [
        numbers.ratio(fair),
        numbers.MISSING if mine is None else tokens_link(f"{numbers.count(mine)}/{numbers.count(tokens)}", here),
        numbers.decimal(found.weight_sum / mine if mine and found.weight_sum is not None else None),
        numbers.decimal(row.get("output_norm_mean")),
        numbers.decimal(row.get("max_abs_out")),
        numbers.share(row.get("active_share"), 1),
        _label(run, router, here),
        _piece(run, router, here),
        *_scores(answers, run, router, expert),
    ]


def _label(run: Run, router: Router, here: ViewState) -> Any:
    rows = [row for row in expert_records.by_label(run, router, here.expert or 0) if row[0] is not None]
    every, whole = sum(row[1] for row in rows), sum(row[2] for row in rows)
    if not every:
        return numbers.MISSING
    label, mine, decisions = max(rows, key=lambda row: row[1] / row[2])
    lift = numbers.ratio(mine / decisions / (every / whole))
    return html.Span([tokens_link(str(label), here.but(label=label)), f" {lift}"], className="foreign")


def _piece(run: Run, router: Router, here: ViewState) -> Any:
    rows = expert_records.top_pieces(run, router, here.expert or 0, limit=1)
    if not rows:
        return numbers.MISSING
    token_id, n, _ = rows[0]
    piece = html.Span(PieceReader(pieces(run)).alone(token_id), className="piece foreign")
    return html.Span([piece, " ", tokens_link(numbers.count(n), here.but(piece=token_id))])


def _scores(answers: Answers, run: Run, router: Router, expert: int) -> list[Any]:
    """Rank by REAP, and ΔNLL; missing where the run is too large to ask at once, or was not asked."""
    if run.rows("routing") > expert_records.LONG:
        return [quiet("see its card"), _ablation(answers, run, router, expert)]
    return [_rank(answers, run, router, expert), _ablation(answers, run, router, expert)]


def _rank(answers: Answers, run: Run, router: Router, expert: int) -> str:
    row = _row(answers, run, "importance", "REAP", router, expert)
    return numbers.MISSING if row is None else f"{int(row['rank'])} of {router.experts}"


def _ablation(answers: Answers, run: Run, router: Router, expert: int) -> str:
    row = _row(answers, run, "expert_effects", "ΔNLL", router, expert)
    return "not measured" if row is None else f"{figure(row['value'])} nats"


def _row(answers: Answers, run: Run, analysis: str, metric: str, router: Router, expert: int) -> Any:
    try:
        frame = answers.ask({"analysis": analysis, "runs": [run.name], "given": {}}).df()
    except MoescopeError:
        return None
    mine = (frame["layer"] == router.layer) & (frame["block"] == router.block) & (frame["expert"] == expert)
    found = frame[mine.fillna(False).astype(bool) & (frame["metric"] == metric) & frame["value"].notna()]
    return None if found.empty else found.iloc[0]
