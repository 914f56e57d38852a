"""`moescope phenomena`: massive activations, sinks, super experts and retrieval heads of a model, and what each cut leaves."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    BatchSize,
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
)
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.profile import check_report
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result
    from moescope.probes.live_model import LiveModel
    from moescope.probes.phenomena.protocol import Asked

Name = Annotated[str | None, typer.Option(help="Name of the run.", show_default="phenomena, numbered")]
Texts = Annotated[int, typer.Option(min=2, help="Documents, spread evenly over the corpus.")]
MaxLength = Annotated[int, typer.Option(min=8, help="Tokens of each document at most.")]
CutTexts = Annotated[int, typer.Option(min=2, help="How many of the documents are run under every cut.")]
Controls = Annotated[int, typer.Option(min=1, help="Random cuts beside each.")]
Needles = Annotated[bool, typer.Option("--needles/--no-needles", help="Search for retrieval heads with needle trials.")]
FullGrid = Annotated[
    bool, typer.Option("--full-grid", help="The whole needle grid: 20 lengths × 10 depths × 3 needles.")
]
Trials = Annotated[
    int | None,
    typer.Option(min=1, help="Needle trials.", show_default="about 12 of at most 2,048 tokens"),
]
Generate = Annotated[
    int, typer.Option(min=0, help="Tokens written after each prompt under the writer's cut, for repetition.")
]


def phenomena(
    model: Model,
    data: Data = None,
    store: StorePath = Path("runs.duckdb"),
    name: Name = None,
    report: Report = None,
    texts: Texts = 16,
    max_length: MaxLength = 128,
    batch_size: BatchSize = 4,
    cut_texts: CutTexts = 8,
    controls: Controls = 5,
    needles: Needles = True,
    full_grid: FullGrid = False,
    trials: Trials = None,
    generate: Generate = 24,
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
    """Find massive activations, attention sinks, super experts and retrieval heads, and cut each link between them.

    Example: moescope phenomena demo --store runs.duckdb --report phenomena.html
    """
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.probes.phenomena.protocol import Asked

    check_report(report)
    if not store.parent.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {store.parent}")
    asked = Asked(texts, max_length, batch_size, cut_texts, controls, needles, full_grid, trials, generate, seed)
    asked.check()
    if data is None:
        news("no --data: using the bundled labelled corpus")
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    corpus.facts()
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if dry_run:
        _plan(live, None if data is None else corpus, asked, store, json=json)
        return
    _run(live, None if data is None else corpus, asked, store, name, report, json=json)


def _plan(live: LiveModel, corpus: Any, asked: Asked, store: Path, *, json: bool) -> None:
    """Say what would be done, and what it would take."""
    from moescope.probes.phenomena.protocol import prepared, trial_shape

    ready = prepared(live, corpus, asked)
    told: dict[str, Any] = {
        "model": repr(live),
        "store": str(store),
        "texts": ready.corpus.facts().documents,
        "needle trials": trial_shape(ready.prompts),
        **{step: f"about {tokens:,} tokens, {seconds:.0f} s" for step, (tokens, seconds) in ready.cost.steps.items()},
        "seconds": round(ready.cost.seconds),
    }
    if ready.notes:
        told["left out"] = " ".join(ready.notes)
    as_json(told) if json else facts(told)


def _run(
    live: LiveModel, corpus: Any, asked: Asked, store: Path, name: str | None, report: Path | None, *, json: bool
) -> None:
    from moescope.phenomena_api import phenomena as find
    from moescope.report.write import write_report
    from moescope.store.store import Store

    with Store(store) as opened:
        result = find(
            live, corpus, opened, name=name, texts=asked.texts, max_length=asked.max_length, batch_size=asked.batch_size,
            cut_texts=asked.cut_texts, controls=asked.controls, needles=asked.needles, full_grid=asked.full_grid,
            trials=asked.trials, generate=asked.generate, seed=asked.seed, progress=not json, tell=news,
        )  # fmt: skip
        run = opened.run(str(result.provenance["run"]))
        if report is not None:
            write_report(run, report)
            news(f"saved {report}")
        complete = run.complete
    as_json(result.as_json()) if json else _print(result)
    if not complete:
        news("the run is incomplete: the view gaps of the store tells what is missing (SELECT * FROM gaps)")
        raise typer.Exit(3)


def _print(result: Result) -> None:
    """The finding, nodes and cuts as tables, and what a reader must know."""
    frame = result.df()
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    nodes = frame[frame["cut"].isna()]
    table(
        ["node", "found", "number", "what"],
        [[r.node, r.what, _number(r.value), r.metric] for r in nodes.itertuples()],
    )
    cuts = frame[frame["cut"].notna() & frame["layer"].isna()]
    if len(cuts):
        said("")
        table(
            ["link cut", "measured", "value", "95 % interval", "random cuts", "their range"],
            [
                [
                    r.node,
                    r.metric,
                    _number(r.value),
                    _span(r.ci_low, r.ci_high),
                    _number(r.null),
                    _span(r.null_low, r.null_high),
                ]
                for r in cuts.itertuples()
            ],
        )
    said("")
    facts(result.facts())


def _number(value: Any) -> str:
    return f"{value:,.4g}" if math.isfinite(value) else "—"


def _span(low: Any, high: Any) -> str:
    return f"{low:,.3g} to {high:,.3g}" if math.isfinite(low) and math.isfinite(high) else "—"
