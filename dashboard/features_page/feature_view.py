"""The page of one latent: what it fires on, what it goes with, who writes it, and the way to steer by it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.core.errors import InputError
from moescope.dashboard import cards, numbers
from moescope.dashboard.features_page.contexts import contexts, examples
from moescope.dashboard.features_page.feature_facts import FeatureFacts
from moescope.dashboard.features_page.feature_tables import ablated, described, experts, labels, links, logits, rules
from moescope.dashboard.features_page.readings import Reading, latent_edit
from moescope.dashboard.panel import panel
from moescope.dashboard.unrecorded import command, quoted
from moescope.dashboard.url_state import ViewState, link
from moescope.store.run import Run


def feature_view(run: Run, reading: Reading, feature: int, state: ViewState) -> Any:
    """Everything on record of one latent, text and tables first.

    Args:
        run: whose tokens it was read on.
        reading, feature: which.
        state: of the view, whose edits the links to the lab extend.

    Raises:
        InputError: there is no such latent.
    """
    facts = FeatureFacts(run, reading, feature)
    whole = facts.whole()
    if whole is None:
        raise InputError(
            f"{reading.name!r} has no latent {feature} on run {run.name!r}",
            expected=f"0 to {reading.d_sae - 1:,}" if reading.d_sae else None,
            fix="choose one of the list",
        )
    here = state.selection().but(sae=reading.name, feature=feature)
    given = {"sae": reading.sae_id, "feature": feature}
    describe = f"sae describe --sae {quoted(reading.name)} --run {{run}} --unit {feature} --command 'llm -m MODEL'"
    return html.Div(
        [
            _head(reading, feature, state, whole),
            _cards(whole, here.but(run=run.name, layer=None, expert=None, head=None)),
            cards.section(
                "What it fires on",
                contexts(run, examples(run, reading.sae_id, feature), here.but(layer=None, expert=None, head=None)),
                note="The largest alone show a latent at its best: below them, examples drawn from quantiles of its activations. A "
                "token leads to its text.",
            ),
            html.Div(
                [
                    cards.section("Labels", labels(facts.labels(), here.but(run=run.name))),
                    cards.section("Descriptions", described(facts.descriptions(), command(run, describe))),
                    cards.section("Simple rules", rules(facts.rules())),
                    cards.section("Logits", logits(whole, run)),
                    cards.section("Neighbours", links(facts.links(), here)),
                    cards.section("Experts that write it, or that it gates", _writers(facts, run)),
                ],
                className="fact-tables",
            ),
            panel("feature", "feature", [run], given=given, height=700),
            *(
                [panel("writers", "feature_writers", [run], given=given, height=420)]
                if run.rows("feature_experts")
                else []
            ),
        ],
        className="feature-view",
    )


def _head(reading: Reading, feature: int, state: ViewState, whole: Mapping[str, Any]) -> Any:
    back = state.but(feature=None)
    steps = [
        dmc.Anchor("← all latents", href=link("/features", back), size="sm", id="all-latents"),
        dmc.Anchor("previous", href=link("/features", state.but(feature=feature - 1)), size="sm")
        if feature > 0
        else None,
        dmc.Anchor("next", href=link("/features", state.but(feature=feature + 1)), size="sm")
        if feature + 1 < reading.d_sae
        else None,
    ]
    return html.Div(
        [
            dmc.Title(
                ["Latent ", f"{feature} of ", html.Span(reading.name, className="foreign")],
                order=2,
                className="detail-title",
            ),
            *(step for step in steps if step is not None),
            *_steering(reading, feature, state, whole),
        ],
        className="feature-head",
    )


def _steering(reading: Reading, feature: int, state: ViewState, whole: Mapping[str, Any]) -> list[Any]:
    add = latent_edit(reading, feature, "add", float(whole["maximum"] or 1.0))
    out = latent_edit(reading, feature, "scale", 0.0)
    if add is None or out is None:
        return [html.Span("No edit reaches the place that this autoencoder reads.", className="muted")]

    def to_lab(edit: str) -> str:
        edits = tuple(dict.fromkeys((*state.edits, edit)))
        return link("/lab", state.selection().but(sae=reading.name, feature=feature, edits=edits))

    return [
        dmc.Anchor(
            "Steer in the Lab →", href=to_lab(add), size="sm", id="steer-in-lab", attributes={"root": {"title": add}}
        ),
        dmc.Anchor(
            "Take it out in the Lab →",
            href=to_lab(out),
            size="sm",
            id="scale-in-lab",
            attributes={"root": {"title": out}},
        ),
    ]


def _cards(whole: Mapping[str, Any], here: ViewState) -> Any:
    active, tokens = whole["active"], whole["tokens"]
    return dmc.SimpleGrid(
        [
            cards.value_card(
                "Density",
                numbers.share(active, tokens),
                f"{numbers.count(active)} of {numbers.count(tokens)} tokens read",
                href=link("/tokens", here.but(mode="feature")),
            ),
            cards.value_card("Largest activation", numbers.decimal(whole["maximum"]), "over the tokens read"),
            cards.value_card("Mean activation", numbers.decimal(whole["mean"]), "where it is active"),
            cards.value_card("Documents", numbers.count(whole["documents"]), "in which it is active"),
            cards.value_card("Decoder norm", numbers.decimal(whole["decoder_norm"]), "L2 norm of its row"),
        ],
        cols={"base": 2, "md": 3, "lg": 5},
        spacing="sm",
        mb="lg",
    )


def _writers(facts: FeatureFacts, run: Run) -> Any:
    return html.Div([experts(facts.experts(), run), ablated(facts.ablation())])
