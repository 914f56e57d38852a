"""Parts of an expert's card that plain queries give: load, output, labels, tokens, passages."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import cards, expert_records, numbers
from moescope.dashboard.expert_parts import quiet, small_table, tokens_link
from moescope.dashboard.passage import passage
from moescope.dashboard.records import Router, expert_name
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.context import pieces
from moescope.store.run import Run

_TOP_PIECES, _PASSAGES = 20, 4


def load(run: Run, router: Router, here: ViewState) -> Any:
    """How much the expert takes, and with which weight."""
    expert = here.expert or 0
    found = expert_records.counts(run, router, expert)
    if not found.known or found.decisions is None or found.mine is None:
        return cards.section("Load", quiet("Not recorded."))
    weight = None if not found.mine or found.weight_sum is None else found.weight_sum / found.mine
    mean = cards.value_card("Mean weight", numbers.decimal(weight), f"over {numbers.count(found.mine)} tokens")
    if expert < 0:
        words = f"{numbers.count(found.mine)} tokens; a shared expert takes part in every one"
        return dmc.SimpleGrid([cards.value_card("Tokens", numbers.short_count(found.mine), words), mean], cols=2)
    fair = found.mine / found.decisions * router.experts
    return dmc.SimpleGrid(
        [
            cards.value_card(
                "Share of decisions",
                numbers.share(found.mine, found.decisions),
                f"{numbers.count(found.mine)} of {numbers.count(found.decisions)}",
                href=link("/tokens", here),
            ),
            cards.value_card("Load ÷ fair share", numbers.ratio(fair), f"fair: 1 of {router.experts} experts"),
            mean,
            cards.value_card(
                "Tokens that choose it",
                numbers.share(found.mine, found.tokens),
                f"{numbers.count(found.mine)} of {numbers.count(found.tokens)}",
                href=link("/tokens", here),
            ),
        ],
        cols={"base": 2, "xl": 2},
        spacing="sm",
    )


def labels(run: Run, router: Router, here: ViewState) -> Any:
    """Share of each label's decisions, as `loads` counts them."""
    rows = expert_records.by_label(run, router, here.expert or 0)
    if not rows or all(label is None for label, _, _ in rows):
        return quiet("The texts of this run carry no labels.")
    every, whole = sum(mine for _, mine, _ in rows), sum(decisions for _, _, decisions in rows)
    largest = max(mine / decisions for _, mine, decisions in rows) or 1.0
    body = [
        [
            label_link(label, here),
            bar(mine / decisions / largest),
            numbers.share(mine, decisions),
            f"{numbers.count(mine)}/{numbers.count(decisions)}",
            numbers.ratio(mine / decisions / (every / whole)) if every else numbers.MISSING,
        ]
        for label, mine, decisions in rows
    ]
    note = quiet("Share of the label's decisions that name this expert; lift: over its share of all decisions.")
    return html.Div([note, small_table(["label", "", "share", "n/N", "lift"], body, name="By label")])


def label_link(label: str | None, here: ViewState) -> Any:
    """A label, leading to its tokens."""
    return "(no label)" if label is None else tokens_link(label, here.but(label=label))


def bar(part: float) -> Any:
    """A bar of a share of the largest."""
    return html.Div(html.Div(className="bar-fill", style={"width": f"{100 * part:.1f}%"}), className="bar")


def output(run: Run, router: Router, here: ViewState) -> Any:
    """How large its output gets and how many of its neurons work."""
    row = expert_records.reductions(run, router, here.expert or 0)
    if row is None:
        return cards.section("Output", quiet("Not recorded: the run has no row in `experts` for it."))
    if not row["tokens"]:
        return cards.section("Output", quiet("Never chosen, so it gave no output."))
    peak, channel, token = row["max_abs_out"], row["max_abs_channel"], row["max_abs_token"]
    product = None if row["weighted_norm_sum"] is None else row["weighted_norm_sum"] / row["tokens"]
    active, zeros = (
        "not recorded" if row[name] is None else numbers.share(row[name], 1) for name in ("active_share", "zero_share")
    )
    parts: list[Any] = [
        cards.facts(
            [
                ("Mean L2 norm", _or_missing(row["output_norm_mean"])),
                ("Mean weight × norm", _or_missing(product)),
                ("Neurons active", active),
                ("Neurons exactly 0", zeros),
                ("Largest |output|", f"{_or_missing(peak)}" + (f" in channel {channel}" if peak is not None else "")),
            ]
        )
    ]
    if token is not None and token >= 0:
        at = tokens_link(numbers.count(token), here.but(token=token))
        parts.append(dmc.Box([dmc.Text(["at token ", at, ":"], className="muted"), passage(run, token)]))
    note = (
        f"Over all its {numbers.count(row['tokens'])} tokens; norms and the largest output before the router's weight."
    )
    return cards.section("Output", dmc.Stack(parts, gap="xs"), note=note)


def top_pieces(run: Run, router: Router, here: ViewState) -> Any:
    """The tokens it is chosen for most, with the share of their kind and its lift."""
    expert = here.expert or 0
    rows = expert_records.top_pieces(run, router, expert, limit=_TOP_PIECES)
    if not rows:
        return quiet("No recorded decision names it.")
    mine, every = expert_records.share_in_sample(run, router, expert)
    reader = PieceReader(pieces(run))
    # The link leads to all tokens of the run: of these the sample tells the least number there can be.
    least = "≥ " if expert_records.tokens_of(run) > expert_records.SAMPLE else ""
    body = [
        [
            html.Span(reader.alone(token_id), className="piece foreign"),
            tokens_link(least + numbers.count(n), here.but(piece=token_id)),
            f"{numbers.share(n, total)} of {numbers.count(total)}",
            numbers.ratio(n / total / (mine / every)) if mine else numbers.MISSING,
        ]
        for token_id, n, total in rows
    ]
    note = (
        f"Most frequent first; share: of all such tokens, those that chose {expert_name(expert)}; lift: over "
        f"{numbers.share(mine, every)}, its share of all tokens. {expert_records.sample_words(run)}"
    )
    return html.Div([quiet(note), small_table(["token", "n", "share of its kind", "lift"], body, name="Top tokens")])


def contexts(run: Run, router: Router, here: ViewState) -> Any:
    """Passages round the tokens where it has its largest weights, one of each text."""
    rows = expert_records.strongest_tokens(run, router, here.expert or 0, limit=_PASSAGES)
    if not rows:
        return quiet("No recorded decision names it.")
    found = [
        dmc.Box(
            [
                dmc.Text(
                    [
                        "weight " + numbers.decimal(weight)
                        if weight is not None
                        else f"choice {place}, no weights recorded",
                        " at token ",
                        tokens_link(numbers.count(token), here.but(token=token)),
                    ],
                    className="muted",
                ),
                passage(run, token),
            ]
        )
        for token, weight, place in rows
    ]
    note = f"Where its weight is largest, one passage of each text. {expert_records.sample_words(run)}"
    return dmc.Stack([quiet(note), *found], gap="xs")


def _or_missing(value: float | None) -> str:
    return "not recorded" if value is None else numbers.decimal(value)
