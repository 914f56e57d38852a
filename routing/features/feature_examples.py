"""Examples of latents as rows and as a figure: a line an example, a cell a token, its colour the activation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from moescope.core.figures import TINT, plain
from moescope.routing.features.feature_tables import Window

_BEFORE, _AFTER, _LETTERS = 11, 4, 9


def example_row(window: Window, reach: int | None = None) -> dict[str, Any]:
    """Columns of an example: text, and as JSON its tokens and the activation on each.

    Args:
        window: the example.
        reach: tokens of `text` on either side of the peak; all of the window where None.
    """
    rounded = [None if a is None else float(f"{a:.5g}") for a in window.activations]
    return {
        "text": window.marked(reach), "peak": window.peak, "tokens": json.dumps(window.pieces, ensure_ascii=False),
        "activations": json.dumps(rounded),
    }  # fmt: skip


def draw_examples(
    figure: go.Figure, examples: pd.DataFrame, names: Sequence[str], *, panel: bool = True, one_scale: bool = False
) -> None:
    """Draw examples into a figure, the peaks in one column.

    Args:
        figure: with panels, or without.
        examples: columns peak, tokens, activations of `example_row`.
        names: of the lines; text from outside may stand in them.
        panel: draw into the first panel.
        one_scale: colours of all lines from 0 to the largest activation of all; else each line to its own.
    """
    width = _BEFORE + 1 + _AFTER
    cells = np.full((len(examples), width), np.nan)
    texts, hover = (np.full((len(examples), width), "", dtype=object) for _ in range(2))
    highest = float(examples["value"].max()) if one_scale and len(examples) else 0.0
    for row, example in enumerate(examples.itertuples()):
        tokens, values = json.loads(str(example.tokens)), json.loads(str(example.activations))
        most = highest or max([v for v in values if v is not None], default=0) or 1.0
        for column in range(width):
            at = int(example.peak) + column - _BEFORE
            if 0 <= at < len(tokens):
                value = values[at]
                cells[row, column] = np.nan if value is None else value / most
                short = tokens[at] if len(tokens[at]) <= _LETTERS else tokens[at][: _LETTERS - 1] + "…"
                texts[row, column] = plain(short) or "·"  # a part of a character
                hover[row, column] = f"{plain(tokens[at])}: " + ("not encoded" if value is None else f"{value:.4g}")
    place: dict[str, Any] = {"row": 1, "col": 1} if panel else {}
    figure.add_trace(
        go.Heatmap(
            z=cells, x=list(range(-_BEFORE, _AFTER + 1)), y=list(range(len(examples))), text=texts, texttemplate="%{text}",
            textfont={"size": 11}, customdata=hover, hovertemplate="%{customdata}<extra></extra>", zmin=0,
            zmax=1, showscale=False, xgap=1, ygap=2, colorscale=[list(at) for at in TINT],
        ),
        **place,
    )  # fmt: skip
    figure.update_yaxes(
        tickvals=list(range(len(examples))), ticktext=[plain(name) for name in names], autorange="reversed", showgrid=False, zeroline=False,
        **place
    )  # fmt: skip
    figure.update_xaxes(title="tokens from the peak", showgrid=False, zeroline=False, **place)
