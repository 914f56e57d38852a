"""`moescope sae students`: a dense MLP seen as a sparse mixture of experts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.completion import run_names
from moescope.cli.flags import (
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Json,
    LabelField,
    Model,
    Report,
    Revision,
    Seed,
    SkipBad,
    StorePath,
    TextField,
    Trust,
    UseSae,
)
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.profile import check_report
from moescope.cli.sae.asked import tell_plan
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result

_Layer = Annotated[int, typer.Option(min=0, help="Layer of the MLP.", show_default=False)]
_Block = Annotated[str, typer.Option(help="Sublayer of the MLP: mlp, attn, mlp.1, ….")]
_Run = Annotated[
    str | None,
    typer.Option("--run", help="A run whose tokens to use.", show_default="record --data", autocompletion=run_names),
]
_Active = Annotated[str, typer.Option(help="Neurons at work on a token, comma-separated.")]
_Experts = Annotated[int, typer.Option(min=1, help="Single-neuron experts to choose from.")]
_Rank = Annotated[int, typer.Option(min=1, help="Rank of the low-rank router.")]
_Vectors = Annotated[int, typer.Option(min=64, help="Pairs of input and output.")]
_Steps = Annotated[int, typer.Option(min=1, help="Steps of training of each student.")]
_Rates = Annotated[str, typer.Option("--lrs", help="Learning rates to try, comma-separated.")]
_Seeds = Annotated[int, typer.Option(min=1, help="Students of each kind.")]


def students(
    model: Model,
    layer: _Layer,
    block: _Block = "mlp",
    data: Data = None,
    run: _Run = None,
    store: StorePath = Path("runs.duckdb"),
    report: Report = None,
    active: _Active = "16,64",
    experts: _Experts = 512,
    router_rank: _Rank = 32,
    vectors: _Vectors = 16_384,
    steps: _Steps = 400,
    lrs: _Rates = "3e-3,1e-2",
    seeds: _Seeds = 1,
    sae: UseSae = None,
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
    """Train students of an MLP, dense ones and mixtures of single-neuron experts, on real inputs and on Gaussian ones like them.

    Example: moescope sae students demo --layer 5 --store runs.duckdb
    """
    from moescope.analysis_api import analyze
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.report.write import write_report
    from moescope.sae.loading import load_autoencoder
    from moescope.sae.students.study import mlp_students
    from moescope.store.store import Store

    check_report(report)
    if run is not None and data is not None:
        raise InputError("tokens come from a run or from a corpus", found="--run and --data", fix="give one of them")
    if not store.parent.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {store.parent}")
    neurons, rates = _numbers("--active", active, int), _numbers("--lrs", lrs, float)
    corpus = (
        None
        if run is not None
        else Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    )
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if dry_run:
        told = {
            "layer": layer,
            "block": block,
            "active": neurons,
            "learning rates": rates,
            "steps": steps,
            "seeds": seeds,
        }
        tell_plan(store, run=run, any_run=run is None, saes=[] if sae is None else [sae], model=live, json=json, **told)
        return
    with Store(store) as opened:
        given: Any = corpus if run is None else opened.run(run)
        found = mlp_students(
            live, given, opened, layer=layer, block=block, active=neurons, experts=experts, router_rank=router_rank,
            vectors=vectors, steps=steps, lrs=rates, seeds=seeds, seed=seed, progress=not json,
            sae=None if sae is None else load_autoencoder(opened, sae, model=live),
        )  # fmt: skip
        result = analyze(found.run, "mlp_students", layer=layer, block=block)
        if report is not None:
            write_report(found.run, report)
            news(f"saved {report}")
    as_json(result.as_json()) if json else _print(result)


def _numbers(flag: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{flag} cannot be {text!r}", expected="numbers, comma-separated") from None


def _print(result: Result) -> None:
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    frame = result.df().astype({"experts": object, "router_rank": object})
    table(
        ["student", "inputs", "active", "share", "metric", "value", "95 % interval", "control"],
        [
            [
                _student(r.student, r.experts, r.router_rank), r.inputs, int(r.active), f"{r.share:.1%}", r.metric, f"{r.value:.3f}",
                f"{r.ci_low:.3f} to {r.ci_high:.3f}" if math.isfinite(r.ci_low) else "—",
                f"{r.null:.3f}" if math.isfinite(r.null) else "—",
            ]
            for r in frame.itertuples()
        ],
    )  # fmt: skip
    said("")
    facts(result.facts())


def _student(student: str, experts: Any, rank: Any) -> str:
    if student != "moe":
        return student
    return f"mixture of {int(experts)}" + (f", router of rank {int(rank)}" if isinstance(rank, int) else "")
