"""Parts of an expert's card that analyses give: labels with intervals, partners, paths, ranks, ablation, latents, rules."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc
import pandas as pd
from dash import html

from moescope.core.errors import InputError, MoescopeError
from moescope.dashboard import cards, expert_records, numbers
from moescope.dashboard.answers import Answers
from moescope.dashboard.expert_counts import label_link, labels
from moescope.dashboard.expert_parts import (
    counted,
    expert_link,
    figure,
    quiet,
    reason,
    small_table,
    tokens_link,
    with_interval,
)
from moescope.dashboard.records import Router, expert_name
from moescope.dashboard.unrecorded import command, quoted
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.effects.metric_names import metric_name
from moescope.routing.features.feature_tables import chosen_sae
from moescope.store.run import Run

_SHOWN = 6
_FEWEST = 30
_FDR = 0.05
RULES = {"super_paper": "paper", "super_released": "released", "super_reap": "REAP"}


def label_shares(answers: Answers, run: Run, router: Router, _known: list[Router], here: ViewState) -> Any:
    """Share of each label's tokens with its interval, and which labels stand out; counts where nothing more can be told."""
    try:
        result = answers.ask({"analysis": "specialization", "runs": [run.name], "given": {}})
    except InputError:
        return labels(run, router, here)
    mine = _of(result.df(), router, here).sort_values("value", ascending=False)
    body = [
        [
            label_link(row.label, here),
            counted(
                with_interval(row.value, row.ci_low, row.ci_high, percent=True),
                f"{numbers.count(round(row.value * row.n))}/{numbers.count(row.n)}",
            ),
            numbers.ratio(row.lift),
            _q(row.q) if row.lift > 1 else "",
        ]
        for row in mine.itertuples()
    ]
    out = [row.label for row in mine.itertuples() if row.q < _FDR and row.lift > 1]
    words = (
        f"Prefers {', '.join(out)}, beyond shuffled labels (q < {_FDR:g})."
        if out
        else "No label stands out (q < 0.05)."
    )
    note = quiet(
        f"Share of the label's tokens that choose it; lift: over its share of all labelled tokens. {result.interval}."
    )
    return html.Div(
        [
            dmc.Text(words, className="foreign", size="sm"),
            small_table(["label", "share [95 %], n/N", "lift", "q"], body, name="By label"),
            note,
        ]
    )


def partners(answers: Answers, run: Run, router: Router, known: list[Router], here: ViewState) -> Any:
    """The experts it is chosen together with, most over chance first."""
    result = answers.ask({"analysis": "coactivation", "runs": [run.name], "given": {"layer": router.layer}})
    mine = _of(result.df(), router, here)
    mine = mine[mine["together"] >= _FEWEST].sort_values("over_chance", ascending=False)
    if mine.empty:
        return quiet(f"Chosen with no other expert in {_FEWEST} tokens or more.")
    rows = list(mine.head(_SHOWN).itertuples())
    body = [
        [
            expert_link(router, known, row.other, here),
            with_interval(row.value, row.ci_low, row.ci_high, percent=True),
            counted(
                f"{numbers.count(row.together)}/{numbers.count(row.n)}",
                tokens_link("both in the text", here.but(pins=(here.expert, row.other))),
            ),
            numbers.ratio(row.over_chance),
        ]
        for row in rows
    ]
    note = "Of its tokens, those that also choose the other; × chance: over k different experts drawn by load alone."
    return html.Div([quiet(note), small_table(["with", "share [95 %]", "n/N", "× chance"], body, name="Partners")])


def path(answers: Answers, run: Run, router: Router, known: list[Router], here: ViewState) -> Any:
    """The experts that its tokens come from, at the router before, and go to, at the next."""
    chain = [r for r in known if r.block == router.block]
    at = chain.index(router)
    if len(chain) < 2:
        return quiet("The model has one router of this kind, so there is no path.")
    parts: list[Any] = []
    if at > 0:
        parts.append(_step(answers, run, chain[at - 1], router, known, here, backwards=True))
    if at + 1 < len(chain):
        parts.append(_step(answers, run, router, chain[at + 1], known, here, backwards=False))
    note = "Of the pairs of chosen experts of a token that hold it; lift: over the share where both routers are independent."
    return dmc.Stack([quiet(note), *parts], gap="sm")


def _step(
    answers: Answers, run: Run, first: Router, second: Router, known: list[Router], here: ViewState, *, backwards: bool
) -> Any:
    given = {"layer": first.layer, "block": first.block}
    frame = answers.ask({"analysis": "transitions", "runs": [run.name], "given": given}).df()
    frame["pairs"] = frame["value"] * frame["n"]
    mine = frame[frame["to_expert" if backwards else "expert"] == here.expert]
    total = float(mine["pairs"].sum())
    far, place = (first, "from") if backwards else (second, "to")
    body = [
        [
            expert_link(far, known, int(row.expert if backwards else row.to_expert), here),
            numbers.share(row.pairs, total)
            if backwards
            else with_interval(row.value, row.ci_low, row.ci_high, percent=True),
            f"{numbers.count(round(row.pairs))}/{numbers.count(round(total))}",
            numbers.ratio(row.lift),
        ]
        for row in mine.sort_values("pairs", ascending=False).head(_SHOWN).itertuples()
        if row.pairs > 0
    ]
    heading = dmc.Title(f"{'Before' if backwards else 'After'}: {far.name}", order=3, className="part-title")
    if not body:
        return html.Div([heading, quiet("None of its tokens has a decision there.")])
    return html.Div([heading, small_table([place, "share" if backwards else "share [95 %]", "n/N", "lift"], body)])


def importance(answers: Answers, run: Run, router: Router, _known: list[Router], here: ViewState) -> Any:
    """Its rank in its layer by each score, with the score."""
    result = answers.ask({"analysis": "importance", "runs": [run.name], "given": {}})
    mine = _of(result.df(), router, here)
    units = {name[6:-1]: unit for name, unit in result.units.items() if name.startswith("value[")}
    body = [
        [
            html.Span(row.metric, title=units.get(row.metric, "")),
            str(int(row.rank)) if not pd.isna(row.rank) else numbers.MISSING,
            with_interval(row.value, row.ci_low, row.ci_high, whole=row.metric == "frequency"),
            numbers.ratio(row.value / row.null) if row.null and row.null > 0 else numbers.MISSING,
        ]
        for row in mine.itertuples()
    ]
    note = quiet(
        "Rank 1: largest of the layer; × even: over the layer's sums dealt out evenly. Hover over a score for its unit."
    )
    return html.Div(
        [note, small_table(["score", f"rank of {router.experts}", "value [95 %]", "× even"], body, name="Importance")]
    )


def ablation(answers: Answers, run: Run, router: Router, _known: list[Router], here: ViewState) -> Any:
    """What taking it out alone does, beside the other experts of its layer; how to measure it where nobody has."""
    try:
        result = answers.ask({"analysis": "expert_effects", "runs": [run.name], "given": {}})
        mine = _of(result.df(), router, here)
    except InputError:
        mine = pd.DataFrame()
    direct = _measured(run, router, here)
    if not len(mine):
        return direct if direct is not None else _not_measured(run, router, here)
    body = []
    for row in mine.itertuples():
        controls = figure(row.null) if not pd.isna(row.null) else numbers.MISSING
        q = _q(row.q) if not pd.isna(getattr(row, "q", float("nan"))) else ""
        body.append([row.metric, with_interval(row.value, row.ci_low, row.ci_high), controls, numbers.count(row.n), q])
    note = "Taken out alone, against the mean of the layer's other experts taken out in the same way (others)."
    table = small_table(["metric", "value [95 %]", "others", "tokens", "q"], body, name="Ablation effect")
    return html.Div([quiet(note), table, direct])


def _measured(run: Run, router: Router, here: ViewState) -> Any:
    """Interventions measured one by one that take the expert out; None where there are none."""
    found = expert_records.measured_effects(run, router, here.expert or 0)
    if not found:
        return None
    body = [
        [
            counted(effect.words, f"{metric_name(effect.metric)}, {effect.unit}"),
            counted(with_interval(effect.value, effect.low, effect.high), f"controls {_controls(effect)}"),
            numbers.count(effect.n),
        ]
        for effect in found
    ]
    note = "Measured for themselves; controls: mean [smallest, largest] of random interventions of the same size."
    table = small_table(["intervention, metric", "value [95 %]", "tokens"], body, name="Measured interventions")
    return html.Div([quiet(note), table])


def _controls(effect: expert_records.Measured) -> str:
    if not effect.controls:
        return "none"
    return f"{with_interval(effect.control_mean, effect.control_low, effect.control_high)}, {effect.controls} draws"


def _not_measured(run: Run, router: Router, here: ViewState) -> Any:
    edit = edit_line(router, here.expert or 0)
    measures = command(run, f"intervene effect {{model}} --edit {quoted(edit)}", model=True)
    return dmc.Stack(
        [
            quiet("Not measured in a sweep over experts. Measure this one beside random controls, or every one alone:"),
            dmc.Code(measures, className="command foreign"),
            dmc.Group(
                [
                    dmc.CopyButton(
                        value=measures, children="Copy", copiedChildren="Copied", size="xs", variant="default"
                    ),
                    dmc.Anchor("Measure it on the Work page →", href=link("/work", here), size="sm"),
                ],
                gap="sm",
            ),
        ],
        gap="xs",
    )


def latents(answers: Answers, run: Run, router: Router, _known: list[Router], here: ViewState) -> Any:
    """Latents it writes, and latents that move its router logit."""
    given: dict[str, Any] = {"expert": here.expert, "layer": router.layer}
    try:
        if expert_records.has(run, "feature_experts"):  # else the analysis says what is missing
            given["sae"] = chosen_sae(run, None, table="feature_experts").name
        frame = answers.ask({"analysis": "feature_writers", "runs": [run.name], "given": given}).df()
    except MoescopeError as refused:
        return reason(refused)
    frame = frame[frame["block"] == router.block]
    there = here.but(sae=given.get("sae"))
    parts: list[Any] = []
    for side, metric, heading in (
        ("writes", "writes in excess", "It writes"),
        ("gates", "moves the logit", "Its router logit rises with"),
    ):
        rows = frame[(frame["side"] == side) & (frame["metric"] == metric)].sort_values("rank")
        if rows.empty:
            continue
        body = [
            [
                dmc.Anchor(f"F{row.feature}", href=link("/features", there.but(feature=int(row.feature))), size="sm"),
                with_interval(row.value, row.ci_low, row.ci_high),
                figure(row.null),
                numbers.count(row.n),
            ]
            for row in rows.itertuples()
        ]
        parts += [
            dmc.Title(heading, order=3, className="part-title"),
            small_table(["latent", "value [95 %]", "chance", "active tokens"], body, name=heading),
        ]
    return dmc.Stack(parts, gap="xs") if parts else quiet("Nothing was kept of this expert.")


def rules(answers: Answers, run: Run, router: Router, _known: list[Router], here: ViewState) -> Any:
    """Whether each rule calls it a super expert, and by what margin."""
    body = []
    for measure, name in RULES.items():
        try:
            result = answers.ask({"analysis": "expert_atlas", "runs": [run.name], "given": {"measure": measure}})
        except InputError as refused:
            if not expert_records.has(run, "experts"):
                return reason(refused)
            body.append([name, numbers.MISSING, "no layer to look at"])
            continue
        row = _of(result.df(), router, here).iloc[0]
        if row["state"] != "value":
            body.append([name, numbers.MISSING, row["state"]])
        else:
            yes = "✓ super expert" if row["value"] > 1 and row["detail"] == "super expert" else "no"
            body.append([name, numbers.ratio(row["value"]), yes])
    note = "Largest |output| over the rule's threshold; over 1 in a layer the rule looks at, it is a super expert."
    more = dmc.Anchor("All super experts →", href=link("/phenomena", here), size="sm")
    return html.Div(
        [quiet(note), small_table(["rule", "÷ threshold", "verdict"], body, name="Super-expert rules"), more]
    )


def edit_line(router: Router, expert: int) -> str:
    """The edit that takes the expert out, in one line.

    Example:
        >>> edit_line(Router(3, "mlp", 16, 2), 7)
        'ablate layer=3 experts=7'
    """
    block = "" if router.block == "mlp" else f" block={router.block}"
    return f"ablate layer={router.layer}{block} experts={expert}"


def _of(frame: pd.DataFrame, router: Router, here: ViewState) -> pd.DataFrame:
    """Rows of the expert."""
    mine = (frame["layer"] == router.layer) & (frame["block"] == router.block) & (frame["expert"] == here.expert)
    return frame[mine.fillna(False).astype(bool)]


def _q(q: float) -> str:
    return ("● " if q < _FDR else "") + (f"{q:.3f}" if q >= 0.001 else f"{q:.0e}")


def no_shared(expert: int, what: str) -> Any:
    """Why a part says nothing of a shared expert."""
    return quiet(f"{expert_name(expert)} is a shared expert: every token goes through it, so there {what}.")


SECTIONS = {
    "labels": ("By label", label_shares),
    "partners": ("Partners", partners),
    "path": ("Path in and out", path),
    "importance": ("Importance", importance),
    "ablation": ("Ablation effect", ablation),
    "latents": ("SAE features it writes", latents),
    "rules": ("Super-expert rules", rules),
}
"""Parts by name: heading, and what fills them."""
READS_ALL = ("labels", "partners", "path", "importance", "rules")
"""Parts that read all decisions of the run, or its residual stream at every token."""


def section(name: str, children: Any) -> Any:
    """A part under its heading."""
    return cards.section(SECTIONS[name][0], children)
