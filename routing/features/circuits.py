"""Head circuits from discrete codes: which heads, what the task loses without them, and what it keeps with them alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from moescope.core.analysis import Count, Natural, analysis
from moescope.core.errors import InputError
from moescope.core.result import Result
from moescope.core.statistics import benjamini_hochberg, document_weights
from moescope.routing.features.circuit_cuts import CUT, KEEP, logit_differences
from moescope.routing.features.circuit_figure import draw_circuit
from moescope.routing.phenomena.head_records import head_name
from moescope.store.run import Run

Floats = NDArray[np.float64]
_RATE = 0.05  # false-discovery rate of the note
_TASKS_SQL = """
    SELECT DISTINCT condition
    FROM heads
    WHERE run_id = ? AND metric = 'circuit_codes'
    ORDER BY condition
"""
_HEADS_SQL = """
    SELECT layer, block, head, metric, value, n
    FROM heads
    WHERE run_id = $run AND condition = $task AND starts_with(metric, 'circuit_')
    ORDER BY layer, block, head, metric
"""
_COLUMNS = (
    "layer", "block", "head", "metric", "condition", "value", "ci_low", "ci_high", "null", "null_low", "null_high", "p", "score",
    "member", "known", "n",
)  # fmt: skip


@analysis(
    name="head_circuit",
    needs=("heads",),
    source="O'Neill and Bui, arXiv 2405.12522",
    section="features",
    order=90,
)
def head_circuit(
    run: Run, *, task: str | None = None, known_from: float = 0.3, draws: Count = 1000, seed: Natural = 0
) -> Result:
    """Which heads does a task need, by codes of their outputs that only its prompts have, and does it need them?

    A head's code on a prompt is the largest latent of one small autoencoder over the outputs of all heads at the last token. Its
    count is that of distinct codes that only positive prompts have, |C⁺∖C⁻|; beside it stands the mean count with the prompts' sides
    shuffled, since heads of varied outputs have many codes on any side. `score` is the softmax over heads of count ÷ positives.

    Confirmation is the difference of logits between right and wrong answers on other prompts, with heads at their mean over the
    negatives: the circuit's (`lost` is how much of base − all heads at their mean goes), or all others (`recovered` is how much of it
    stays), against random heads, as many in each layer.

    Args:
        task: the condition of its rows; None for the run's first.
        known_from: from which value on a head counts as known to be of the circuit, where the run tells (induction: share of
            attention).
        draws: bootstrap resamples.
        seed: of resampling.

    Example:
        >>> import tempfile, pathlib
        >>> import moescope as ms
        >>> from moescope.sae.circuits.circuit import head_circuit
        >>> with ms.Store(pathlib.Path(tempfile.mkdtemp()) / "runs.duckdb") as store:
        ...     found = head_circuit(ms.load("demo"), store, task="induction", examples=4, test_prompts=4, steps=5, size=2, controls=2,
        ...                          progress=False)
        ...     int(ms.analyze(found.run, "head_circuit").df()["member"].sum())
        2
    """
    tasks = [str(name) for (name,) in run.store.fetch(_TASKS_SQL, [run.run_id])]
    if not tasks or (task is not None and task not in tasks):
        raise InputError(
            f"run {run.name!r} has no circuit" + (f" of {task!r}" if task is not None else ""),
            expected=f"parameter task among {', '.join(tasks)}" if tasks else None,
            fix="find one: moescope sae circuit MODEL, or ms.sae.head_circuit",
        )
    asked = {"task": task or tasks[0]}
    heads = _heads(run.sql(_HEADS_SQL, asked).df())
    differences = logit_differences(run, draws=draws, seed=seed)
    parts = [heads, *([] if differences is None else [differences])]
    agreement = _agreement(heads, known_from, draws, seed)
    parts += [agreement] if agreement is not None else []
    frame = pd.concat(parts, ignore_index=True).reindex(columns=list(_COLUMNS))
    for name, kind in (("layer", "Int64"), ("head", "Int64"), ("n", "Int64"), ("member", "boolean")):
        frame[name] = frame[name].astype(kind)
    summary = run.info["summary"]
    return Result(
        title=_title(asked["task"], heads, differences),
        table=pa.Table.from_pandas(frame, preserve_index=False),
        draw=draw_circuit,
        n=int(heads["n"].max()),
        n_unit="prompts, positive and negative",
        definition="codes: distinct latents that are a head's largest on positive prompts and on no negative one, |C⁺∖C⁻|. "
        "logit difference: log-sum-exp of right answers' logits less that of wrong ones', on other prompts, with heads at their mean "
        "over the negatives. lost = (base − circuit at mean) ÷ (base − all at mean); recovered = (all others at mean − all at mean) ÷ "
        "(base − all at mean). AUC, precision, recall: of counts, and of the circuit, against heads known otherwise.",
        units={
            "value[codes]": "codes",
            "value[logit difference]": "logits",
            "value[lost]": "share",
            "value[recovered]": "share",
            "n": "prompts",
        },
        interval=f"95 % percentile bootstrap over held-out prompts (AUC, precision and recall: over heads), {draws} resamples",
        null="codes: mean count with the prompts' sides shuffled, p the share of shuffles that reach the count; logit differences, "
        "lost and recovered: mean over random sets of as many heads in each layer (other heads; any, where the others are too few), "
        "null_low and null_high their range; AUC: 0.5; "
        "precision: share of heads that are known; recall: share that is of the circuit",
        sql=_HEADS_SQL,
        sql_parameters={"run": run.run_id, **asked},
        computation="ratios of sums over prompts, bootstrap",
        notes=_notes(asked["task"], tasks, heads, differences, agreement, summary),
    )


def _heads(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a head."""
    keys = ["layer", "block", "head"]
    wide = rows.pivot_table(index=keys, columns="metric", values="value", aggfunc="last").reset_index()
    counted = rows.groupby(keys, as_index=False)["n"].max()
    found = wide.merge(counted, on=keys)
    missing = pd.Series(np.nan, index=found.index)
    return pd.DataFrame(
        {
            **{key: found[key] for key in keys}, "metric": "codes", "value": found["circuit_codes"],
            "null": found.get("circuit_codes_null", missing), "p": found.get("circuit_p", missing),
            "score": found.get("circuit_score", missing), "known": found.get("circuit_known", missing),
            "member": found["circuit_member"] > 0 if "circuit_member" in found else False, "n": found["n"],
        }
    )  # fmt: skip


def _agreement(heads: pd.DataFrame, known_from: float, draws: int, seed: int) -> pd.DataFrame | None:
    """AUC of counts, precision and recall of the circuit, against heads that are known otherwise; None where none is."""
    told = heads[heads["known"].notna()]
    truth = (told["known"] >= known_from).to_numpy()
    if not truth.any() or truth.all():
        return None
    counts, member = told["value"].to_numpy(np.float64), told["member"].to_numpy(bool)
    weights = document_weights(len(told), draws=draws, seed=seed).astype(np.float64)
    whole = np.ones((1, len(told)))
    rows = []
    measures: tuple[tuple[str, Callable[[Floats], Floats], float], ...] = (
        ("AUC", lambda w: _auc(counts, truth, w), 0.5),
        ("precision", lambda w: _share(w, member & truth, member), float(truth.mean())),
        ("recall", lambda w: _share(w, member & truth, truth), float(member.mean())),
    )
    for metric, of, null in measures:
        value, spread = float(of(whole)[0]), of(weights)
        finite = spread[np.isfinite(spread)]
        low, high = np.quantile(finite, [0.025, 0.975]) if len(finite) else (np.nan, np.nan)
        rows.append({"metric": metric, "value": value, "ci_low": low, "ci_high": high, "null": null, "n": len(told)})
    return pd.DataFrame(rows)


def _auc(counts: Floats, truth: NDArray[np.bool_], weights: Floats) -> Floats:
    """[draw] chance that a known head's count is over another's, ties half."""
    over = np.sign(counts[truth][:, None] - counts[~truth][None]) / 2 + 0.5
    yes, no = weights[:, truth], weights[:, ~truth]
    pairs = yes.sum(1) * no.sum(1)
    found: Floats = np.divide(((yes @ over) * no).sum(1), pairs, out=np.full(len(weights), np.nan), where=pairs > 0)
    return found


def _share(weights: Floats, part: NDArray[np.bool_], whole: NDArray[np.bool_]) -> Floats:
    below = weights @ whole
    found: Floats = np.divide(weights @ part, below, out=np.full(len(weights), np.nan), where=below > 0)
    return found


def _title(task: str, heads: pd.DataFrame, differences: pd.DataFrame | None) -> str:
    members = heads[heads["member"]].sort_values(
        ["value", "layer", "head"], ascending=[False, True, True], kind="stable"
    )
    if members.empty:
        best = heads.sort_values("value", ascending=False, kind="stable").iloc[0]
        return (
            f"No head has more codes of its own on {task} than shuffled prompts give it: {_head(best)} has most, "
            f"{best['value']:.0f}, shuffled {best['null']:.1f}"
        )
    named = ", ".join(f"{_head(row)} {row['value']:.0f}" for _, row in members.head(3).iterrows())
    text = f"{task}: {len(members)} of {len(heads)} heads are of the circuit (codes of their own: {named})"
    if differences is None:
        return text
    found = differences.set_index(["metric", "condition"])
    base, cut = found.loc[("logit difference", "base")], found.loc[("logit difference", CUT)]
    text += (
        f"; with them at their mean the logit difference goes from {base['value']:.2f} to {cut['value']:.2f} "
        f"[{cut['ci_low']:.2f}, {cut['ci_high']:.2f}], with random heads to {cut['null']:.2f}"
    )
    if ("recovered", KEEP) in found.index:
        kept = found.loc[("recovered", KEEP)]
        span = f"[{kept['ci_low']:.0%}, {kept['ci_high']:.0%}]"
        text += f"; alone they keep {kept['value']:.0%} {span} of it, random heads {kept['null']:.0%}"
    return text.replace("-", "−")


def _head(row: pd.Series) -> str:
    return head_name(int(row["layer"]), str(row["block"]), int(row["head"]))


def _notes(
    task: str,
    tasks: Sequence[str],
    heads: pd.DataFrame,
    differences: pd.DataFrame | None,
    agreement: pd.DataFrame | None,
    summary: dict[str, Any],
) -> tuple[str, ...]:
    called = int((benjamini_hochberg(heads["p"].fillna(1.0).to_numpy(np.float64)) <= _RATE).sum())
    notes = [
        f"{called} of {len(heads)} heads have more codes of their own than with shuffled sides, at a false-discovery rate of {_RATE:.0%}.",
        "Codes are read at the last token: heads that work at earlier ones cannot be seen by them.",
    ]
    if isinstance(summary.get("active_of_codes"), (int, float)):
        notes.append(
            f"The autoencoder over head outputs leaves {summary['fvu_of_codes']:.1%} of their variance, with "
            f"{summary['active_of_codes']:.1f} latents over 0 on average."
        )
    if differences is None:
        notes.append("No cut was measured: no head, or every head, is of the circuit.")
    elif "lost" not in set(differences["metric"]):
        notes.append(
            "All heads at their mean do not lower the logit difference beyond doubt: there is nothing to lose a share of."
        )
    if agreement is None and heads["known"].notna().any():
        notes.append("No head, or every head, is known otherwise at this known_from: nothing to compare with.")
    if len(tasks) > 1:
        notes.append(f"This run has other tasks too: {', '.join(name for name in tasks if name != task)}.")
    return tuple(notes)
