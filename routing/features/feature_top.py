"""The most interpretable latents, with what they fire on as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import pyarrow as pa

from moescope.core.analysis import Count, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.routing.context import pieces
from moescope.routing.features.feature_examples import draw_examples, example_row
from moescope.routing.features.feature_tables import RULE_NAMES, RULES, Sae, chosen_sae, reading_notes, windows, words
from moescope.store.run import Run

if TYPE_CHECKING:
    import plotly.graph_objects as go

Rule = Literal["any", "token", "previous_token", "label"]

_SQL = """
    WITH scored AS (
        SELECT s.group_value::INTEGER AS feature, s.metric, s.value, s.ci_low, s.ci_high, n.value AS "null", s.n
        FROM sae_measures s
        JOIN sae_measures n ON n.run_id = s.run_id AND n.sae_id = s.sae_id AND n.metric = s.metric
            AND n.group_kind = s.group_kind AND n.group_value = s.group_value AND n.condition = 'shuffled'
        WHERE s.run_id = $run AND s.sae_id = $sae AND s.group_kind = 'feature' AND s.condition = 'sae'
            AND list_contains($rules, s.metric)
    ),
    best AS (
        SELECT *
        FROM scored
        QUALIFY row_number() OVER (PARTITION BY feature ORDER BY value DESC NULLS LAST, metric) = 1
    ),
    peaks AS (
        SELECT c.feature, t.token_id AS peak_id
        FROM feature_contexts c
        JOIN tokens t ON t.run_id = c.run_id AND t.sequence_id = c.sequence_id AND t.position = c.position
        WHERE c.run_id = $run AND c.sae_id = $sae AND c.stratum = 0
        GROUP BY c.feature, t.token_id
        QUALIFY row_number() OVER (PARTITION BY c.feature ORDER BY count(*) DESC, t.token_id) = 1
    ),
    counted AS (
        SELECT b.*, count(*) OVER () AS scored, max(b."null") OVER () AS largest_null,
            count(*) OVER (PARTITION BY coalesce(p.peak_id, -1 - b.feature)) AS alike,
            row_number() OVER (
                PARTITION BY coalesce(p.peak_id, -1 - b.feature) ORDER BY b.value DESC NULLS LAST, b.feature
            ) AS among_alike
        FROM best b
        LEFT JOIN peaks p ON p.feature = b.feature
    ),
    labelled AS (
        SELECT feature, label, lift
        FROM feature_labels
        WHERE run_id = $run AND sae_id = $sae AND q < 0.05 AND lift > 1
        QUALIFY row_number() OVER (PARTITION BY feature ORDER BY lift DESC, label) = 1
    )
    SELECT b.feature, b.metric, b.value, b.ci_low, b.ci_high, b."null", b.n, f.active / f.tokens AS density, l.label, l.lift,
        f.raised_ids, b.scored, b.largest_null, b.alike
    FROM counted b
    JOIN features f ON f.run_id = $run AND f.sae_id = $sae AND f.feature = b.feature
    LEFT JOIN labelled l ON l.feature = b.feature
    WHERE b.among_alike = 1 OR NOT $distinct
    ORDER BY b.value DESC NULLS LAST, b.feature
    LIMIT $top
"""


_DISTINCT = (
    "Of latents whose examples peak most often on the same token, the best is shown alone (distinct=false shows all)."
)


@analysis(
    name="top_features",
    needs=("features", "feature_contexts", "sae_measures"),
    source="arXiv 2408.00657: interpretability as the Pearson correlation of predicted and real activation; here a table learned on "
    "other documents predicts in the place of a language model",
    section="features",
    order=22,
)
def top_features(
    run: Run,
    *,
    sae: str | None = None,
    top: Count = 20,
    rule: Rule = "any",
    examples: Count = 2,
    reach: Count = 10,
    distinct: bool = True,
) -> Result:
    """Which latents have a meaning that simple rules confirm on documents they have not seen, and what do they fire on?

    Latents are ranked by how well their activation on documents that a rule has not seen is predicted by it: the mean
    activation for the same token, the same token before, or the same label, on the other half of the documents. `value` is the
    Pearson correlation of predicted and real activation over all tokens, mean of both ways round; of the three rules that of
    the largest. Beside it the latent's examples of largest activation, each from another document, the peak between ⟦ and ⟧.

    Trap: this ranks what words and topics explain. A latent with a meaning that depends on more than that may stand low; one
    that fires on a single token stands high. Judge meanings by descriptions tested on text.

    Args:
        sae: name of the autoencoder; the newest of the run where not given.
        top: latents.
        rule: rank by this rule alone.
        examples: of each latent, a row each.
        reach: tokens of `text` on either side of the peak.
        distinct: of latents whose examples peak most often on the same token, show the best alone; `alike` counts them.

    Raises:
        InputError: no such autoencoder, or no latent fires often enough to be scored.

    Example:
        >>> import moescope as ms
        >>> ms.analyze(run, "top_features", top=5).df()[["feature", "text"]]  # doctest: +SKIP
    """
    chosen = chosen_sae(run, sae, table="feature_contexts")
    rules = [name for name in RULES if rule in ("any", name.removeprefix("predicted_by_"))]
    given = {"sae": chosen.sae_id, "rules": rules, "top": top, "distinct": distinct}
    frame = run.sql(_SQL, given).df()
    if frame.empty:
        raise InputError(
            f"no latent of {chosen.name} was scored on run {run.name!r}",
            expected="latents over 0 on 20 tokens or more of 4 documents or more",
            fix="read more documents (documents='all', --documents all), or a run with more text",
        )
    table = _table(run, chosen, frame, examples, reach)
    scored, null = int(frame["scored"].iloc[0]), float(frame["largest_null"].iloc[0])
    return Result(
        title=_title(frame, scored, null),
        table=table,
        draw=_draw,
        n=scored,
        n_unit="latents scored",
        definition="Pearson correlation over tokens between a latent's activation and what a rule learned on the other half of "
        "the documents predicts: its mean for the same token, token before, or label; the largest of the rules.",
        units={
            "value": "Pearson correlation",
            "null": "Pearson correlation",
            "density": "share of tokens",
            "lift": "ratio",
            "n": "tokens",
            "alike": "latents",
            "activation": "activation",
        },
        interval="95 % percentile bootstrap over the documents predicted, the rule held fixed",
        null="the same with the latent's activations moved along the corpus by a random number of tokens; with labels dealt out anew for "
        "the rule of labels",
        sql=_SQL,
        sql_parameters={"run": run.run_id, **given},
        notes=(
            *reading_notes(run, chosen),
            f"The largest correlation that any of the scored latents has under the null is {null:.2f}.",
            "In texts ⏎ stands for a line break.",
            *((_DISTINCT,) if distinct else ()),
        ),
    )


def _table(run: Run, chosen: Sae, frame: pd.DataFrame, examples: int, reach: int) -> pa.Table:
    vocabulary = pieces(run)
    found = windows(run, chosen, frame["feature"].tolist(), vocabulary, strata=0, ranks=examples)
    rows: list[dict[str, Any]] = [
        {
            "rank": rank, "feature": int(r["feature"]), "example": number, "metric": r["metric"], "value": r["value"],
            "ci_low": r["ci_low"], "ci_high": r["ci_high"], "null": r["null"], "n": int(r["n"]), "density": r["density"],
            "alike": int(r["alike"]),
            "label": None if pd.isna(r["label"]) else r["label"], "lift": r["lift"], "raises": words(r["raised_ids"], vocabulary, 5),
            "activation": w.value, **example_row(w, reach),
        }
        for rank, r in enumerate(frame.to_dict("records"), 1)
        for number, w in enumerate(found[int(r["feature"])], 1)
    ]  # fmt: skip
    numbers = ("rank", "feature", "example", "n", "alike", "peak")
    texts = ("text", "metric", "label", "raises", "tokens", "activations")
    kinds = {**dict.fromkeys(numbers, pa.int64()), **dict.fromkeys(texts, pa.string())}
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in rows[0]])
    return pa.Table.from_pandas(pd.DataFrame(rows), schema, preserve_index=False)


def _title(frame: pd.DataFrame, scored: int, null: float) -> str:
    best = frame.iloc[0]
    last = f"the {len(frame)}th shown of {scored:,} scored with {frame.iloc[-1]['value']:.2f} (at most {null:.2f} by chance)"
    return (
        f"Latent {int(best['feature'])} is explained best: {RULE_NAMES[best['metric']]} predicts it on other documents with "
        f"correlation {best['value']:.2f}; {last}"
    )


def _draw(result: Result) -> go.Figure:
    """The examples of every latent, line by line; its number, rule and correlation stand at the first of them."""
    import plotly.graph_objects as go

    frame = result.df()
    names = [
        f"{int(r.feature)} · {RULE_NAMES[str(r.metric)]} {float(r.value):.2f}" if int(r.example) == 1 else ""
        for r in frame.itertuples()
    ]
    figure = go.Figure()
    draw_examples(figure, frame, names, panel=False)
    figure.update_layout(height=190 + 21 * len(frame))
    return figure
