"""The tables of a latent's page; what was not recorded says which verb of `moescope sae` fills it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import numbers
from moescope.dashboard.phenomena_page.expert_links import expert_href
from moescope.dashboard.records import expert_name
from moescope.dashboard.token_text import PieceReader
from moescope.dashboard.unrecorded import copied
from moescope.dashboard.url_state import Layer, ViewState, link
from moescope.routing.context import pieces
from moescope.routing.features.feature_tables import RULE_NAMES
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_KINDS = {
    "cosine": ("Nearest decoder rows", "cosine"),
    "coactivation": ("Fires with", "phi"),
    "family": ("Family", "overlap"),
    "split": ("In another autoencoder", "cosine"),
    "association": ("Fires in the same windows as", "association"),
    "absorption": ("Absorption", "value"),
}
_LABELS_SHOWN, _EXPERTS_SHOWN = 12, 10


def labels(rows: list[dict[str, Any]], here: ViewState) -> Any:
    """Lift of labels with interval and false-discovery rate."""
    if not rows:
        return _none("No lift was measured: the texts carry no labels, or too few documents of each.")
    found = sum((row["q"] or 1) < 0.05 and row["lift"] > 1 for row in rows)
    body = [
        [
            dmc.Anchor(
                row["label"],
                href=link("/tokens", here.but(label=row["label"], layer=None, expert=None, head=None)),
                size="sm",
                className="foreign",
            ),
            _with_bounds(row["lift"], row["ci_low"], row["ci_high"], 2),
            f"{numbers.count(row['active'])}/{numbers.count(row['tokens'])}",
            numbers.decimal(row["q"]) if row["q"] is None or row["q"] >= 0.001 else "<0.001",
        ]
        for row in rows[:_LABELS_SHOWN]
    ]
    note = f"P(active | label) ÷ P(active); {found} of {len(rows)} labels above 1 at a false-discovery rate of 5 %."
    return html.Div([_note(note), _table(("label", "lift", "n/N", "q"), body)])


def described(rows: list[dict[str, Any]], filled_by: str) -> Any:
    """Descriptions with what each foretells, beside chance and another latent's description."""
    if not rows:
        why = "Nobody has described it. Have latents described, and scored by what that foretells:"
        return dmc.Stack([_none(why), copied(filled_by)], gap=6)
    shown: list[Any] = []
    for text in dict.fromkeys((row["text"], row["describer"]) for row in rows):
        mine = [row for row in rows if (row["text"], row["describer"]) == text and row["metric"]]
        body = [
            [
                row["metric"].replace("_", " "),
                _with_bounds(row["value"], row["ci_low"], row["ci_high"]),
                numbers.decimal(row["chance"]),
                numbers.decimal(row["another"]),
                numbers.count(row["n"]),
            ]
            for row in mine
        ]
        shown.append(
            dmc.Box(
                [
                    html.P(text[0], className="foreign description"),
                    html.Div(["by ", html.Span(text[1], className="foreign")], className="soft fine"),
                    _table(("score", "value", "by chance", "another's", "n"), body) if body else _none("Not scored."),
                ]
            )
        )
    return dmc.Stack(shown, gap="sm")


def rules(rows: list[dict[str, Any]]) -> Any:
    """How well a table of tokens or labels predicts it on other documents."""
    if not rows:
        return _none("Not scored: it fires too rarely, or `moescope sae read` was told not to.")
    body = [
        [
            f"by {RULE_NAMES[row['metric']]}",
            _with_bounds(row["value"], row["ci_low"], row["ci_high"]),
            numbers.decimal(row["null_value"]),
            numbers.count(row["n"]),
        ]
        for row in rows
    ]
    note = "Correlation of its activation with the mean activation by token or label, learned on other documents."
    return html.Div([_note(note), _table(("predicted", "correlation", "if shuffled", "n"), body)])


def logits(whole: Mapping[str, Any], run: Run) -> Any:
    """The tokens whose logits its decoder row raises and lowers most."""
    if whole["raised_ids"] is None:
        return _none("Not recorded: it was read without the live model, or away from the residual stream's width.")
    reader = PieceReader(pieces(run))
    rows = zip(whole["raised_ids"], whole["raised"], whole["lowered_ids"], whole["lowered"], strict=False)
    body = [
        [
            html.Span(reader.alone(int(up)), className="piece foreign"),
            _signed(more),
            html.Span(reader.alone(int(down)), className="piece foreign"),
            _signed(less),
        ]
        for up, more, down, less in list(rows)[:8]
    ]
    note = "On the direct path, for each unit of activation."
    return html.Div([_note(note), _table(("raises", "logits", "lowers", "logits "), body)])


def links(rows: list[dict[str, Any]], here: ViewState) -> Any:
    """Other latents that it stands near, fires with, or is a family with."""
    if not rows:
        return _none("None on record.")
    shown: list[Any] = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = [row for row in rows if row["kind"] == kind][:6]
        title, measure = _KINDS.get(kind, (kind, "value"))
        body = [[_other(row, here), row["role"] or "", _with_bounds(row["value"], row["ci_low"], row["ci_high"]),
                 numbers.decimal(row["null_value"])] for row in mine]  # fmt: skip
        shown.append(dmc.Box([html.H3(title, className="sub-title"), _table(("latent", "", measure, "null"), body)]))
    return dmc.Stack(shown, gap="sm")


def _other(row: Mapping[str, Any], here: ViewState) -> Any:
    name = f"F{row['other']}"
    if row["same"]:
        return dmc.Anchor(name, href=link("/features", here.but(feature=row["other"])), size="sm")
    if row["sae"] is None:
        return name
    href = link("/features", here.but(sae=row["sae"], feature=row["other"]))
    return dmc.Anchor([f"{name} of ", html.Span(row["sae"], className="foreign")], href=href, size="sm")


def experts(rows: list[dict[str, Any]], run: Run) -> Any:
    """Experts by how much of the latent they write, beside what they write of others as frequent."""
    if not rows:
        return _none(
            "Not measured for this latent: `moescope sae experts` joins latents that fire often enough to experts."
        )
    writing = [row for row in rows if row.get("writes_excess") is not None][:_EXPERTS_SHOWN]
    gated = sorted((r for r in rows if r.get("gates_logit") is not None), key=lambda r: -r["gates_logit"])[
        :_EXPERTS_SHOWN
    ]
    parts: list[Any] = []
    if writing:
        body = [[_expert(r, run), *_measured(r, "writes_excess", 2), _p(r.get("writes_excess_p")), _share(r.get("writes_share"))]
                for r in writing]  # fmt: skip
        parts.append(_table(("writes", "length along the decoder", "null", "p", "share"), body))
    if gated:
        body = [[_expert(r, run), *_measured(r, "gates_logit", 2), _p(r.get("gates_logit_p")), numbers.ratio(r.get("gates_lift"))]
                for r in gated]  # fmt: skip
        parts.append(_table(("gates", "router logit", "null", "p", "lift"), body))
    note = "In excess of tokens on which it is inactive; null: the same of latents of the nearest frequency."
    return html.Div([_note(note), dmc.Stack(parts, gap="sm")])


def ablated(rows: list[dict[str, Any]]) -> Any:
    """What is lost of it when its first writers are taken out, and when matched experts are."""
    cut = next((row for row in rows if row["metric"] == "ablation_drop"), None)
    controls = [row["value"] for row in rows if row["metric"] == "ablation_drop_control"]
    if cut is None:
        return _note("Its writers were not taken out.")
    words = f"With its first writers taken out, its activation falls by {_percent(cut['value'])}"
    if cut["ci_low"] is not None and cut["ci_high"] is not None:
        words += f" [{_percent(cut['ci_low'])}, {_percent(cut['ci_high'])}]"
    words += (
        f"; with matched experts taken out, by {_percent(sum(controls) / len(controls))} ({_percent(min(controls))} to "
        f"{_percent(max(controls))}, {len(controls)} draws)"
        if controls
        else "; no matched experts were taken out beside it"
    )
    return dmc.Text(f"{words}. n = {numbers.count(cut['n'])} tokens.", size="sm", mt="xs")


def _expert(row: Mapping[str, Any], run: Run) -> Any:
    block = str(row["block"])
    name = f"{layer_name(row['layer'], block)}·{expert_name(row['expert'])}"
    mark = " ✂" if row.get("ablated_writer") is not None else ""
    layer = Layer(row["layer"], None if block == "mlp" else block)
    title = {"title": "taken out in the ablation"} if mark else {}
    return dmc.Anchor(
        name + mark, href=expert_href(run.name, layer, row["expert"]), size="sm", attributes={"root": title}
    )


def _measured(row: Mapping[str, Any], name: str, places: int) -> list[str]:
    value = _with_bounds(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"), places)
    return [value, numbers.decimal(row.get(f"{name}_null"), places)]


def _p(value: float | None) -> str:
    return numbers.decimal(value)


def _share(value: float | None) -> str:
    return numbers.MISSING if value is None else _percent(value)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %".replace("-", "−")


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + numbers.decimal(value)


def _with_bounds(value: float | None, low: float | None, high: float | None, places: int = 3) -> str:
    bounds = (
        "" if low is None or high is None else f" [{numbers.decimal(low, places)}, {numbers.decimal(high, places)}]"
    )
    return f"{numbers.decimal(value, places)}{bounds}"


def _none(text: str) -> Any:
    return dmc.Text(text, className="muted")


def _note(text: str) -> Any:
    return dmc.Text(text, className="muted fine")


def _table(names: Sequence[str], body: list[list[Any]]) -> Any:
    """A small table whose first column is text; later ones are numbers, but for words."""
    words = {0} | {n for n, name in enumerate(names) if name in ("", "lowers")}
    head = dmc.TableTr([dmc.TableTh(name, className="" if n in words else "number") for n, name in enumerate(names)])
    rows = [
        dmc.TableTr([dmc.TableTd(cell, className="foreign" if n in words else "number") for n, cell in enumerate(row)])
        for row in body
    ]
    return dmc.TableScrollContainer(
        dmc.Table(
            [dmc.TableThead(head), dmc.TableTbody(rows)],
            className="small-table",
            verticalSpacing=3,
            horizontalSpacing=6,
        ),
        minWidth=320,
    )
