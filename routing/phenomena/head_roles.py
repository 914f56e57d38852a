"""Roles of heads: the cheapest set of keys that recovers nearly all of a head's attention."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.figures import SEQUENTIAL, SERIES
from moescope.core.result import Result
from moescope.core.statistics import document_weights
from moescope.routing.grid import layer_name
from moescope.routing.phenomena.head_records import HEADS_SQL, HeadRecord, condition_of, head_record, needed_record
from moescope.store.run import Run

POLICIES = ("special", "+ punctuation", "+ frequent", "+ local")
ROLES = (*POLICIES, "all")
MASS, EVEN = "recovered mass, ", "even attention, "
_PROTOCOL = "moescope.probes.phenomena.head_roles.head_roles(model, store=store)"
_COLUMNS = ("layer", "block", "head", "metric", "role", "value", "ci_low", "ci_high", "null", "stability", "n")


@analysis(
    name="head_roles",
    needs=("head_sequences",),
    source="arXiv 2310.01801 (FastGen)",
    section="phenomena",
    order=80,
)
def head_roles(run: Run, *, mass: float = 0.95, draws: Count = 500, seed: Natural = 0) -> Result:
    """How little of the past can each head be left with and still find nearly all that it attends to?

    The recovered mass of a set of keys is the mean over queries of the share of a head's attention that goes to it. The sets are
    nested: special (the first token and special tokens), + punctuation, + frequent (the keys with the largest accumulated
    attention, each head's own), + local (the nearest), all. A head's role is the first of them that recovers at least 95 %.

    The chance level of a mass is that of even attention over the same keys; of a share of heads, the share whose keys would
    recover enough under even attention. `stability` is the share of texts in which a head has the role it has over all texts.

    Args:
        mass: what a set must recover.
        draws: bootstrap resamples of documents.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.probes.phenomena.head_roles import head_roles
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = head_roles(ms.load("demo"), ["Well, here it is. And there, too.", "Once more."], store=store)
        ...     table = ms.analyze(found.run, "head_roles").df()
        ...     round(float(table.loc[table["metric"] == "heads with the role", "value"].sum()), 6)
        1.0
    """
    if not 0 < mass <= 1:
        raise InputError(f"parameter 'mass' cannot be {mass!r}", expected="a share over 0, up to 1")
    records = [needed_record(run, MASS + policy, protocol=_PROTOCOL) for policy in POLICIES]
    evens = [head_record(run, EVEN + policy) for policy in POLICIES]
    pooled = roles_of(np.stack([record.value for record in records]), mass)
    texts = [roles_of(np.stack([_of_text(r, text) for r in records]), mass) for text in range(records[0].documents)]
    stability = np.mean([found == pooled for found in texts], axis=0)
    parts = []
    for policy, record, even in zip(POLICIES, records, evens, strict=True):
        part = record.frame(MASS + policy, draws=draws, seed=seed, null=None if even is None else even.value)
        parts.append(part.assign(role=[ROLES[r] for r in pooled], stability=stability))
    shares = _shares(records, [e for e in evens if e is not None], pooled, mass, draws, seed)
    frame = pd.concat([*parts, shares], ignore_index=True).reindex(columns=list(_COLUMNS))
    for name in ("layer", "head", "n"):
        frame[name] = frame[name].astype("Int64")
    return Result(
        title=_title(pooled, stability, records[0].documents, mass),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_roles,
        n=records[0].documents,
        n_unit="texts",
        definition="recovered mass of a set C of keys: mean over queries q of Σ A[q, k] over k in C(q), k ≤ q; sets: special (the first "
        "token, special tokens) ⊂ + punctuation ⊂ + frequent (largest accumulated attention of the head) ⊂ + local (nearest) ⊂ all; "
        f"role: the first set with recovered mass ≥ {mass:g}; stability: share of texts that give a head the same role.",
        units={
            "value": "share of attention",
            "value[heads with the role]": "share of heads",
            "stability": "share of texts",
        },
        interval=f"95 % percentile bootstrap over documents, {draws} resamples",
        null="even attention over the same keys",
        sql=HEADS_SQL,
        sql_parameters={
            "run": run.run_id,
            "metric": MASS + POLICIES[0],
            "condition": condition_of(run, MASS + POLICIES[0]),
        },
        computation="means over texts of the query's rows, one metric a set; the first set over the threshold; bootstrap",
        notes=_notes(run),
    )


def roles_of(masses: NDArray[np.float64], mass: float) -> NDArray[np.int64]:
    """The first set that recovers enough, for each head; the number of sets where none does.

    Args:
        masses: [set, head], each set holding the one before.

    Example:
        >>> roles_of(np.array([[0.2, 0.96], [0.97, 0.97]]), 0.95).tolist()
        [1, 0]
    """
    enough = np.concatenate([masses >= mass, np.ones((1, masses.shape[1]), bool)])
    found: NDArray[np.int64] = enough.argmax(0)
    return found


def _of_text(record: HeadRecord, text: int) -> NDArray[np.float64]:
    value: NDArray[np.float64] = record.sums[text] / np.maximum(record.n[text], 1)
    return value


def _shares(
    records: list[HeadRecord], evens: list[HeadRecord], pooled: NDArray[np.int64], mass: float, draws: int, seed: int
) -> pd.DataFrame:
    """Share of heads with each role, resampling documents; and under even attention."""
    weights = document_weights(records[0].documents, draws=draws, seed=seed).astype(np.float64)
    drawn = np.stack([(weights @ r.sums) / np.maximum(weights @ r.n, 1) for r in records])  # [set, draw, head]
    again = np.stack([roles_of(drawn[:, draw], mass) for draw in range(draws)])
    null = roles_of(np.stack([even.value for even in evens]), mass) if len(evens) == len(records) else None
    rows = []
    for number, role in enumerate(ROLES):
        shares = (again == number).mean(1)
        low, high = np.percentile(shares, [2.5, 97.5]) if records[0].documents > 1 else (np.nan, np.nan)
        rows.append(
            {
                "metric": "heads with the role", "role": role, "value": (pooled == number).mean(), "ci_low": low, "ci_high": high,
                "null": np.nan if null is None else (null == number).mean(), "n": len(pooled),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def draw_roles(result: Result) -> go.Figure:
    """Layer × head, coloured by role; the share of each role in its name."""
    frame = result.df()
    shares = frame[frame["metric"] == "heads with the role"].set_index("role")["value"]
    part = frame[frame["metric"] == MASS + POLICIES[0]]
    places = sorted({(int(r.layer), str(r.block)) for r in part.itertuples()})
    number = {place: row for row, place in enumerate(places)}
    grid = np.full((len(places), int(part["head"].max()) + 1), np.nan)
    stable = np.full(grid.shape, np.nan)
    for r in part.itertuples():
        grid[number[int(r.layer), str(r.block)], int(r.head)] = ROLES.index(str(r.role))
        stable[number[int(r.layer), str(r.block)], int(r.head)] = float(r.stability)
    colours = _steps()
    names = [f"{role}: {shares[role]:.0%}" for role in ROLES]
    text = np.array([names[int(v)] if np.isfinite(v) else "" for v in grid.ravel()]).reshape(grid.shape)
    figure = go.Figure(
        go.Heatmap(
            z=grid, x=[f"H{h}" for h in range(grid.shape[1])],
            y=[layer_name(layer, "mlp" if block == "attn" else block) for layer, block in places],
            zmin=-0.5, zmax=len(ROLES) - 0.5, colorscale=colours, xgap=1, ygap=1, customdata=np.stack([text, stable.astype(str)], -1),
            hovertemplate="%{y}·%{x}: %{customdata[0]} of heads<br>same role in %{customdata[1]} of texts<extra></extra>",
            colorbar={"title": {"text": "cheapest set of keys", "side": "right"}, "thickness": 14, "tickvals": list(range(len(ROLES))),
                      "ticktext": names},
        )
    )  # fmt: skip
    figure.update_xaxes(title="head", type="category", nticks=16)
    figure.update_yaxes(title="layer", type="category", autorange="reversed", nticks=16)
    figure.update_layout(height=max(320, min(560, 150 + 14 * len(places))))
    return figure


def _steps() -> list[tuple[float, str]]:
    """A colour scale of one flat step a role, from the sequential scale and so in order of cost."""
    from plotly.colors import sample_colorscale

    parts = len(ROLES)
    picked = sample_colorscale(SEQUENTIAL, [n / (parts - 1) for n in range(parts)]) if parts > 1 else [SERIES[0]]
    return [(edge / parts, colour) for n, colour in enumerate(picked) for edge in (n, n + 1)]


def _title(pooled: NDArray[np.int64], stability: NDArray[np.float64], documents: int, mass: float) -> str:
    counts = [(int((pooled == number).sum()), role) for number, role in enumerate(ROLES)]
    told = ", ".join(f"{count} {role}" for count, role in counts if count)
    same = f"; a head has the same role in {stability.mean():.0%} of {documents} texts" if documents > 1 else ""
    return f"Keys that recover {mass:.0%} of a head's attention, of {len(pooled)} heads: {told}{same}"


def _notes(run: Run) -> tuple[str, ...]:
    settings = run.info["settings"]
    told = (
        f"frequent and local hold {settings['frequent']:.0%} and {settings['local']:.0%} of a text's tokens."
        if "frequent" in settings
        else ""
    )
    return (*([told] if told else []), *(str(note) for note in run.info["summary"].get("notes") or []))
