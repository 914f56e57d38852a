"""Value cards: an estimate, what stands behind it, and a link to its tokens."""

from __future__ import annotations

from typing import Any

import dash_mantine_components as dmc


def value_card(label: str, value: str, detail: str, *, href: str | None = None, title: str | None = None) -> Any:
    """One number with its name above and its basis below.

    Args:
        label: what it is.
        value: the number, written out; `—` where nothing was recorded.
        detail: n, unit or spread.
        href: where its tokens are.
        title: the number in full, shown on hover.
    """
    shown = dmc.Text(value, className="card-value")
    return dmc.Paper(
        dmc.Stack(
            [
                dmc.Text(label, className="card-label"),
                dmc.Anchor(shown, href=href, className="card-link", underline="hover") if href else shown,
                dmc.Text(detail, className="card-detail"),
            ],
            gap=2,
        ),
        className="card",
        withBorder=True,
        attributes={"root": {"title": title}} if title else None,
    )


def facts(rows: list[tuple[str, Any]]) -> Any:
    """Names and values in two columns; the values are foreign text."""
    return dmc.Table(
        dmc.TableTbody(
            [
                dmc.TableTr([dmc.TableTh(name, className="fact-name"), dmc.TableTd(value, className="foreign")])
                for name, value in rows
            ]
        ),
        className="facts",
        withRowBorders=True,
        verticalSpacing=5,
    )


def section(title: str, children: Any, *, note: str | None = None, identity: str | None = None) -> Any:
    """A titled part of a page."""
    heading = [dmc.Title(title, order=2, className="section-title")]
    heading += [dmc.Text(note, className="muted")] if note else []
    options = {"id": identity} if identity else {}
    return dmc.Box([dmc.Stack(heading, gap=2, mb="xs"), children], className="section", **options)
