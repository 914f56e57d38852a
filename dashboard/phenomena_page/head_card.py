"""The card of an attention head: its scores and ranks, its sink profile, its roles, and what masking it did."""

from __future__ import annotations

import re
from typing import Any

import dash_mantine_components as dmc
from dash import html

from moescope.dashboard import cards, numbers
from moescope.dashboard.phenomena_page.head_masking import Masking, masking
from moescope.dashboard.phenomena_page.head_roles import Called, roles
from moescope.dashboard.phenomena_page.head_scores import Head, scores_of
from moescope.dashboard.url_state import ViewState, link
from moescope.routing.phenomena.head_metrics import head_metric
from moescope.store.run import Run

_PROFILE = re.compile(r"sink_alpha_(\d+)", re.ASCII)
_DETAIL = re.compile(r"(sink_)?alpha_\d+|even .*|other offset.*", re.ASCII)


def mask_edit(head: Head) -> str:
    """The edit that takes a head out, in one line.

    Example:
        >>> mask_edit(Head(5, "attn", 2))
        'mask_head layer=5 heads=2'
    """
    return f"mask_head layer={head.layer} heads={head.head}" + ("" if head.block == "attn" else f" block={head.block}")


def head_card(run: Run, head: Head, state: ViewState, group: list[int] | None) -> Any:
    """Everything recorded of one head.

    Args:
        run, head: which.
        state: of the view, whose edits the lab link extends.
        group: query heads that read the same key-value head, itself included; None where that is not known.
    """
    scores = scores_of(run, head)
    return dmc.Stack(
        [
            _about(head, group),
            _lab(head, state),
            _scores(scores),
            _profile(scores),
            _roles(roles(run, head)),
            _masked(masking(run, head), head),
        ],
        gap="lg",
    )


def _about(head: Head, group: list[int] | None) -> Any:
    if group is None:
        return dmc.Text("Which key-value head it reads is not recorded.", className="muted")
    others = [f"H{number}" for number in group if number != head.head]
    return dmc.Text(
        f"It shares its key-value head with {', '.join(others)}." if others else "It has a key-value head of its own.",
        size="sm",
    )


def _lab(head: Head, state: ViewState) -> Any:
    edits = tuple(dict.fromkeys((*state.edits, mask_edit(head))))
    return dmc.Group(
        [
            dmc.Anchor(
                "Mask in the Lab →",
                href=link("/lab", state.selection().but(edits=edits)),
                id="mask-in-lab",
                size="sm",
            ),
            dmc.Code(mask_edit(head), className="command"),
        ],
        gap="sm",
    )


def _scores(scores: list[dict[str, Any]]) -> Any:
    shown = [row for row in scores if not _DETAIL.fullmatch(row["metric"]) or row["metric"] == "sink_alpha_0"]
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(
                    [
                        html.Span(head_metric(row["metric"]).words, className="foreign"),
                        html.Span(
                            "" if row["condition"] == "base" else f" · {row['condition']}", className="soft foreign"
                        ),
                    ]
                ),
                dmc.TableTd(numbers.decimal(row["value"]), className="number", attributes=_title(row)),
                dmc.TableTd("all alike" if row["alike"] else f"{row['rank']} of {row['heads']:,}", className="number"),
                dmc.TableTd(numbers.decimal(row["middle"]), className="number soft"),
            ]
        )
        for row in shown
    ]
    return cards.section(
        "Scores",
        _table(["score", "value", "rank", "median head"], body),
        note="The largest has rank 1. Hover a value for its unit and how many observations stand behind it.",
    )


def _title(row: dict[str, Any]) -> dict[str, str]:
    return {"title": f"{row['value']:.6g} {head_metric(row['metric']).unit}, n = {row['n']:,}"}


def _profile(scores: list[dict[str, Any]]) -> Any:
    found = sorted(
        (int(match[1]), row["value"])
        for row in scores
        if row["condition"] == "base" and (match := _PROFILE.fullmatch(row["metric"]))
    )
    if not found:
        return cards.section("Sink profile", dmc.Text("Not recorded.", className="muted"))
    most = max(value for _, value in found) or 1.0
    body = [
        dmc.TableTr(
            [
                dmc.TableTd(f"α{_index(position)}"),
                dmc.TableTd(
                    html.Div(
                        html.Div(className="bar-fill", style={"width": f"{100 * value / most:.1f}%"}), className="bar"
                    )
                ),
                dmc.TableTd(numbers.decimal(value), className="number"),
                dmc.TableTd(numbers.decimal(head_metric(f"sink_alpha_{position}").even), className="number soft"),
            ]
        )
        for position, value in found
    ]
    return cards.section(
        "Sink profile",
        _table(["token", "", "attention", "if even"], body),
        note="Mean attention that the first tokens of a text get from those behind them, over its first 64 tokens.",
    )


def _index(position: int) -> str:
    return "".join(chr(0x2080 + int(digit)) for digit in str(position))


def _roles(called: list[Called]) -> Any:
    body = [
        dmc.TableTr(
            [
                dmc.TableTd([c.rule.role, html.Div(c.rule.source, className="soft fine")]),
                dmc.TableTd(_value(c), className="number"),
                dmc.TableTd(c.rule.words, className="number"),
                dmc.TableTd("—" if c.value is None else "yes" if c.called else "no"),
                dmc.TableTd(f"{c.count} of {c.heads}" if c.heads else "—", className="number soft"),
            ]
        )
        for c in called
    ]
    overlaps = [
        f"Of {c.count} heads that are called {c.rule.role}, {both} are {role} as well ({by_chance:.1f} by chance)."
        for c in called
        if c.called
        for role, (both, by_chance) in c.both.items()
    ]
    shown: list[Any] = [_table(["role", "value", "asked", "so", "heads"], body)]
    shown += [dmc.Text(text, size="sm") for text in overlaps]
    return cards.section(
        "Roles", dmc.Stack(shown, gap="xs"), note="By which rule it is called what; — where it was not measured."
    )


def _value(called: Called) -> str:
    return numbers.decimal(called.value)


def _masked(found: list[Masking], head: Head) -> Any:
    if not found:
        return cards.section(
            "What masking it did",
            dmc.Text("Not measured: no intervention on record masks this head.", className="muted"),
        )
    blocks = []
    for effect in dict.fromkeys(m.effect for m in found):
        mine = [m for m in found if m.effect == effect]
        first = mine[0]
        body = [
            dmc.TableTr(
                [
                    dmc.TableTd(m.metric.replace("delta_", "Δ ").replace("_", " ")),
                    dmc.TableTd(_with_bounds(m), className="number"),
                    dmc.TableTd(_null(m), className="number soft"),
                ]
            )
            for m in mine
        ]
        title = [
            _together(first, head),
            html.Span(f" · {first.name or 'intervention'} · run {first.base}", className="soft foreign"),
        ]
        blocks.append(
            dmc.Box(
                [
                    dmc.Text(title, size="sm"),
                    _table(["metric", f"effect, n = {numbers.count(first.n)}", "at random"], body),
                ]
            )
        )
    return cards.section(
        "What masking it did",
        dmc.Stack(blocks, gap="sm"),
        note="At random: mean of the controls (smallest to largest).",
    )


def _together(m: Masking, head: Head) -> str:
    """What was changed at once."""
    if m.heads == 1 and not m.others:
        return f"{head.name} alone"
    masked = head.name if m.heads == 1 else f"{m.heads} heads together, {head.name} among them"
    return masked + (f" and {m.others} other edit{'s' * (m.others > 1)}" if m.others else "")


def _with_bounds(m: Masking) -> str:
    bounds = "" if m.low is None or m.high is None else f" [{numbers.decimal(m.low, 4)}, {numbers.decimal(m.high, 4)}]"
    return f"{numbers.decimal(m.value, 4)}{bounds}"


def _null(m: Masking) -> str:
    if not m.controls:
        return "no controls"
    return f"{numbers.decimal(m.null, 4)} ({numbers.decimal(m.null_low, 4)} to {numbers.decimal(m.null_high, 4)}), {m.controls} draws"


def _table(names: list[str], body: list[Any]) -> Any:
    words = ("score", "token", "", "role", "so", "metric")
    head = dmc.TableTr([dmc.TableTh(name, className="" if name in words else "number") for name in names])
    return dmc.Table(
        [dmc.TableThead(head), dmc.TableTbody(body)], className="small-table", verticalSpacing=3, horizontalSpacing=6
    )
