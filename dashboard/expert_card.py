"""The expert card: how much one expert takes, from which texts, how large its output gets, and on which tokens."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import cards, numbers
from moescope.dashboard.passage import passage
from moescope.dashboard.records import Router, expert_name, layer_of
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.context import pieces
from moescope.store.run import Run

_TOP_PIECES = 20


def expert_card(run: Run, router: Router, known: list[Router], expert: int) -> Any:
    """Everything recorded of one expert, each count a link to its tokens."""
    here = ViewState(run=run.name, layer=layer_of(router, known), expert=expert)
    return dmc.Stack(
        [
            _load(run, router, here),
            _by_label(run, router, here),
            _output(run, router, here),
            _top_pieces(run, router, here),
            dmc.Group(
                [
                    dmc.Anchor("Its tokens, highlighted →", href=link("/tokens", here), size="sm"),
                    dmc.Anchor(f"All of {router.name} →", href=link("/tokens", here.but(expert=None)), size="sm"),
                ],
                gap="md",
            ),
        ],
        gap="lg",
    )


def _load(run: Run, router: Router, here: ViewState) -> Any:
    tokens, decisions = run.store.fetch(
        """
        SELECT coalesce(sum(tokens) FILTER (expert = $expert), 0)::BIGINT, sum(tokens) FILTER (expert >= 0)::BIGINT
        FROM loads
        WHERE run_id = $run AND layer = $layer AND block = $block
        """,
        {"run": run.run_id, "layer": router.layer, "block": router.block, "expert": here.expert},
    )[0]
    if not decisions:
        return cards.section("Load", dmc.Text("Not recorded.", className="muted"))
    fair = tokens / decisions * router.experts
    return dmc.SimpleGrid(
        [
            cards.value_card(
                "Share of decisions",
                numbers.share(tokens, decisions),
                f"{numbers.count(tokens)} of {numbers.count(decisions)}",
                href=link("/tokens", here),
            ),
            cards.value_card("Load ÷ fair share", numbers.ratio(fair), f"fair: 1 of {router.experts} experts"),
        ],
        cols=2,
        spacing="sm",
    )


def _by_label(run: Run, router: Router, here: ViewState) -> Any:
    rows = run.store.fetch(
        """
        SELECT
            label,
            coalesce(sum(tokens) FILTER (expert = $expert), 0)::BIGINT AS mine,
            sum(tokens)::BIGINT AS decisions
        FROM loads
        WHERE run_id = $run AND layer = $layer AND block = $block AND expert >= 0
        GROUP BY label
        HAVING sum(tokens) > 0
        ORDER BY mine / decisions DESC, label
        """,
        {"run": run.run_id, "layer": router.layer, "block": router.block, "expert": here.expert},
    )
    if not rows or all(label is None for label, _, _ in rows):
        return cards.section("By label", dmc.Text("The texts of this run carry no labels.", className="muted"))
    largest = max(mine / decisions for _, mine, decisions in rows) or 1.0
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(_label(label, here), className="foreign"),
                dmc.TableTd(
                    html.Div(
                        html.Div(className="bar-fill", style={"width": f"{100 * mine / decisions / largest:.1f}%"}),
                        className="bar",
                    )
                ),
                dmc.TableTd(numbers.share(mine, decisions), className="number"),
                dmc.TableTd(f"{numbers.count(mine)}/{numbers.count(decisions)}", className="number soft"),
            ]
        )
        for label, mine, decisions in rows
    ]
    return cards.section(
        "By label",
        _table(["label", "", "share", "n/N"], body),
        note="Share of the label's decisions that name this expert.",
    )


def _label(label: str | None, here: ViewState) -> Any:
    return "(no label)" if label is None else dmc.Anchor(label, href=link("/tokens", here.but(label=label)), size="sm")


def _output(run: Run, router: Router, here: ViewState) -> Any:
    found = run.store.fetch(
        """
        SELECT output_norm_mean, max_abs_out, max_abs_channel, max_abs_token, weight_sum, tokens
        FROM experts
        WHERE run_id = ? AND layer = ? AND block = ? AND expert = ?
        """,
        [run.run_id, router.layer, router.block, here.expert],
    )
    if not found:
        return cards.section(
            "Output", dmc.Text("Not recorded: the run has no rows in `experts` for it.", className="muted")
        )
    norm, peak, channel, token, weight, tokens = found[0]
    if not tokens:
        return cards.section("Output", dmc.Text("Never chosen, so it gave no output.", className="muted"))
    parts: list[Any] = [
        cards.facts(
            [
                ("Mean L2 norm", numbers.decimal(norm)),
                ("Mean weight", numbers.decimal(weight / tokens)),
                (
                    "Largest |output|",
                    f"{numbers.decimal(peak)} in channel {channel}" if peak is not None else "not recorded",
                ),
            ]
        )
    ]
    if token is not None and token >= 0:
        parts.append(
            dmc.Box(
                [
                    dmc.Text(
                        [
                            "at token ",
                            dmc.Anchor(numbers.count(token), href=link("/tokens", here.but(token=token)), size="sm"),
                            ":",
                        ],
                        className="muted",
                    ),
                    passage(run, token),
                ]
            )
        )
    return cards.section("Output", dmc.Stack(parts, gap="xs"), note="Before the router's weight, over all its tokens.")


def _top_pieces(run: Run, router: Router, here: ViewState) -> Any:
    rows = run.store.fetch(
        """
        WITH mine AS (
            SELECT t.token_id, count(*) AS n
            FROM routing r
            JOIN tokens t ON t.run_id = r.run_id AND t.token = r.token
            WHERE r.run_id = $run AND r.layer = $layer AND r.block = $block AND list_contains(r.experts, $expert)
            GROUP BY t.token_id
            ORDER BY n DESC, t.token_id
            LIMIT $limit
        )
        SELECT mine.token_id, mine.n, count(*)
        FROM mine
        JOIN tokens t ON t.run_id = $run AND t.token_id = mine.token_id
        GROUP BY mine.token_id, mine.n
        ORDER BY mine.n DESC, mine.token_id
        """,
        {"run": run.run_id, "layer": router.layer, "block": router.block, "expert": here.expert, "limit": _TOP_PIECES},
    )
    if not rows:
        return cards.section("Tokens", dmc.Text("No recorded decision names it.", className="muted"))
    reader = PieceReader(pieces(run))
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(html.Span(reader.alone(token_id), className="piece foreign")),
                dmc.TableTd(
                    dmc.Anchor(numbers.count(n), href=link("/tokens", here.but(piece=token_id)), size="sm"),
                    className="number",
                ),
                dmc.TableTd(f"{numbers.share(n, total)} of {numbers.count(total)}", className="number soft"),
            ]
        )
        for token_id, n, total in rows
    ]
    note = f"Most frequent first; beside it, the share of all such tokens in the run that chose {expert_name(here.expert or 0)}."
    return cards.section(f"Top {len(rows)} tokens", _table(["token", "n", "share of its kind"], body), note=note)


def _table(names: list[str], body: list[Any]) -> Any:
    head = dmc.TableTr(
        [
            dmc.TableTh(name, className="number" if name in ("share", "n", "n/N", "share of its kind") else "")
            for name in names
        ]
    )
    return dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(body)], className="small-table", verticalSpacing=3, horizontalSpacing=6
    )
