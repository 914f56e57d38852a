"""One text of two runs, token by token: likelihoods beside each other, and the decisions that went elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.dashboard import grids, numbers
from moescope.dashboard.records import Router, expert_name, layer_of, routers
from moescope.dashboard.token_text import CONTINUES, PieceReader, brief, visible
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.comparison.paired_sequences import GENERATED_LEFT_OUT, SAME_SEQUENCES, generated, pair_parameters
from moescope.store.run import Run

Show = Literal["all", "changed", "lost", "gained"]
SHOWS: tuple[Show, ...] = get_args(Show)
TOKENS = 512
"""Tokens of one page."""

_OTHER = "\n".join(
    ("WITH", SAME_SEQUENCES, "SELECT other_id, n_tokens FROM same_sequences WHERE sequence_id = $sequence")
)
_TOKENS = """
    SELECT token, position, token_id, nll, lag(predicted_id) OVER (ORDER BY position) AS predicted
    FROM tokens
    WHERE run_id = $run AND sequence_id = $sequence AND coalesce(phase, 'prefill') = 'prefill'
    ORDER BY position
"""
_DECISIONS = """
    SELECT token, layer, block, experts
    FROM routing
    WHERE run_id = $run AND token BETWEEN $low AND $high
"""
_HEAD = "SELECT label, left(text, 100) FROM sequences WHERE run_id = ? AND sequence_id = ?"
_BYTES = "SELECT token_id, bytes FROM vocabulary WHERE run_id = $run AND list_contains($ids, token_id)"


@dataclass(frozen=True)
class Pair:
    """One token in both runs.

    Attributes:
        position, token_id: the token; `token` and `other` its numbers in the two runs.
        nll_a, nll_b: nats; None where there is none.
        right_a, right_b: whether it was the most likely next token; None where nothing predicted it.
        moved: router → experts lost and gained, only where the sets differ.
        compared: routers whose decision at the token both runs have.
    """

    position: int
    token_id: int | None
    token: int
    other: int
    nll_a: float | None
    nll_b: float | None
    right_a: bool | None
    right_b: bool | None
    moved: Mapping[tuple[int, str], tuple[list[int], list[int]]]
    compared: frozenset[tuple[int, str]]

    def fits(self, show: Show) -> bool:
        """Whether it is among what is shown: `lost` and `gained` are predictions that were right in one run only."""
        if show == "changed":
            return bool(self.moved)
        if show == "lost":
            return self.right_a is True and self.right_b is False
        return show == "all" or (self.right_a is False and self.right_b is True)


def other_sequence(run: Run, other: Run, sequence: int) -> int:
    """The number of the same sequence in the other run; raises `InputError` where it has none."""
    found = run.store.fetch(_OTHER, pair_parameters(run, other) | {"sequence": sequence})
    if not found:
        raise InputError(
            f"sequence {sequence} of run {run.name!r} is not in {other.name!r}",
            expected="a sequence of the same token ids in both",
            fix="choose a text of the list",
        )
    return int(found[0][0])


def pairs_of(run: Run, other: Run, sequence: int) -> list[Pair]:
    """Every token that a sequence has in both runs, with what changed of it."""
    theirs = {row[1]: row for row in _read(other, other_sequence(run, other, sequence))}
    tokens = [(row, theirs[row[1]]) for row in _read(run, sequence) if row[1] in theirs and theirs[row[1]][2] == row[2]]
    first = _decisions(run, [a[0] for a, _ in tokens])
    second = _decisions(other, [b[0] for _, b in tokens])
    return [_pair(a, b, first.get(a[0], {}), second.get(b[0], {})) for a, b in tokens]


def side_by_side(run: Run, other: Run, state: ViewState) -> Any:
    """The grid of one text: the tokens asked for, and a column for every router that decided otherwise somewhere."""
    assert state.sequence is not None
    show = shown(state)
    every = pairs_of(run, other, state.sequence)
    fitting = [pair for pair in every if pair.fits(show)]
    pages = max(1, -(-len(fitting) // TOKENS))
    if state.page > pages:
        raise InputError(
            f"there is no page {state.page} of these tokens", found=f"{pages} pages", fix="choose one of these"
        )
    page = fitting[(state.page - 1) * TOKENS : state.page * TOKENS]
    known = routers(run)
    moved = [r for r in known if any((r.layer, r.block) in pair.moved for pair in every)]
    pieces = dict(zip((p.position for p in every), _pieces(run, [p.token_id for p in every]), strict=True))
    grid = grids.grid(
        "cmp-tokens",
        _columns(moved),
        [_row(pair, pieces[pair.position], moved, known, run, other) for pair in page],
        height=520,
        row_id="params.data.id",
        fit=None,
        tooltipShowDelay=300,
    )
    summary = _summary(every, fitting, moved, without_generated=generated(run, other))
    return html.Div([_heading(run, state, bool(moved)), summary, grid, _pager(state, pages)])


def shown(state: ViewState) -> Show:
    """Which tokens the address asks for. Raises `InputError` for a word it cannot be."""
    for show in SHOWS:
        if state.given("show", "all") == show:
            return show
    raise InputError(
        f"the address has show={state.given('show')[:80]!r}", expected=f"one of {', '.join(SHOWS)}", fix="correct it"
    )


def _read(run: Run, sequence: int) -> list[tuple[Any, ...]]:
    return run.store.fetch(_TOKENS, {"run": run.run_id, "sequence": sequence})


def _decisions(run: Run, tokens: list[int]) -> dict[int, dict[tuple[int, str], list[int]]]:
    found: dict[int, dict[tuple[int, str], list[int]]] = {}
    if not tokens:
        return found
    rows = run.store.fetch(_DECISIONS, {"run": run.run_id, "low": min(tokens), "high": max(tokens)})
    for token, layer, block, experts in rows:
        found.setdefault(token, {})[layer, block] = list(experts or ())
    return found


def _pair(
    a: tuple[Any, ...],
    b: tuple[Any, ...],
    first: Mapping[tuple[int, str], list[int]],
    second: Mapping[tuple[int, str], list[int]],
) -> Pair:
    moved = {}
    compared = frozenset(first.keys() & second.keys())
    for place in sorted(compared):
        lost = sorted(set(first[place]) - set(second[place]))
        gained = sorted(set(second[place]) - set(first[place]))
        if lost or gained:
            moved[place] = (lost, gained)
    right = [None if row[4] is None or row[3] is None else row[4] == row[2] for row in (a, b)]
    return Pair(a[1], a[2], a[0], b[0], a[3], b[3], right[0], right[1], moved, compared)


def _pieces(run: Run, ids: list[int | None]) -> list[str]:
    given = sorted({i for i in ids if i is not None})
    raw = run.store.fetch(_BYTES, {"run": run.run_id, "ids": given})
    read = PieceReader({int(i): bytes(b) for i, b in raw if b is not None}).read(ids)
    return [brief(text if text is not None else CONTINUES, 60) for text in read]


def _columns(moved: list[Router]) -> list[dict[str, Any]]:
    changed = {"cmp-changed": {"function": "params.value"}}
    columns: list[dict[str, Any]] = [
        grids.number_column("position", "Place", ",d", width=74),
        grids.link_column("piece", "Token", width=130),
        grids.number_column("nll_a", "NLL, first", ".3f", width=92),
        grids.number_column("nll_b", "NLL, other", ".3f", width=95),
        grids.number_column("change", "Change", "+.3f", width=88),
        {
            "field": "predicted",
            "headerName": "Predicted",
            "width": 118,
            "cellClassRules": {"cmp-changed": {"function": "params.data.turned"}},
        },
        grids.number_column("switched", "Switched", ",d", width=90, headerTooltip="routers that chose other experts"),
        grids.link_column("in_other", "Other run", width=92),
    ]
    columns += [
        {**grids.link_column(f"r{n}", router.name, width=118), "cellClassRules": changed}
        for n, router in enumerate(moved)
    ]
    return columns


def _row(pair: Pair, piece: str, moved: list[Router], known: list[Router], run: Run, other: Run) -> dict[str, Any]:
    here = ViewState(run=run.name, token=pair.token)
    both = pair.nll_a is not None and pair.nll_b is not None
    row = {
        "id": str(pair.position),
        "position": pair.position,
        "piece": piece,
        "piece_href": link("/tokens", here),
        "nll_a": pair.nll_a,
        "nll_b": pair.nll_b,
        "change": pair.nll_b - pair.nll_a if both else None,  # type: ignore[operator]  # both are numbers here
        "predicted": _predicted(pair),
        "turned": pair.right_a != pair.right_b,
        "switched": len(pair.moved),
        "in_other": "in other",
        "in_other_href": link("/tokens", ViewState(run=other.name, token=pair.other)),
    }
    for n, router in enumerate(moved):
        switch = pair.moved.get((router.layer, router.block))
        row[f"r{n}"] = _switch(*switch) if switch else ""
        row[f"r{n}_href"] = link("/tokens", here.but(layer=layer_of(router, known))) if switch else None
    return row


def _predicted(pair: Pair) -> str:
    if pair.right_a is None or pair.right_b is None:
        return "—"
    if pair.right_a == pair.right_b:
        return "right in both" if pair.right_a else "wrong in both"
    return "✕ lost" if pair.right_a else "✓ gained"


def _switch(lost: list[int], gained: list[int]) -> str:
    """`E5 → E9`; several with commas, nothing as a dash."""
    names = [", ".join(map(expert_name, experts)) or "—" for experts in (lost, gained)]
    return f"{names[0]} → {names[1]}"


def _heading(run: Run, state: ViewState, moved: bool) -> Any:
    """Which text it is, with a way to read it as text where decisions switched."""
    label, text = run.store.fetch(_HEAD, [run.run_id, state.sequence])[0]
    parts = [dmc.Text(f"Sequence {numbers.count(state.sequence)}", span=True, className="strong")]
    parts += [dmc.Text(f" {label}", span=True, className="foreign muted")] if label else []
    parts += [dmc.Text(f" {brief(visible(text), 90)} ", span=True, className="foreign muted")] if text else []
    read = ViewState(run=state.run, other=state.other, sequence=state.sequence, mode="changed")
    parts += [dmc.Anchor("Read it with its switches marked →", href=link("/tokens", read), size="sm")] if moved else []
    return html.Div(parts)


def _summary(every: list[Pair], fitting: list[Pair], moved: list[Router], *, without_generated: bool) -> Any:
    switched = sum(len(pair.moved) for pair in every)
    decisions = sum(len(pair.compared) for pair in every)
    compared = frozenset[tuple[int, str]]().union(*(pair.compared for pair in every))
    lost, gained = (sum(pair.fits(show) for pair in every) for show in ("lost", "gained"))
    parts = [f"{numbers.count(len(fitting))} of {numbers.count(len(every))} tokens shown."]
    if compared:
        parts.append(
            f"{numbers.count(switched)} of {numbers.count(decisions)} decisions ({numbers.share(switched, decisions)}) "
            f"went to other experts, in {len(moved)} of {len(compared)} routers."
        )
    parts.append(f"Predictions lost: {lost}, gained: {gained}.")
    parts += [GENERATED_LEFT_OUT] if without_generated else []
    return dmc.Text(" ".join(parts), className="muted", mb=6)


def _pager(state: ViewState, pages: int) -> Any:
    if pages == 1:
        return None
    around = [
        dmc.Anchor(words, href=link("/compare", state.but(page=page)), size="sm") if 1 <= page <= pages else None
        for words, page in (("← earlier", state.page - 1), ("later →", state.page + 1))
    ]
    return dmc.Group(
        [around[0], dmc.Text(f"page {state.page} of {pages}", className="muted"), around[1]], gap="sm", mt=6
    )
