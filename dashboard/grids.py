"""Tables of any length: one look and one set of column kinds for every AG Grid."""

from __future__ import annotations

from typing import Any

import dash_ag_grid as dag

ROW_HEIGHT = 30
_HEADER = 34
_BAR = 18  # of a grid that is wider than its place: the last row stays above it
_THEME = (
    "themeQuartz.withParams({fontFamily: 'inherit', fontSize: 13, headerFontSize: 12, spacing: 6, cellHorizontalPadding: 9, "
    "wrapperBorderRadius: 8, backgroundColor: 'var(--surface)', foregroundColor: 'var(--ink)', "
    "browserColorScheme: 'inherit', borderColor: 'var(--line)', headerTextColor: 'var(--ink-soft)', "
    "headerBackgroundColor: 'var(--surface-soft)', rowHoverColor: 'var(--hover)', accentColor: 'var(--accent)'})"
)
_OPTIONS: dict[str, Any] = {
    "theme": {"function": _THEME},
    "rowHeight": ROW_HEIGHT,
    "headerHeight": _HEADER,
    "animateRows": False,
    "suppressCellFocus": False,
    "enableCellTextSelection": True,
    "ensureDomOrder": True,
    "suppressFieldDotNotation": True,
}


def grid(
    identity: str,
    columns: list[dict[str, Any]],
    rows: list[dict[str, Any]],
    *,
    height: int,
    row_id: str | None = None,
    fit: str | None = "responsiveSizeToFit",
    **options: Any,
) -> Any:
    """A grid with sorting and filters, its rows virtual; as high as its rows, at most `height`."""
    return dag.AgGrid(
        id=identity,
        columnDefs=columns,
        rowData=rows,
        getRowId=row_id,
        defaultColDef={
            "sortable": True,
            "resizable": True,
            "filter": True,
            "suppressHeaderMenuButton": True,
            "minWidth": 58,
        },
        columnSize=fit,
        dashGridOptions={**_OPTIONS, **options},
        style={"height": min(height, _HEADER + ROW_HEIGHT * max(len(rows), 1) + _BAR), "width": "100%"},
    )


def text_column(field: str, name: str, **options: Any) -> dict[str, Any]:
    """Text from outside; drawn as text, apart from its surroundings' writing direction."""
    return {"field": field, "headerName": name, "cellClass": "foreign", "tooltipField": field, **options}


def number_column(field: str, name: str, form: str, **options: Any) -> dict[str, Any]:
    """A number, right-aligned.

    Args:
        field: key of the row; the value stays a number, so that it sorts as one.
        name: heading, with the unit.
        form: d3 format, such as `,.3f`; a missing value is written as a dash.
    """
    formatter = f"params.value == null ? '—' : d3.format('{form}')(params.value)"
    return {
        "field": field,
        "headerName": name,
        "type": "rightAligned",
        "filter": False,
        "valueFormatter": {"function": formatter},
        **options,
    }


def link_column(field: str, name: str, **options: Any) -> dict[str, Any]:
    """Text or a number that leads somewhere: the row's `{field}_href`; plain text where that is null."""
    return {"field": field, "headerName": name, "cellRenderer": "MoescopeLink", "filter": False, **options}
