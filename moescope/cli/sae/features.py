"""`moescope sae features`: the latents of an autoencoder, or the card of one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import autoencoder_names
from moescope.cli.export import only_run
from moescope.cli.flags import InStore, Json, OneRun, Output
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.store_check import check_store

if TYPE_CHECKING:
    import pandas as pd

    from moescope.core.result import Result

_Sae = Annotated[
    str | None,
    typer.Option(
        "--sae",
        help="The autoencoder, by name or id.",
        show_default="the newest of the run",
        autocompletion=autoencoder_names,
    ),
]
_Feature = Annotated[
    int | None, typer.Option(min=0, help="Number of one latent, from 0, whose card is shown.", show_default="none")
]
_Label = Annotated[str | None, typer.Option(help="Latents by their lift of this label.", show_default="none")]
_Top = Annotated[int, typer.Option(min=1, help="Latents, or examples of the card.")]
_Sort = Annotated[str, typer.Option(help="What latents are sorted by: score, density, maximum, lift or number.")]


def features(
    store: InStore = Path("runs.duckdb"),
    sae: _Sae = None,
    run: OneRun = None,
    feature: _Feature = None,
    label: _Label = None,
    top: _Top = 20,
    sort: _Sort = "score",
    output: Output = None,
    json: Json = False,
) -> None:
    """Show the latents of an autoencoder whose features were read, the best explained first, or one of them.

    Example: moescope sae features --store runs.duckdb --sae topk-4096-k32 --feature 17
    """
    from moescope.analysis_api import analyze
    from moescope.store.store import Store

    check_store(store)
    with Store(store, read_only=True) as opened:
        found = only_run(opened, run)
        if feature is not None:
            result = analyze(found, "feature", sae=sae, feature=feature)
        else:
            asked = "lift" if label is not None and sort == "score" else sort
            result = analyze(found, "features", sae=sae, label=label, sort=asked, top=top)
        if output is not None:
            result.save(output)
            news(f"saved {output}")
    if json:
        as_json(result.as_json())
    elif feature is not None:
        _card(result, top)
    else:
        _list(result)


def _list(result: Result) -> None:
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    rows = [
        [
            int(r.feature), f"{r.value:.3%}", _number(r.maximum), _text(r.label), _number(r.lift),
            _text(r.rule).removeprefix("predicted_by_"), _number(r.score), _number(r.score_null),
        ]
        for r in result.df().itertuples()
    ]  # fmt: skip
    table(["latent", "of tokens", "maximum", "label", "lift", "rule", "score", "by chance"], rows)
    said("")
    facts(result.facts())


def _card(result: Result, top: int) -> None:
    """Examples, words, labels and other latents, a table each."""
    frame = result.df()
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    examples = _part(frame, "example").head(top)
    rows = [[int(r.stratum), _number(r.value), _text(r.label), r.text] for r in examples.itertuples()]
    table(["quantile", "activation", "label", "text"], rows)
    for part, columns in (
        ("raised", ["raises", "logits"]),
        ("lowered", ["lowers", "logits"]),
    ):
        if len(words := _part(frame, part)):
            said("")
            table(columns, [[r.text, _number(r.value)] for r in words.itertuples()])
    if len(labels := _part(frame, "label")):
        said("")
        cells = [
            [_text(r.label), _number(r.value), _number(r.ci_low), _number(r.ci_high), _number(r.q)]
            for r in labels.itertuples()
        ]
        table(["label", "lift", "low", "high", "q"], cells)
    links = frame[frame["part"].isin(["cosine", "coactivation", "family", "split"])]
    if len(links):
        said("")
        linked: list[list[Any]] = [
            [
                r.part if r.role is None else f"{r.part}: {r.role}",
                int(r.other),
                _text(r.other_sae),
                _number(r.value),
                _number(r.null),
            ]
            for r in links.itertuples()
        ]
        table(["link", "latent", "of", "value", "by chance"], linked)
    said("")
    facts(result.facts())


def _part(frame: pd.DataFrame, part: str) -> pd.DataFrame:
    return frame[frame["part"] == part]


def _number(value: Any) -> str:
    return f"{value:,.4g}" if value is not None and math.isfinite(value) else "—"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "—"
