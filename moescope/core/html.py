"""Self-contained HTML: the page frame and one section a result. Everything from outside is escaped here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moescope.core.text import escaped

if TYPE_CHECKING:
    from moescope.core.result import Result

_STYLE = """
:root { color-scheme: light; }
body { font: 14px/20px system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif; color: #1a1b1e;
  background: #fff; margin: 0 auto; max-width: 1180px; padding: 24px; font-variant-numeric: tabular-nums; }
h1 { font-size: 24px; line-height: 32px; font-weight: 600; margin-top: 40px; }
h2 { font-size: 18px; line-height: 26px; font-weight: 600; margin-top: 24px; }
section { border-top: 1px solid #dee2e6; padding-top: 8px; margin-top: 24px; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 3px 12px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #f1f3f5; }
td.number, th.number { text-align: right; white-space: nowrap; }
.scroll { max-height: 420px; overflow: auto; }
.muted { color: #5c636a; }
code, pre { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 12.5px; }
pre { background: #f8f9fa; padding: 12px; overflow: auto; white-space: pre-wrap; }
.bad { background: #fff3cd; border: 1px solid #b8860b; padding: 8px 12px; }
details { margin: 8px 0; }
summary { cursor: pointer; }
.cell { unicode-bidi: isolate; overflow-wrap: break-word; }
@media print { .scroll { max-height: none; } details { display: none; } }
"""


def page(title: str, sections: list[str]) -> str:
    """A whole HTML document that opens offline; the figure library is inlined once."""
    from plotly.offline import get_plotlyjs

    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escaped(title)}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style><script>{get_plotlyjs()}</script>"
        f"</head><body>{''.join(sections)}</body></html>"
    )


def result_section(result: Result, *, rows: int = 400) -> str:
    """One result: finding, figure, table (its first `rows` rows), definition, units, n, query."""
    parts = [
        f"<section id='{escaped(result.name)}'><h2>{escaped(result.title)}</h2>",
        f"<p class='muted'>{escaped(result.subtitle())}</p>",
    ]
    if result.has_figure:
        parts.append(
            result.figure(titled=False).to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})
        )
    facts = "".join(f"<tr><th>{escaped(k)}</th><td>{escaped(v)}</td></tr>" for k, v in result.facts().items())
    parts.append(f"<table>{facts}</table>")
    shown = min(rows, result.table.num_rows)
    label = f"Table, {shown:,} of {result.table.num_rows:,} rows"
    opened = "" if result.has_figure else " open"
    parts.append(
        f"<details{opened}><summary>{label}</summary><div class='scroll'>{table(result, rows)}</div></details>"
    )
    if result.sql:
        parts.append(f"<details><summary>Query</summary><pre>{escaped(result.sql.strip())}</pre></details>")
    return "".join(parts) + "</section>"


def table(result: Result, rows: int) -> str:
    """The first rows of a result's table as HTML, numbers right-aligned, every cell escaped."""
    import pyarrow as pa

    head = result.table.slice(0, rows)
    numeric = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in head.schema]
    kinds = [" class='number'" if is_number else " class='cell'" for is_number in numeric]
    names = "".join(f"<th{k}>{escaped(f.name)}</th>" for k, f in zip(kinds, head.schema, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f"<td{k}>{escaped(cell(value))}</td>" for k, value in zip(kinds, row.values(), strict=True))
        + "</tr>"
        for row in head.to_pylist()
    )
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def cell(value: object) -> str:
    """One value for reading: four significant digits, thousands grouped, an em dash where nothing was recorded."""
    if value is None or value != value:  # noqa: PLR0124  a NaN differs from itself
        return "—"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace("-", "−")
    return f"{value:,.4g}".replace("-", "−") if abs(value) < 1e4 else f"{value:,.0f}".replace("-", "−")
