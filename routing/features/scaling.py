"""How what autoencoders leave falls with their size and with their active latents."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import SERIES, plain
from moescope.core.result import Result
from moescope.routing.features.quality_tables import FIX, JUDGED_SQL, judged_frame, one_site, spread_ticks, wide
from moescope.routing.features.scaling_law import (
    FORMULAS,
    LAWS,
    NEEDS,
    SAME,
    Law,
    fit_law,
    left_out_error,
    possible_laws,
)
from moescope.store.run import Run

_MOST_LINES = 7


@analysis(
    name="sae_scaling",
    needs=("sae_measures",),
    source="L(n, k) of Gao et al., Scaling and evaluating sparse autoencoders: arXiv 2406.04093",
    section="features",
    order=16,
)
def sae_scaling(
    run: Run, *, site: str | None = None, law: Literal["auto", "full", "n_and_k", "n", "k"] = "auto"
) -> Result:
    """How does the variance that autoencoders leave fall with their latents n and their active latents k?

    Over all autoencoders judged on the run at one site, ln L of

        L(n, k) = exp(α + β_k ln k + β_n ln n + γ ln k ln n) + exp(ζ + η ln k)

    is fitted to ln FVU by least squares; k is the measured mean L0. The second term is what no number of latents removes. With
    fewer autoencoders than its six parameters, or fewer than three sizes and three sparsities, the power law without that term and
    without γ is fitted instead, in n and k or in the one that differs, and the answer says so.

    Args:
        site: where; the site with most judged autoencoders where not given.
        law: `full`, `n_and_k` (a power law in both), `n`, `k`; `auto` for the fullest that the autoencoders can tell.

    Raises:
        InputError: too few autoencoders, sizes or sparsities for the law, with how many it takes.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "sae_scaling").df()  # doctest: +SKIP
    """
    frame, where = one_site(judged_frame(run), site)
    sizes = _usable(wide(frame))
    chosen = _chosen(law, sizes, where)
    n, k, loss = (sizes[column].to_numpy(float) for column in ("d_sae", "l0", "fvu"))
    found = fit_law(chosen, n, k, loss)
    table = _table(frame, sizes, found)
    free = len(sizes) - len(LAWS[chosen])
    return Result(
        title=_title(found, sizes, where),
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=_draw,
        n=len(sizes),
        n_unit="autoencoders",
        definition=f"L(n, k) = {FORMULAS[chosen]}, fitted to FVU by least squares of logarithms; n latents, k the measured mean L0.",
        units={
            "value[fvu]": "share of variance", "fitted": "share of variance", "l0": "latents a vector", "d_sae": "latents",
            "value[rms_log_error]": "ln(fitted ÷ measured)", "value[left_out_log_error]": "ln(predicted ÷ measured)",
        },
        interval="of FVU: 95 % percentile bootstrap over documents; of parameters: 95 % from the curvature of the fit",
        null="of the errors: the mean of ln FVU in the law's place",
        sql=JUDGED_SQL,
        sql_parameters={"run": run.run_id},
        computation="least squares of ln FVU (scipy.optimize.least_squares)",
        notes=_notes(law, found, free, sizes),
    )  # fmt: skip


def _usable(sizes: pd.DataFrame) -> pd.DataFrame:
    """Autoencoders with a size, an L0 and an FVU over 0."""
    there = (sizes["fvu"] > 0) & (sizes["l0"] > 0) & (sizes["d_sae"] > 0)
    return sizes[there]


def _chosen(law: str, sizes: pd.DataFrame, where: str) -> str:
    possible = possible_laws(sizes["d_sae"].to_numpy(float), sizes["l0"].to_numpy(float)) if len(sizes) else []
    if law == "auto" and possible:
        return possible[0]
    if law in possible:
        return law
    wanted = "n" if law == "auto" else law
    count, (of_n, of_k) = len(LAWS[wanted]), NEEDS[wanted]
    more = (
        ""
        if law != "auto"
        else ", or of one size and two sparsities; the full law takes 6, of three sizes and three sparsities"
    )
    raise InputError(
        f"there are too few judged autoencoders at {where} for the law in {_words(wanted)}",
        expected=f"{count} or more, of {of_n} or more sizes and {of_k} or more sparsities (over {100 * SAME:.0f} % apart){more}",
        found=f"{len(sizes)}: "
        + (", ".join(f"n = {int(r.d_sae)}, k = {r.l0:.3g}" for r in sizes.itertuples()) or "none"),
        fix=f"train and {FIX}",
    )


def _told(law: Law) -> bool:
    """Whether the fit settles how large the part is that no number of latents removes: to a factor of e on either side."""
    at = LAWS[law.kind].index("zeta")
    width = law.high[at] - law.low[at]
    return bool(np.isfinite(width) and width <= 2)


def _words(law: str) -> str:
    return {"full": "n and k with an irreducible part", "n_and_k": "n and k", "n": "n", "k": "k"}[law]


def _table(frame: pd.DataFrame, sizes: pd.DataFrame, law: Law) -> pd.DataFrame:
    """A row an autoencoder, a row a parameter, and the errors of the fit."""
    measured = frame[(frame["metric"] == "fvu") & (frame["condition"] == "sae")].set_index("sae_id").loc[sizes.index]
    n, k, loss = (sizes[column].to_numpy(float) for column in ("d_sae", "l0", "fvu"))
    fitted = law.predict(n, k)
    rows: list[dict[str, Any]] = [
        {
            "metric": "fvu", "sae": name, "d_sae": int(size), "l0": active, "value": value, "fitted": line,
            "ci_low": low, "ci_high": high, "n": int(count),
        }
        for name, size, active, value, line, low, high, count in zip(
            sizes["sae"], n, k, loss, fitted, measured["ci_low"], measured["ci_high"], measured["n"], strict=True
        )
    ]  # fmt: skip
    for name, value, low, high in zip(LAWS[law.kind], law.values, law.low, law.high, strict=True):
        rows.append(
            {"metric": "parameter", "parameter": name, "value": value, "ci_low": low, "ci_high": high, "n": len(sizes)}
        )
    error, spread = np.log(fitted / loss), np.log(loss) - np.log(loss).mean()
    rows.append(
        {"metric": "rms_log_error", "value": _rms(error), "null": _rms(spread), "n": len(sizes)},
    )
    if (left_out := left_out_error(law.kind, n, k, loss)) is not None:
        rows.append({"metric": "left_out_log_error", "value": left_out[0], "null": left_out[1], "n": len(sizes)})
    columns = ["metric", "sae", "parameter", "d_sae", "l0", "value", "fitted", "ci_low", "ci_high", "null", "n"]
    found = pd.DataFrame(rows).reindex(columns=columns)
    found["d_sae"] = found["d_sae"].astype("Int64")
    return found


def _rms(values: Any) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _title(law: Law, sizes: pd.DataFrame, where: str) -> str:
    named = dict(zip(LAWS[law.kind], law.values, strict=True))
    if "gamma" in named and not _told(law):
        n, k, loss = (sizes[column].to_numpy(float) for column in ("d_sae", "l0", "fvu"))
        error = _rms(np.log(law.predict(n, k) / loss))
        return (
            f"The law meets the variance left by {len(sizes)} autoencoders at {where} within {100 * error:.2g} %, but they do not tell "
            "its two parts apart"
        )
    if "gamma" in named:
        at = float(np.exp(np.log(sizes["l0"].to_numpy(float)).mean()))
        slope = named["beta_n"] + named["gamma"] * np.log(at)
        floor = float(np.exp(named["zeta"] + named["eta"] * np.log(at)))
        return (
            f"At k = {at:.3g} the reducible variance left at {where} goes as n to the power {slope:.3g}; {100 * floor:.2g} % would "
            "stay however many latents there are"
        )
    parts = [f"n to the power {named['beta_n']:.3g}"] if "beta_n" in named else []
    parts += [f"k to the power {named['beta_k']:.3g}"] if "beta_k" in named else []
    return f"The variance left at {where} goes as {' and '.join(parts)}, over {len(sizes)} autoencoders"


def _notes(asked: str, law: Law, free: int, sizes: pd.DataFrame) -> tuple[str, ...]:
    notes, chosen = [], law.kind
    if chosen != "full" and asked == "auto":
        count, (of_n, of_k) = len(LAWS["full"]), NEEDS["full"]
        notes.append(
            f"The full law, with a part that no number of latents removes, takes {count} or more autoencoders of {of_n} or more sizes "
            f"and {of_k} or more sparsities; with these {len(sizes)} a power law in {_words(chosen)} was fitted instead."
        )
    if chosen == "full" and not _told(law):
        notes.append(
            "The intervals of the parameters are wide: what the law says between these sizes and sparsities holds, its parameters and "
            "what it says far from them do not."
        )
    if free == 0:
        notes.append(
            "There are as many autoencoders as parameters: the fit meets each of them, which says nothing of its truth."
        )
    return tuple(notes)


def _draw(result: Result) -> go.Figure:
    """FVU over latents on two logarithmic axes, a colour a sparsity: measured points, the law as lines."""
    frame = result.df()
    points = frame[frame["metric"] == "fvu"].sort_values(["l0", "d_sae"])
    values = frame[frame["metric"] == "parameter"]
    names = tuple(values["parameter"])
    law = Law(next(kind for kind, parts in LAWS.items() if parts == names), tuple(values["value"]))
    n = points["d_sae"].astype(float).to_numpy()
    k = points["l0"].to_numpy(float)
    group = np.r_[0, np.cumsum(np.diff(np.log(k)) > SAME)]
    figure = go.Figure()
    line = np.geomspace(n.min(), n.max() if n.max() > n.min() else 2 * n.min(), 60)
    for number in np.unique(group):
        mine = points[group == number]
        colour, at = SERIES[int(number) % _MOST_LINES], float(mine["l0"].mean())
        value, called = mine["value"], f"k = {at:.3g}"
        low, high = mine["ci_low"].fillna(value), mine["ci_high"].fillna(value)
        figure.add_scatter(
            x=line, y=law.predict(line, np.full(len(line), at)), mode="lines", line={"color": colour}, showlegend=False,
            hoverinfo="skip", legendgroup=called,
        )  # fmt: skip
        figure.add_scatter(
            x=mine["d_sae"].astype(float), y=value, mode="markers", name=called, legendgroup=called,
            marker={"color": colour, "size": 9},
            error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
            customdata=[[plain(str(name)), fit] for name, fit in zip(mine["sae"], mine["fitted"], strict=True)],
            hovertemplate="%{customdata[0]}: %{y:.4g} (law: %{customdata[1]:.4g})<extra></extra>",
        )  # fmt: skip
    left, sizes = spread_ticks(points["value"].to_numpy(float)), spread_ticks(n)
    figure.update_yaxes(
        title="FVU (share of variance left, log scale)",
        type="log",
        tickvals=left,
        ticktext=[f"{tick:g}" for tick in left],
    )
    figure.update_xaxes(
        title="latents n (log scale)", type="log", tickvals=sizes, ticktext=[f"{int(v):,}" for v in sizes]
    )
    figure.update_layout(height=440)
    return figure
