"""A dense MLP seen as a sparse mixture of experts: how well students imitate it, on real inputs and on Gaussian ones."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
import pyarrow as pa
from plotly.subplots import make_subplots

from moescope.core.analysis import analysis
from moescope.core.errors import InputError
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.grid import layer_name
from moescope.store.run import Run

_LAYERS_SQL = """
    SELECT layer, block
    FROM mlp_students
    WHERE run_id = ?
    GROUP BY layer, block
    ORDER BY layer, block
"""
_SQL = """
    SELECT
        layer, block, student, inputs, experts, active, share, router_rank, metric, value, ci_low, ci_high, n,
        settings->>'$.vectors' AS vectors
    FROM mlp_students
    WHERE run_id = $run AND layer = $layer AND block = $block
    ORDER BY metric, inputs DESC, student, router_rank NULLS FIRST, active
"""
_COLUMNS = (
    "layer", "block", "student", "inputs", "experts", "active", "share", "router_rank", "metric", "value", "ci_low", "ci_high",
    "null", "n",
)  # fmt: skip
_GAINS = ("gain", "gain_equal_share")
_INPUTS = {"real": "real inputs", "gaussian": "Gaussian inputs"}
_STYLES = {
    "mixture": (SERIES[0], "circle", "solid"),
    "mixture, low-rank router": (SERIES[2], "diamond", "solid"),
    "dense": (SERIES[1], "square", "dash"),
}


@analysis(
    name="mlp_students",
    needs=("mlp_students",),
    source="arXiv 2512.18452 and its released code",
    section="features",
    order=80,
)
def mlp_students(run: Run, *, layer: int | None = None, block: str = "mlp") -> Result:
    """Is this MLP better imitated by a sparse mixture of experts than by a dense MLP, and only on what it is really given?

    FVU = Σ‖MLP(x) − student(x)‖² ÷ Σ‖MLP(x) − mean‖² over held-out vectors. `gain` is the FVU of the dense student with as many
    active neurons, less the mixture's; `gain_equal_share` that of the dense student with as many parameters as the mixture has
    active ones, router included: published gains are of the first kind, and a full router over many experts costs more than
    the neurons it chooses. If the gain is there on real inputs and not on Gaussian ones of the same mean and covariance, what
    the mixture uses is in the data.

    Args:
        layer: of the MLP; None for the first that has students.
        block: its sublayer.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.students.study import mlp_students
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = mlp_students(ms.load("demo"), ms.Corpus.load("demo"), store, layer=5, students=("linear", "mean"),
        ...                          inputs=("real",), vectors=1000, progress=False)
        ...     ms.analyze(found.run, "mlp_students").df()["metric"].unique().tolist()
        ['fvu']
    """
    places = [(int(found), str(of)) for found, of in run.store.fetch(_LAYERS_SQL, [run.run_id])]
    place = places[0] if places and layer is None and block == "mlp" else (layer, block)
    if layer is None:
        place = next((p for p in places if p[1] == block), place)
    if place not in places:
        names = ", ".join(layer_name(*p) for p in places)
        raise InputError(
            f"no students of {block!r} in layer {layer}" if layer is not None else f"no students of block {block!r}",
            expected=f"parameter layer among {names}" if places else "students of an MLP",
            fix="train some: moescope sae students, or ms.sae.mlp_students",
        )
    parameters = {"layer": place[0], "block": place[1]}
    frame = run.sql(_SQL, parameters).df()
    frame["null"] = _nulls(frame)
    vectors = int(float(frame["vectors"].dropna().iloc[0])) if frame["vectors"].notna().any() else int(frame["n"].max())
    table = frame[list(_COLUMNS)].copy()
    for name in ("experts", "router_rank", "active"):
        table[name] = table[name].astype("Int64")
    others = [layer_name(*p) for p in places if p != place]
    return Result(
        title=_title(frame, layer_name(*parameters.values())),  # type: ignore[arg-type]  # a layer and a block
        table=pa.Table.from_pandas(table, preserve_index=False),
        draw=draw_students,
        n=vectors,
        n_unit="pairs of input and output, a fifth of them held out",
        definition="FVU = Σ‖MLP(x) − student(x)‖² ÷ Σ‖MLP(x) − mean‖² over held-out vectors. Mixture: half its active neurons shared, "
        "half the best of single-neuron experts, softmax over the chosen; dense: as many neurons; linear: best affine map. share: "
        "parameters at work on a token, router included, ÷ those of the MLP. gain: FVU of the dense student with as many active neurons, "
        "less the mixture's; gain_equal_share: of the dense student with as many parameters. Inputs gaussian − real: the difference.",
        units={
            "value[fvu]": "share of variance",
            "value[gain]": "share of variance",
            "value[gain_equal_share]": "share of variance",
            "value[experts_used]": "share of experts",
            "value[nmi]": "0 to 1",
            "value[nmi_shuffled]": "0 to 1",
            "share": "÷ parameters of the MLP",
            "n": "held-out vectors",
        },
        interval="95 % percentile bootstrap over held-out documents (Gaussian inputs: over vectors), and over seeds of training where "
        "there are several; differences resample both sides alike",
        null="FVU: the mean output, whatever the input; gains on real inputs: the same gain on Gaussian inputs of the same mean and "
        "covariance; nmi: latents shuffled over tokens",
        sql=_SQL,
        sql_parameters={"run": run.run_id, **parameters},
        computation="chance levels set beside the rows",
        notes=(f"Other MLPs of this run have students too: {', '.join(others)}.",) if others else (),
    )


def _nulls(frame: pd.DataFrame) -> list[float]:
    """The chance level beside each row."""
    mean = {r.inputs: r.value for r in frame.itertuples() if r.student == "mean" and r.metric == "fvu"}

    def of(row: pd.Series) -> float:
        if row["metric"] == "fvu":
            return float(mean.get(row["inputs"], 1.0 if row["inputs"] in _INPUTS else 0.0))
        wanted = ("gaussian", row["metric"]) if row["inputs"] == "real" else None
        if row["metric"] == "nmi":
            wanted = (row["inputs"], "nmi_shuffled")
        if wanted is None or row["metric"] not in (*_GAINS, "nmi"):
            return float("nan")
        same = frame[(frame["inputs"] == wanted[0]) & (frame["metric"] == wanted[1])]
        same = same[(same["active"] == row["active"]) & (same["experts"].eq(row["experts"]))]
        rank = same["router_rank"]
        same = same[rank.isna() if pd.isna(row["router_rank"]) else rank == row["router_rank"]]
        return float(same["value"].iloc[0]) if len(same) else float("nan")

    return [of(row) for _, row in frame.iterrows()]


def _title(frame: pd.DataFrame, place: str) -> str:
    real = frame[(frame["inputs"] == "real") & (frame["metric"] == "gain")]
    inputs = "real"
    if real.empty:
        inputs = "gaussian"
        real = frame[(frame["inputs"] == inputs) & (frame["metric"] == "gain")]
    if real.empty:
        fvu = frame[(frame["metric"] == "fvu") & frame["inputs"].isin(list(_INPUTS))].sort_values("value").iloc[0]
        return f"Of students of the MLP of {place}, {_name(fvu)} leaves least: FVU {fvu['value']:.3f} on {_INPUTS[fvu['inputs']]}"
    best = real.sort_values("value", ascending=False).iloc[0]
    fvu = _same(frame, best, "fvu", inputs)
    assert fvu is not None  # every student that has a gain has an FVU
    text = (
        f"MLP of {place}, {_INPUTS[inputs]}: with {int(best['active'])} active neurons a {_name(best)} leaves {fvu['value']:.3f} of the "
        f"variance, a dense student {fvu['value'] + best['value']:.3f} (gain {_signed(best)})"
    )
    equal = _same(frame, best, "gain_equal_share", inputs)
    text += "" if equal is None else f", one of as many parameters {fvu['value'] + equal['value']:.3f}"
    other = _same(frame, best, "gain", "gaussian") if inputs == "real" else None
    return text if other is None else f"{text}; on Gaussian inputs the gain is {_signed(other)}"


def _same(frame: pd.DataFrame, row: pd.Series, metric: str, inputs: str) -> pd.Series | None:
    """The row of the same student with another metric or inputs."""
    rank = frame["router_rank"]
    same = frame[
        (frame["metric"] == metric)
        & (frame["inputs"] == inputs)
        & (frame["active"] == row["active"])
        & (frame["student"] == row["student"])
        & (rank.isna() if pd.isna(row["router_rank"]) else rank == row["router_rank"])
    ]
    return same.iloc[0] if len(same) else None


def _signed(row: pd.Series) -> str:
    number = f"{row['value']:+.3f}".replace("-", "−")
    if pd.isna(row["ci_low"]):
        return number
    return f"{number} [{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]".replace("-", "−")


def _name(row: pd.Series) -> str:
    if row["student"] != "moe":
        return {"linear": "the linear map", "mean": "the mean"}.get(
            str(row["student"]), f"the {row['student']} student"
        )
    low = "" if pd.isna(row["router_rank"]) else f" (router of rank {int(row['router_rank'])})"
    return f"mixture of {int(row['experts'])}{low}"


def draw_students(result: Result) -> go.Figure:
    """FVU against active share, a panel for each kind of inputs: mixtures, dense students, the linear map and the mean."""
    frame = result.df()
    frame = frame[frame["metric"] == "fvu"]
    panels = [name for name in _INPUTS if name in set(frame["inputs"])]
    figure = make_subplots(
        cols=len(panels), shared_yaxes=True, horizontal_spacing=0.06, subplot_titles=[_INPUTS[name] for name in panels]
    )
    shares = frame.loc[frame["student"].isin(["moe", "dense"]), "share"]
    ends = [shares.min() * 100, shares.max() * 100] if len(shares) else [1.0, 100.0]
    for column, inputs in enumerate(panels, start=1):
        part = frame[frame["inputs"] == inputs]
        series = {
            "dense": part[part["student"] == "dense"],
            "mixture": part[(part["student"] == "moe") & part["router_rank"].isna()],
            "mixture, low-rank router": part[(part["student"] == "moe") & part["router_rank"].notna()],
        }
        for name, rows in series.items():
            if len(rows):
                figure.add_trace(_line(name, rows.sort_values("share"), first=column == 1), row=1, col=column)
        for student, dash in (("linear", "dot"), ("mean", "longdash")):
            level = part.loc[part["student"] == student, "value"]
            if len(level):
                figure.add_trace(
                    go.Scatter(
                        x=ends, y=[float(level.iloc[0])] * 2, mode="lines", name=f"{student} (control)", showlegend=column == 1,
                        line={"color": CHANCE, "dash": dash}, hovertemplate=f"{student}: %{{y:.3f}}<extra></extra>",
                    ),
                    row=1, col=column,
                )  # fmt: skip
        figure.update_xaxes(title="active parameters, % of the MLP's", type="log", row=1, col=column)
    figure.update_yaxes(title="FVU, share of variance left", rangemode="tozero", row=1, col=1)
    figure.update_layout(height=460)
    return figure


def _line(name: str, rows: pd.DataFrame, *, first: bool) -> go.Scatter:
    colour, symbol, dash = _STYLES[name]
    value, low, high = (rows[c].astype(float).to_numpy() for c in ("value", "ci_low", "ci_high"))
    return go.Scatter(
        x=rows["share"] * 100, y=value, name=name, legendgroup=name, showlegend=first, mode="lines+markers",
        line={"color": colour, "dash": dash}, marker={"symbol": symbol, "size": 9},
        error_y={"type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1},
        customdata=rows[["active"]].astype(int).to_numpy(),
        hovertemplate=f"{name}, %{{customdata[0]}} active neurons, %{{x:.2f}} %: FVU %{{y:.3f}}<extra></extra>",
    )  # fmt: skip
