"""The tokens that took one way through the layers, and the commonest ways."""

from __future__ import annotations

import re
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.dashboard import cards, grids, numbers
from moescope.dashboard.records import Router, layer_of, routers
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.context import pieces
from moescope.store.run import Run

MOST_STEPS = 8
_SHOWN = 40
_STEP = re.compile(r"(\d{1,5})(?:\.([a-z]+(?:\.\d+)?))?:(\d{1,6})", re.ASCII)

Way = list[tuple[Router, int]]


def read_way(run: Run, text: str) -> Way:
    """Routers and first choices of a way written as `0:5-1:7`.

    Raises:
        InputError: it is no way, or the run has no such router or expert.
    """
    known = routers(run)
    steps: Way = []
    for part in text.split("-")[: MOST_STEPS + 1]:
        match = _STEP.fullmatch(part)
        if match is None:
            raise InputError(f"{text[:80]!r} is not a way", expected="layers and experts: 0:5-1:7")
        layer, block, expert = int(match[1]), match[2], int(match[3])
        router = next((r for r in known if r.layer == layer and (block is None or r.block == block)), None)
        if router is None or expert >= router.experts:
            raise InputError(
                f"run {run.name!r} has no expert {part}",
                found=", ".join(f"{r.name} with {r.experts} experts" for r in known[:8]),
                fix="choose a way in the diagram",
            )
        steps.append((router, expert))
    if len(steps) > MOST_STEPS:
        raise InputError(f"a way has at most {MOST_STEPS} steps here", fix="look at a shorter path")
    return steps


def way_card(run: Run, text: str) -> tuple[str, Any]:
    """Title and content of the panel for one way: how many tokens, which ones, each a link."""
    way = read_way(run, text)
    title = " → ".join(f"{router.name}·E{expert}" for router, expert in way)
    source, parameters = _matching(way)
    found = run.sql(source, parameters).count("token").fetchall()[0][0]
    whole = run.rows("tokens")
    reader = PieceReader(pieces(run))
    known = routers(run)
    last, expert = way[-1]
    here = ViewState(run=run.name, layer=layer_of(last, known), expert=expert)
    kinds = run.sql(
        f"""
        WITH taken AS ({source})
        SELECT t.token_id, count(*) AS n
        FROM taken
        JOIN tokens t ON t.run_id = $run AND t.token = taken.token
        GROUP BY t.token_id
        ORDER BY n DESC, t.token_id
        LIMIT 12
        """,  # noqa: S608  names of the steps only, values are bound
        parameters,
    ).fetchall()
    first = run.sql(
        f"""
        WITH taken AS ({source} ORDER BY r0.token LIMIT {_SHOWN})
        SELECT t.token, t.token_id, t.sequence_id, t.position
        FROM taken
        JOIN tokens t ON t.run_id = $run AND t.token = taken.token
        ORDER BY t.token
        """,  # noqa: S608  names of the steps only, values are bound
        parameters,
    ).fetchall()
    steps = [
        dmc.Anchor(
            f"{router.name}·E{number}", href=link("/tokens", ViewState(run=run.name, layer=layer_of(router, known), expert=number)),
            size="sm",
        )
        for router, number in way
    ]  # fmt: skip
    return title, html.Div(
        [
            cards.value_card(
                "Tokens", numbers.count(found), f"{numbers.share(found, whole)} of {numbers.count(whole)}"
            ),
            dmc.Group([dmc.Text("All tokens of", className="muted"), *steps], gap=8),
            _kinds(kinds, reader, here, found, last.expert_name(expert)),
            _tokens(first, reader, here, found),
        ],
        className="way-list",
    )


def path_table(result: Result, run: Run) -> Any:
    """The commonest paths of an answer, each a link to its tokens."""
    known = routers(run)
    chain = sorted(known, key=lambda router: (router.layer, router.block))  # as the analysis goes through the layers
    state = ViewState(run=run.name).with_rest(tab="paths")
    length = result.parameters.get("length")
    if length:
        state = state.with_rest(length=length if length != 3 else None)
    rows = []
    for row in result.table.to_pylist():
        if not row.get("path"):
            continue
        start = next((i for i, r in enumerate(chain) if (r.layer, r.block) == (row["layer"], row["block"])), None)
        experts = [int(name.strip()[1:]) for name in row["path"].split("→")]
        taken = list(zip(chain[start:], experts, strict=False)) if start is not None else []
        way = "-".join(f"{layer_of(router, known)}:{expert}" for router, expert in taken)
        short = len(taken) == len(experts) <= MOST_STEPS
        rows.append(
            {
                "rank": row["rank"],
                "path": " → ".join(f"{router.name}·E{expert}" for router, expert in taken),
                "tokens": row["n"],
                "tokens_href": link("/routing", state.with_rest(way=way)) if short else None,
                "share": 100 * row["value"],
                "null": None if row["null"] is None else 100 * row["null"],
                "ratio": row["value"] / row["null"] if row["null"] else None,
            }
        )
    return grids.grid(
        "path-grid",
        [
            grids.number_column("rank", "Rank", ",d", width=70),
            grids.text_column("path", "Path, by first choices", minWidth=220, flex=1),
            grids.link_column(
                "tokens",
                "Tokens",
                type="rightAligned",
                width=90,
                valueFormatter={"function": "d3.format(',d')(params.value)"},
            ),
            grids.number_column("share", "Share %", ",.3f", width=90),
            grids.number_column("null", "Independent layers, %", ",.3f", width=160),
            grids.number_column(
                "ratio", "÷", ",.1f", width=70, headerTooltip="share over what independent layers give at this rank"
            ),
        ],
        rows,
        height=340,
        fit=None,
    )


def _matching(way: Way) -> tuple[str, dict[str, Any]]:
    """The query for the tokens of a way, and its parameters."""
    joins = "".join(f"\nJOIN routing r{i} ON r{i}.run_id = $run AND r{i}.token = r0.token" for i in range(1, len(way)))
    conditions = " AND ".join(
        f"r{i}.layer = $layer{i} AND r{i}.block = $block{i} AND r{i}.experts[1] = $expert{i}" for i in range(len(way))
    )
    parameters: dict[str, Any] = {}
    for i, (router, expert) in enumerate(way):
        parameters |= {f"layer{i}": router.layer, f"block{i}": router.block, f"expert{i}": expert}
    return f"SELECT r0.token FROM routing r0{joins}\nWHERE r0.run_id = $run AND {conditions}", parameters  # noqa: S608  values are bound


def _kinds(rows: list[tuple[int, int]], reader: PieceReader, here: ViewState, found: int, last: str) -> Any:
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(html.Span(reader.alone(token_id), className="piece foreign")),
                dmc.TableTd(numbers.count(n), className="number"),
                dmc.TableTd(numbers.share(n, found), className="number soft"),
                dmc.TableTd(
                    dmc.Anchor(f"all of {last}", href=link("/tokens", here.but(piece=token_id)), size="sm"),
                    className="number",
                ),
            ]
        )
        for token_id, n in rows
    ]
    note = f"n: on the whole way; all of {last}: every token of the kind that chooses it, on this way or another."
    return cards.section("Which tokens", _table(["token", "n", "share", ""], body), note=note)


def _tokens(rows: list[tuple[int, int, int, int]], reader: PieceReader, here: ViewState, found: int) -> Any:
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(
                    dmc.Anchor(
                        numbers.count(token), href=link("/tokens", here.but(token=token, sequence=sequence)), size="sm"
                    )
                ),
                dmc.TableTd(html.Span(reader.alone(token_id), className="piece foreign")),
                dmc.TableTd(f"{numbers.count(sequence)} at {numbers.count(position)}", className="number soft"),
            ]
        )
        for token, token_id, sequence, position in rows
    ]
    shown = f"The first {len(rows)} of {numbers.count(found)}." if found > len(rows) else f"All {len(rows)}."
    return cards.section("Tokens", _table(["token", "", "sequence"], body), note=shown)


def _table(names: list[str], body: list[Any]) -> Any:
    head = dmc.TableTr(
        [dmc.TableTh(name, className="number" if name in ("n", "share", "sequence") else "") for name in names]
    )
    return dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(body)], className="small-table", verticalSpacing=3, horizontalSpacing=6
    )
