"""Families of latents: a dense one with the sparser ones that fire where it does."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES, plain
from moescope.core.result import Result
from moescope.routing.context import pieces
from moescope.routing.features.feature_tables import chosen_sae, reading_notes, windows
from moescope.store.run import Run

_SQL = """
    WITH sized AS (
        SELECT l.feature AS parent, count(*) AS members, avg(l.value - l.null_value) AS beyond
        FROM feature_links l
        WHERE l.run_id = $run AND l.sae_id = $sae AND l.kind = 'family'
        GROUP BY l.feature
    ),
    chosen AS (
        SELECT *, count(*) OVER () AS families
        FROM sized
        WHERE $feature IS NULL OR parent = $feature
            OR parent IN (
                SELECT feature
                FROM feature_links
                WHERE run_id = $run AND sae_id = $sae AND kind = 'family' AND other_feature = $feature
            )
        ORDER BY members DESC, beyond DESC, parent
        LIMIT $top
    )
    SELECT c.parent, l.other_feature AS feature, 'overlap' AS metric, l.value, l.ci_low, l.ci_high, l.null_value AS "null", l.n, c.members,
        p.active / p.tokens AS parent_density, m.active / m.tokens AS density, c.families
    FROM chosen c
    JOIN feature_links l ON l.run_id = $run AND l.sae_id = $sae AND l.kind = 'family' AND l.feature = c.parent
    JOIN features p ON p.run_id = $run AND p.sae_id = $sae AND p.feature = c.parent
    JOIN features m ON m.run_id = $run AND m.sae_id = $sae AND m.feature = l.other_feature
    ORDER BY c.members DESC, c.beyond DESC, c.parent, l.value DESC, l.other_feature
"""
_SIZES = """
    SELECT metric, condition, value, n
    FROM sae_measures
    WHERE run_id = $run AND sae_id = $sae AND metric IN ('families', 'family_members') AND group_kind = 'all'
"""
_SHOWN = 16


@analysis(
    name="feature_families",
    needs=("features", "feature_links"),
    source="Disentangling Dense Embeddings with Sparse Autoencoders, arXiv 2408.00657 (feature families)",
    section="features",
    order=40,
)
def feature_families(run: Run, *, sae: str | None = None, feature: Natural | None = None, top: Count = 50) -> Result:
    """Which latents are families: a dense parent that fires where sparser members do?

    `value` is N_pm ÷ N_m: of the tokens on which the member fires, the share on which the parent fires too (N_m is the smaller
    of the two). Pairs of 0.1 or more, neither latent on over a tenth of the tokens, make a graph; of its maximum spanning tree
    every edge points from the denser latent to the sparser one, and a latent to which none points is the parent of all that can
    be reached from it. Parents are taken out and the rest is gone through again, three times; so a member may be a parent too.

    Trap: N_ij ÷ N_i of the paper differs by direction, and a tree has none; here the larger of the two is taken. A dense parent
    has a large overlap with everyone: read it against the null, the overlap of two latents that are independent within every
    document at the rates they have there.

    Args:
        sae: name of the autoencoder; the newest of the run where not given.
        feature: only families that this latent is in; all by default.
        top: families, the largest first.

    Raises:
        InputError: no such autoencoder, or no family.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "feature_families", top=5).df()  # doctest: +SKIP
    """
    chosen = chosen_sae(run, sae, table="feature_links", having="kind = 'family'")
    given = {"sae": chosen.sae_id, "feature": feature, "top": top}
    frame = run.sql(_SQL, given).df()
    if frame.empty:
        raise InputError(
            f"{chosen.name} has no family of latents on run {run.name!r}"
            + (f" with latent {feature}" if feature is not None else ""),
            fix="read more documents: pairs need five tokens in common",
        )
    sizes = {
        (metric, condition): value for metric, condition, value, _ in run.sql(_SIZES, {"sae": chosen.sae_id}).fetchall()
    }
    families = int(frame["families"].iloc[0])
    vocabulary = pieces(run)
    ids = sorted({*frame["parent"].tolist(), *frame["feature"].tolist()})
    best = {
        f: found[0].marked(5) for f, found in windows(run, chosen, ids, vocabulary, strata=0, ranks=1).items() if found
    }
    frame["text"] = [best.get(int(f)) for f in frame["feature"]]
    frame["parent_text"] = [best.get(int(f)) for f in frame["parent"]]
    return Result(
        title=_title(frame, families, sizes),
        table=pa.Table.from_pandas(frame.drop(columns="families"), preserve_index=False),
        draw=_draw,
        n=families,
        n_unit="families",
        definition="N_pm ÷ N_m: of the tokens on which the member fires, the share on which the parent does. Families: what can be reached "
        "from a latent along the maximum spanning tree of pairs of 0.1 or more, from denser to sparser.",
        units={
            "value": "share of the member's tokens",
            "null": "share of the member's tokens",
            "density": "share of tokens",
            "parent_density": "share of tokens",
            "members": "latents",
            "n": "tokens on which both fire",
        },
        interval="95 % percentile bootstrap over documents, the families held fixed",
        null="the same for latents that are independent within every document, at the rates they have there",
        sql=_SQL,
        sql_parameters={"run": run.run_id, **given},
        notes=(*reading_notes(run, chosen), *_notes(sizes)),
    )


def _notes(sizes: dict[tuple[str, str], float]) -> tuple[str, ...]:
    if ("families", "shuffled") not in sizes:
        return ()
    return (
        f"In all {sizes['families', 'sae']:,.0f} families with {sizes['family_members', 'sae']:,.0f} members; with every latent's "
        f"activations moved along each document by a random number of tokens, {sizes['families', 'shuffled']:,.0f} with "
        f"{sizes['family_members', 'shuffled']:,.0f}.",
    )


def _title(frame: pd.DataFrame, families: int, sizes: dict[tuple[str, str], float]) -> str:
    first = frame.iloc[0]
    null = sizes.get(("families", "shuffled"))
    chance = "" if null is None else f" ({null:,.0f} with activations moved within documents)"
    return (
        f"{families:,} families{chance}; the largest, under latent {int(first['parent'])}, has {int(first['members']):,} members, on whose "
        f"tokens it fires in {frame[frame['parent'] == first['parent']]['value'].mean():.0%} of cases"
    )


def _draw(result: Result) -> go.Figure:
    """Overlap of every member with its parent, a line a family, beside what independent latents would have."""
    frame = result.df()
    parents = list(dict.fromkeys(frame["parent"]))[:_SHOWN]
    shown = frame[frame["parent"].isin(parents)]
    name = {p: f"{p} · {plain(_short(t))}" for p, t in zip(shown["parent"], shown["parent_text"], strict=True)}
    rows = [name[p] for p in shown["parent"]]
    figure = go.Figure()
    figure.add_scatter(
        x=shown["null"], y=rows, mode="markers", name="independent within documents", hoverinfo="skip",
        marker={"symbol": "line-ns", "size": 12, "line": {"width": 2, "color": CHANCE}},
    )  # fmt: skip
    figure.add_scatter(
        x=shown["value"], y=rows, mode="markers", name="member", marker={"color": SERIES[0], "size": 8, "opacity": 0.7},
        customdata=[[f, plain(str(t or ""))] for f, t in zip(shown["feature"], shown["text"], strict=True)],
        hovertemplate="latent %{customdata[0]}: %{x:.2f}<br>%{customdata[1]}<extra></extra>",
    )  # fmt: skip
    figure.update_xaxes(title="share of the member's tokens on which the parent fires", range=[0, 1.03])
    order = [name[p] for p in parents]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=order[::-1], title="parent · its largest activation"
    )
    figure.update_layout(height=220 + 26 * len(parents))
    return figure


def _short(text: str | None) -> str:
    """A peak with a little of what stands before it."""
    before, _, after = (text or "").partition("⟦")
    peak = after.partition("⟧")[0]
    return f"…{before[-14:]}⟦{peak[:14]}⟧"
