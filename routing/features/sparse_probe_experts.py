"""Concept → expert, neuron, latent: the single unit that tells each concept best."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.core.sites import Site
from moescope.routing.features.probe_tables import PROBES_SQL, common_concepts, read_probes, tested_notes
from moescope.store.run import Run

_ROUTERS_SQL = """
    SELECT layer, block, n_experts + coalesce(n_null, 0)
    FROM layers
    WHERE run_id = $run AND kind = 'moe'
    ORDER BY layer, block
"""
_WIDTHS_SQL = """
    SELECT site, any_value(width)
    FROM activations
    WHERE run_id = $run
    GROUP BY site
"""
_COLUMNS = [
    "concept", "reads", "unit_kind", "site", "sae", "ranking", "layer", "block", "expert", "feature", "neuron", "unit", "name",
    "sign", "metric", "value", "ci_low", "ci_high", "null", "random", "n",
]  # fmt: skip


@analysis(
    name="concept_experts",
    needs=("sparse_probes",),
    source="Gurnee et al. 2023, arXiv 2305.01610, with k = 1, on ids of experts too",
    section="features",
    order=41,
)
def concept_experts(
    run: Run, *, ranking: str = "mean_difference", sae: str | None = None, concepts: Count = 25
) -> Result:
    """Which single expert, neuron or latent tells each concept best, and how well?

    The probe with k = 1: the unit with the highest rank on training documents, and the F1 that a threshold on it has on the
    test documents. Where experts come near neurons and latents, a concept has an expert of its own. Units of several sites
    are shown side by side, none is picked by its test score.

    Args:
        ranking: by which the unit was chosen.
        sae: autoencoder of the latents, its name or id; the newest probed by default.
        concepts: drawn in the figure, those with the best units; the table has all.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.concepts.sparse_probes import sparse_probes as probe
        >>> texts = [{"text": t, "label": l} for t, l in [("one two three", "en"), ("1 2 3 4 5", "digits")] * 6]
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     run = ms.record(ms.load("demo"), texts, store, name="first", progress=False)
        ...     found = probe(run, store, units="expert", k=1, least=2, draws=50, progress=False)
        ...     sorted(ms.analyze(run, "concept_experts").df()["concept"])
        ['digits', 'en']
    """
    probes = read_probes(run, metric="F1", concept=None, ranking=ranking, sae=sae)
    rows = probes.frame[(probes.frame["k"] == 1) & (probes.frame["metric"] == "F1")].reset_index(drop=True)
    if not len(rows):
        raise InputError(f"run {run.name!r} has no probes of one unit", fix="moescope sae probe with --k 1")
    frame = pd.concat([rows, pd.DataFrame(_places(run, rows))], axis=1)
    frame["sign"] = np.where(frame["coefficient"] >= 0, "more", "less")
    order = frame.groupby("concept")["value"].max().sort_values(ascending=False).index
    frame = frame.assign(concept=pd.Categorical(frame["concept"], order, ordered=True))
    frame = frame.sort_values(["concept", "value"], ascending=[True, False], kind="stable").astype({"concept": str})
    common, told = common_concepts(frame)
    return Result(
        title=_title(frame, frame["concept"].isin(common)),
        table=pa.Table.from_pandas(frame[_COLUMNS], preserve_index=False),
        draw=_Draw(concepts),
        n=int(frame["n"].max()),
        n_unit="tokens or documents of the test part",
        definition="F1, both classes at equal weight, of a logistic regression on the one unit of highest rank on training documents; "
        "calling everything has 0.667. sign: whether the unit is more or less active with the concept. Experts of all layers "
        "are ranked together unless one was probed.",
        units={"value[F1]": "0 to 1"},
        interval="95 % percentile bootstrap over test documents",
        null="the same, ranking and fit included, with labels permuted (of tokens: rotated along them); `random`: one random unit of the "
        "kind; means of the draws",
        sql=PROBES_SQL,
        sql_parameters=probes.parameters,
        computation="layer, expert and neuron from the number of the unit",
        notes=(*told, *tested_notes(frame)),
    )  # fmt: skip


def _places(run: Run, rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Layer, block, expert, latent or neuron of each unit, and its name."""
    routers = [(int(layer), block, int(n)) for layer, block, n in run.sql(_ROUTERS_SQL).fetchall()]
    widths = dict(run.sql(_WIDTHS_SQL).fetchall())
    found = []
    for row in rows.to_dict("records"):
        unit, kind = int(row["unit"]), row["unit_kind"]
        site = Site.parse(row["site"]) if row["site"].startswith("blocks.") else None
        place: dict[str, Any] = {
            "layer": site.layer if site else None, "block": site.block or None if site else None, "expert": None,
            "feature": None, "neuron": None,
        }  # fmt: skip
        if kind in ("expert", "router_logit"):
            layer, block, expert = _router_of(unit, [r for r in routers if site is None or r[0] == site.layer])
            place |= {"layer": layer, "block": block, "expert": expert}
            name = f"L{layer}·E{expert}" if layer is not None else f"unit {unit}"
        elif kind == "latent":
            place["feature"], name = unit, f"latent {unit}"
        elif site is not None and site.tensor.startswith("experts.") and widths.get(row["site"]):
            expert, neuron = divmod(unit, int(widths[row["site"]]))
            place |= {"expert": expert, "neuron": neuron}
            name = f"L{site.layer}·E{expert}·n{neuron}"
        else:
            place["neuron"], name = unit, f"L{site.layer}·{unit}" if site else f"{unit}"
        found.append(place | {"name": name})
    return found


def _router_of(unit: int, routers: list[tuple[int, str, int]]) -> tuple[int | None, str | None, int | None]:
    for layer, block, experts in routers:
        if unit < experts:
            return layer, block, unit
        unit -= experts
    return None, None, None


def _title(frame: pd.DataFrame, common: pd.Series) -> str:
    means = frame[common].groupby("reads", sort=False)["value"].mean().sort_values(ascending=False)
    best = frame.iloc[frame["value"].argmax()]
    parts = [f"{name} {value:.2f}" for name, value in means.items()]
    null = frame.loc[common, "null"].mean()
    beside = f", permuted labels {null:.2f}" if np.isfinite(null) else ""
    return (
        f"The best single unit tells a concept with a mean F1 of {', '.join(parts[:4])}{', …' if len(parts) > 4 else ''}{beside}; "
        f"most of all {best['name']} for {best['concept']!r}, {best['value']:.2f}"
    )


class _Draw:
    """Draws the concepts with the best units."""

    def __init__(self, concepts: int) -> None:
        self.concepts = concepts

    def __call__(self, result: Result) -> go.Figure:
        frame = result.df()
        chosen = list(dict.fromkeys(frame["concept"]))[: self.concepts]
        frame = frame[frame["concept"].isin(chosen)]
        figure = go.Figure()
        for number, (reads, part) in enumerate(frame.groupby("reads", sort=True)):
            name = plain(str(reads))
            figure.add_scatter(
                x=part["value"], y=[plain(c) for c in part["concept"]], mode="markers+text", name=name,
                text=[plain(str(unit)) for unit in part["name"]] if frame["reads"].nunique() == 1 else None,
                textposition="middle right", textfont={"size": 11},
                marker={"color": SERIES[number % len(SERIES)], "size": 9, "symbol": number % 8},
                error_x={
                    "type": "data", "symmetric": False, "array": (part["ci_high"] - part["value"]).fillna(0),
                    "arrayminus": (part["value"] - part["ci_low"]).fillna(0), "thickness": 1,
                },
                customdata=np.stack([part["name"], part["sign"], part["random"].astype(float).round(3)], axis=-1),
                hovertemplate=name + "<br>%{customdata[0]} (%{customdata[1]}): F1 %{x:.3f}; random unit %{customdata[2]}<extra></extra>",
            )  # fmt: skip
        null = frame.groupby("concept", sort=False)["null"].mean()
        figure.add_scatter(
            x=null, y=[plain(c) for c in null.index], mode="markers", name="labels permuted",
            marker={"color": CHANCE, "symbol": "line-ns-open", "size": 10},
            hovertemplate="labels permuted: F1 %{x:.3f}<extra></extra>",
        )  # fmt: skip
        figure.update_xaxes(title="F1 of the best single unit, on test documents", range=[0, 1.08])
        figure.update_yaxes(type="category", autorange="reversed")
        figure.update_layout(height=max(300, 190 + 24 * len(chosen)))
        return figure
