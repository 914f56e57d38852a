"""One autoencoder by the field's measures, beside its controls."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from moescope.core.analysis import analysis
from moescope.core.figures import CHANCE, SERIES
from moescope.core.result import Result
from moescope.routing.features.quality_tables import CONDITIONS, judged_sae
from moescope.store.run import Run

# The control beside each measure: the first of these that was taken.
_SQL = """
    WITH measured AS (
        SELECT metric, condition, group_kind, group_value, value, ci_low, ci_high, n, unit
        FROM sae_measures
        WHERE run_id = $run AND sae_id = $sae AND metric IN ('fvu', 'normalised_mse', 'cosine', 'norm_ratio', 'explained_variance',
            'l0', 'l0_p05', 'l0_p50', 'l0_p95', 'dead_share', 'dead_share_training', 'dense_share', 'max_cosine', 'max_cosine_p50',
            'max_cosine_p95', 'max_cosine_p99', 'twin_share', 'probe_loss', 'probe_auc', 'splitting', 'absorption',
            'own_latents_silent', 'ce', 'delta_ce', 'kl', 'flips', 'loss_recovered_zero', 'loss_recovered_mean', 'ablation_sparsity')
    ),
    controls AS (
        SELECT metric, group_kind, group_value, value AS control, condition AS control_kind
        FROM measured
        WHERE condition IN ('random_decoder', 'random_direction', 'shuffled', 'pca')
        QUALIFY row_number() OVER (PARTITION BY metric, group_kind, group_value
            ORDER BY list_position(['random_decoder', 'random_direction', 'shuffled', 'pca'], condition)) = 1
    )
    SELECT m.metric, m.condition, m.group_kind, m.group_value AS "group", m.value, m.ci_low, m.ci_high,
        CASE WHEN m.condition = 'sae' THEN c.control END AS "null", CASE WHEN m.condition = 'sae' THEN c.control_kind END AS null_kind,
        m.n, m.unit
    FROM measured m
    LEFT JOIN controls c ON c.metric = m.metric AND c.group_kind = m.group_kind
        AND c.group_value IS NOT DISTINCT FROM m.group_value
    ORDER BY m.group_kind <> 'all', m.metric, m.group_kind, m.group_value, m.condition <> 'sae', m.condition
"""


@analysis(
    name="sae_quality",
    needs=("sae_measures",),
    source="Gao et al., Scaling and evaluating sparse autoencoders: arXiv 2406.04093; absorption: Chanin et al., arXiv 2409.14507; "
    "loss recovered: Bricken et al. 2023, Towards Monosemanticity",
    section="features",
    order=12,
)
def sae_quality(run: Run, *, sae: str | None = None) -> Result:
    """How well does an autoencoder write the vectors again, what does the model lose by it, and are its latents of use?

    `fvu` is Σ‖x − x̂‖² ÷ Σ‖x − x̄‖², x̄ the mean of vectors that are not judged; `normalised_mse` the mean of the same ratio by token.
    `delta_ce`, `kl` and `flips` are what the reconstruction in the vectors' place does to predictions; `loss_recovered_zero` and
    `_mean` put that on a scale from the vectors replaced by 0 (or by x̄), 0, to the model as it is, 1. `dead_share` counts latents
    that fire on no judged token, `dense_share` those that fire on over a tenth. `max_cosine` is how close each decoder row's nearest
    other row is. `probe_loss` is the loss of the best logistic probe on one latent, for each label and token class. `absorption`
    is the share of tokens with a first letter whose own latents are silent while another latent carries the letter, `splitting` over
    how many latents beyond one a letter is split. `ablation_sparsity` is (L1 ÷ L2)² ÷ (V·T) of what a latent's removal does to V
    logits at T positions.

    Controls: the k first principal components, and the k largest of all components by vector (`pca`, `pca_topk`; k is the mean L0,
    rounded); a random decoder of which each vector uses k rows; decoder rows dealt out anew (`shuffled`); the mean; zero.

    Args:
        sae: name of the autoencoder; the newest that was judged on the run where not given.

    Raises:
        InputError: it was not judged on this run.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "sae_quality").df()  # doctest: +SKIP
    """
    chosen = judged_sae(run, sae)
    table = run.sql(_SQL, {"sae": chosen.sae_id}).to_arrow_table()
    frame = table.to_pandas()
    whole = frame[frame["group_kind"] == "all"]
    return Result(
        title=_title(chosen.name, whole),
        table=table,
        draw=_draw,
        n=int(whole.loc[whole["metric"] == "fvu", "n"].max()),
        n_unit="judged vectors",
        definition="FVU = Σ‖x − x̂‖² ÷ Σ‖x − x̄‖². ΔCE: cross-entropy with the reconstruction in place less without. "
        "Loss recovered = (CE of the control − CE) ÷ (CE of the control − CE of the model). Others: see the analysis.",
        units={"n": "tokens, latents, letters or ablations"}
        | {f"value[{metric}]": unit for metric, unit in dict(zip(frame["metric"], frame["unit"], strict=True)).items()},
        interval="95 % percentile bootstrap over documents, 1,000 resamples (AUC: 200); shares of latents and quantiles have none",
        null="of the autoencoder's rows, the control that null_kind names: a random decoder, a random direction, shuffled decoder rows "
        "or answers, or PCA",
        sql=_SQL,
        sql_parameters={"run": run.run_id, "sae": chosen.sae_id},
        notes=(
            f"Autoencoder {chosen.name} ({chosen.architecture}, {chosen.d_sae:,} latents) at {chosen.site}.",
            *_notes(whole),
        ),
    )


def _title(name: str, whole: pd.DataFrame) -> str:
    found = whole.set_index(["metric", "condition"])["value"].to_dict()
    text = f"{name} leaves {_percent(found['fvu', 'sae'])} of the variance"
    if ("l0", "sae") in found:
        text += f" with {found['l0', 'sae']:.3g} latents a vector"
    if ("fvu", "pca") in found:
        text += f" (PCA with as many components {_percent(found['fvu', 'pca'])})"
    if ("delta_ce", "sae") in found:
        text += f", and in the model costs {found['delta_ce', 'sae']:.3g} nats a token"
        if ("delta_ce", "zero") in found:
            text += f" (zero: {found['delta_ce', 'zero']:.3g})"
    return text


def _notes(whole: pd.DataFrame) -> list[str]:
    """What was not measured."""
    metrics = set(whole["metric"])
    missing = [] if "delta_ce" in metrics else ["It was not spliced into the live model."]
    return missing if "absorption" in metrics else [*missing, "No first letter was told well enough for absorption."]


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _draw(result: Result) -> go.Figure:
    """A line a way to write the vectors: variance left on the left, ΔCE on the right, intervals over documents."""
    from plotly.subplots import make_subplots

    frame = result.df()
    frame = frame[frame["group_kind"] == "all"]
    shown = [("fvu", "FVU (share of variance left)")]
    shown += [("delta_ce", "ΔCE (nats per token)")] if (frame["metric"] == "delta_ce").any() else []
    present = set(frame.loc[frame["metric"].isin([metric for metric, _ in shown]), "condition"])
    order = [condition for condition in CONDITIONS if condition in present]
    figure = make_subplots(rows=1, cols=len(shown), shared_yaxes=True, horizontal_spacing=0.06)
    for column, (metric, unit) in enumerate(shown, start=1):
        part = frame[frame["metric"] == metric].set_index("condition")
        part = part.loc[[condition for condition in order if condition in part.index]]
        figure.add_trace(_points(part), row=1, col=column)
        level = 1.0 if metric == "fvu" else 0.0
        figure.add_vline(x=level, line={"color": CHANCE, "dash": "dash", "width": 1}, row=1, col=column)
        figure.update_xaxes(title=unit, rangemode="tozero", row=1, col=column)
    names = [CONDITIONS[condition] for condition in order]
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=names[::-1])
    figure.update_layout(height=200 + 34 * len(order), showlegend=False)
    return figure


def _points(part: pd.DataFrame) -> go.Scatter:
    value = part["value"]
    low, high = part["ci_low"].fillna(value), part["ci_high"].fillna(value)
    own = [condition == "sae" for condition in part.index]
    return go.Scatter(
        x=value, y=[CONDITIONS[condition] for condition in part.index], mode="markers",
        marker={"color": [SERIES[1] if mine else SERIES[0] for mine in own], "size": [11 if mine else 8 for mine in own]},
        error_x={
            "type": "data", "symmetric": False, "array": high - value, "arrayminus": value - low, "thickness": 1.5,
            "color": CHANCE,
        },
        customdata=list(zip(low, high, part["n"], strict=True)),
        hovertemplate="%{y}: %{x:.4g} (%{customdata[0]:.4g} to %{customdata[1]:.4g})<br>n = %{customdata[2]:,}<extra></extra>",
    )  # fmt: skip
