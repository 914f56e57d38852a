"""`moescope sae study`: from text to the features of an autoencoder, in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.flags import (
    BatchSize,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    InStore,
    Json,
    LabelField,
    MaxLength,
    Model,
    Report,
    Revision,
    Seed,
    SkipBad,
    TextField,
    Trust,
)
from moescope.cli.output import as_json, facts, news, printable, said
from moescope.cli.profile import check_report
from moescope.core.errors import InputError

_Site = Annotated[str, typer.Option(help="Where vectors are read: blocks.3.hook_mlp_out, ….", show_default=False)]
_Specs = Annotated[
    list[str],
    typer.Option(
        "--spec",
        help="What to train, form:setting=value,…: topk:d=4096,k=32. Several are trained in one pass over the vectors.",
    ),
]
_Name = Annotated[
    str, typer.Option(help="Name of the run, and of the autoencoders. What is there already is taken up again.")
]
_Tokens = Annotated[str | None, typer.Option(help="Tokens to record: 500k, 2M, …", show_default="the whole corpus")]
_Vectors = Annotated[
    int | None,
    typer.Option(min=1, help="Vectors to train on, repeats included.", show_default="every one once"),
]
_MaxNorm = Annotated[
    float | None,
    typer.Option(
        min=0, help="Leave out vectors of more than so many times the median norm.", show_default="none left out"
    ),
]
_Judged = Annotated[int, typer.Option(min=100, help="Held-out tokens that each autoencoder is judged on.")]


def study(
    model: Model,
    site: _Site,
    data: Data = None,
    store: InStore = Path("runs.duckdb"),
    name: _Name = "study",
    spec: _Specs = ["topk"],  # noqa: B006  typer reads it, nothing changes it
    tokens: _Tokens = None,
    vectors: _Vectors = None,
    max_norm_ratio: _MaxNorm = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    judged_tokens: _Judged = 20_000,
    report: Report = None,
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
    """Record vectors, train autoencoders, judge them, read their features, and join these to the experts that write them.

    Example: moescope sae study demo --site blocks.3.hook_mlp_out --spec topk:d=1024,k=16 --store runs.duckdb --report sae.html
    """
    from moescope.cli.sae.record import read_count
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.report.write import write_report
    from moescope.sae_study import study as perform
    from moescope.store.store import Store

    check_report(report)
    if not store.parent.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {store.parent}")
    wanted = None if tokens is None else read_count(tokens)
    if data is None:
        news("no --data: using the bundled labelled corpus")
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if dry_run:
        _plan(live, corpus, store, site, spec, wanted, batch_size, max_length, json=json)
        return
    with Store(store) as opened:
        done = perform(
            live, corpus, opened, site=site, specs=spec, name=name, tokens=wanted, vectors=vectors,
            max_norm_ratio=max_norm_ratio, batch_size=batch_size,
            max_length=max_length, judged_tokens=judged_tokens, seed=seed, progress=not json, tell=news,
        )  # fmt: skip
        if report is not None:
            write_report(done.run, report)
            news(f"saved {report}")
        rows = [dict(autoencoder.row) for autoencoder in done.autoencoders]
        answers = [result.as_json() for result in done.results] if json else []
        complete = done.run.complete
    _tell(rows, answers, done.results, json=json)
    if not complete:
        news("the run is incomplete: the view gaps of the store tells what is missing (SELECT * FROM gaps)")
        raise typer.Exit(3)


def _plan(
    live: Any,
    corpus: Any,
    store: Path,
    site: str,
    spec: list[str],
    tokens: int | None,
    batch_size: int,
    max_length: int,
    *,
    json: bool,
) -> None:
    """What would be recorded, which is most of the work, and what would be trained on it."""
    from moescope.cli.sae.record import shown_plan
    from moescope.sae.recording import plan_vectors
    from moescope.sae.training.specs import SaeSpec

    specs = [str(SaeSpec.parse(text)) for text in spec]
    plan = plan_vectors(
        live, corpus, store, sites=[site], tokens=tokens, batch_size=batch_size, max_length=max_length, trial=True
    )
    as_json({**plan.as_json(), "specs": specs}) if json else facts(
        {**shown_plan(plan, live), "trained": "; ".join(specs)}
    )


def _tell(rows: list[dict[str, Any]], answers: list[Any], results: Any, *, json: bool) -> None:
    """The autoencoders as a table, and each finding as a line."""
    from moescope.cli.sae.train import show_saes

    if json:
        as_json({"autoencoders": rows, "results": answers})
        return
    show_saes(rows)
    for result in results:
        said(f"\n{printable(result.title)}\n{printable(result.subtitle())}")
        facts({k: v for k, v in result.facts().items() if k in ("Sample", "Interval", "Chance level", "Notes")})
