"""`moescope sae judge`: autoencoders by the field's measures, beside controls."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import autoencoder_names, run_names
from moescope.cli.flags import (
    Data,
    Device,
    DeviceMap,
    Documents,
    DryRun,
    Dtype,
    InStore,
    Json,
    LabelField,
    Revision,
    Seed,
    SkipBad,
    TextField,
    Trust,
    UseModel,
)
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.sae.asked import check_documents, tell_plan
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from moescope.core.result import Result

_Sae = Annotated[
    list[str],
    typer.Option(
        "--sae",
        help="Name of an autoencoder of the store, repeatable.",
        show_default=False,
        autocompletion=autoencoder_names,
    ),
]
_Run = Annotated[
    str | None,
    typer.Option(
        "--run", help="The run to judge on.", show_default="the one it was trained on", autocompletion=run_names
    ),
]
_Tokens = Annotated[int, typer.Option(min=1, help="Vectors judged at most, and as many again to fit controls on.")]
_Live = Annotated[int, typer.Option(min=1, help="Tokens that the model runs over with each reconstruction, at most.")]
_Ablations = Annotated[
    int, typer.Option(min=0, help="Tokens at which up to four latents are taken out one at a time; 0 for none.")
]
_Controls = Annotated[int, typer.Option(min=1, help="Draws of the random controls.")]
_Skip = Annotated[
    int | None,
    typer.Option(min=0, help="First tokens of each sequence that do not count.", show_default="as in training"),
]
_Force = Annotated[bool, typer.Option("--force", help="Judge it on another model than it was trained for.")]
_SHOWN = (
    "fvu", "delta_ce", "kl", "flips", "loss_recovered_zero", "loss_recovered_mean", "cosine", "l0", "dead_share", "dense_share",
    "max_cosine", "probe_loss", "probe_auc", "absorption", "splitting", "ablation_sparsity",
)  # fmt: skip


def judge(
    sae: _Sae,
    store: InStore = Path("runs.duckdb"),
    model: UseModel = None,
    run: _Run = None,
    data: Data = None,
    tokens: _Tokens = 20_000,
    live_tokens: _Live = 4_096,
    ablations: _Ablations = 32,
    controls: _Controls = 5,
    documents: Documents = "held_out",
    skip_first: _Skip = None,
    force: _Force = False,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    skip_bad_lines: SkipBad = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Measure how well autoencoders write vectors again, and what a model loses by it, beside PCA and random controls.

    Example: moescope sae judge --store runs.duckdb --sae topk-512 --model demo
    """
    from moescope.analysis_api import analyze
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.sae.judging.judge import judge as measure
    from moescope.sae.loading import load_autoencoder
    from moescope.store.store import Store

    check_store(store)
    if run is not None and data is not None:
        raise InputError("a run and a corpus both say what to judge on", fix="give --run or --data, not both")
    check_documents(documents)
    corpus = (
        None
        if data is None
        else Corpus.load(data, text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    )
    live = None
    if model is not None:
        live = load(
            model,
            device=device,
            device_map=device_map,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if dry_run:
        tell_plan(store, run=run, any_run=True, saes=sae, model=live, tokens=tokens, json=json)
        return
    with Store(store) as opened:
        asked = [load_autoencoder(opened, name, device="cpu" if live is None else live.device) for name in sae]
        answers = []
        for autoencoder in asked:
            found = measure(
                autoencoder, live, opened, run=run, corpus=corpus, tokens=tokens, live_tokens=live_tokens,
                ablations=ablations, controls=controls, held_out=documents == "held_out", skip_first=skip_first, force=force, seed=seed,
                progress=not json,
            )  # fmt: skip
            answer = analyze(found.run, "sae_quality", allow_incomplete=True, sae=found.sae_id)
            answers.append((answer, found.notes))
    if json:
        as_json([{**answer.as_json(), "notes": [*answer.notes, *notes]} for answer, notes in answers])
        return
    for answer, notes in answers:
        _print(answer)
        for note in notes:
            news(note)


def _print(result: Result) -> None:
    """The finding, and each measure of the autoencoder beside what its controls give."""
    frame = result.df()
    frame = frame[frame["group_kind"] == "all"]
    conditions = [
        name
        for name in ("pca_topk", "pca", "random_decoder", "random_direction", "shuffled", "mean", "zero")
        if _has(frame, name)
    ]
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    rows = []
    for metric in _SHOWN:
        part = frame[frame["metric"] == metric].set_index("condition")
        if "sae" in part.index:
            own = part.loc["sae"]
            span = _span(own["ci_low"], own["ci_high"])
            others = [_number(part["value"].get(name)) for name in conditions]
            rows.append([metric, _number(own["value"]), span, *others, str(own["unit"])])
    table(["measure", "autoencoder", "95 % interval", *conditions, "unit"], rows)
    said("")
    facts({name: text for name, text in result.facts().items() if name in ("Sample", "Interval", "Notes")})


def _has(frame: pd.DataFrame, condition: str) -> bool:
    return bool((frame["condition"] == condition).any())


def _number(value: Any) -> str:
    return "—" if value is None or not math.isfinite(value) else f"{value:,.4g}"


def _span(low: Any, high: Any) -> str:
    known = all(bound is not None and math.isfinite(bound) for bound in (low, high))
    return f"{low:,.3g} to {high:,.3g}" if known else "—"
