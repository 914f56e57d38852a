"""`moescope profile`: run a corpus through a model, keep what happens, write a report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    RECORDING,
    SIZE,
    BatchSize,
    Budget,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Generate,
    Json,
    LabelField,
    MaxLength,
    Model,
    Name,
    Padding,
    Probe,
    RayAddress,
    Report,
    Resume,
    Revision,
    Sample,
    Seed,
    Sites,
    SkipBad,
    StorePath,
    TextField,
    Trust,
    Workers,
    listed,
)
from moescope.cli.output import as_json, facts, news
from moescope.cli.report import Thresholds, tell_unfinished, tell_verdicts
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.probes.corpus import Corpus
    from moescope.probes.live_model import LiveModel
    from moescope.probes.recording import Recording
    from moescope.store.run import Run
    from moescope.store.store import Store

RecordedUnder = Annotated[
    Path | None,
    typer.Option(
        "--intervention",
        rich_help_panel=RECORDING,
        help="Record the model under this saved intervention (moescope intervene effect --save-intervention writes one).",
        show_default=False,
    ),
]
TimePlain = Annotated[
    bool,
    typer.Option("--time-plain", rich_help_panel=SIZE, help="Also time plain forward passes over the same batches."),
]


def profile(
    model: Model,
    data: Data = None,
    store: StorePath = Path("runs.duckdb"),
    name: Name = None,
    report: Report = None,
    thresholds: Thresholds = None,
    probe: Probe = None,
    site: Sites = None,
    sample: Sample = 1.0,
    intervention: RecordedUnder = None,
    generate: Generate = 0,
    budget: Budget = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    padding: Padding = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    skip_bad_lines: SkipBad = False,
    seed: Seed = 0,
    resume: Resume = False,
    workers: Workers = 1,
    ray_address: RayAddress = None,
    time_plain: TimePlain = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Run a corpus through a model and keep what happens inside.

    Example: moescope profile demo --store runs.duckdb --name base --report report.html
    """
    from moescope.core.site_names import read_site
    from moescope.probes.choices import check_sizes, chosen_probes, longest
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.probes.plan_budget import read_bytes
    from moescope.store.store import Store

    check_report(report)
    check_thresholds(thresholds)
    check_sizes(batch_size, max_length, generate, sample, padding)
    budget = None if budget is None else str(read_bytes(budget))
    if time_plain and generate:
        raise InputError(
            "--time-plain compares passes over texts, and a continued text takes many more",
            fix="leave out --time-plain or --generate",
        )
    shared_out = workers > 1 or ray_address is not None
    if shared_out and (resume or time_plain or budget):
        alone = "resume" if resume else "time-plain" if time_plain else "budget"
        raise InputError(
            f"--{alone} is for one recording, and --workers makes many small ones",
            fix="leave out one of them",
        )
    edits = _read_intervention(intervention, alone=not shared_out and budget is None and not time_plain)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    found = corpus.facts()
    if data is None:
        news(f"no --data: using the bundled labelled corpus of {found.documents} documents")
    names = listed(probe) or None
    sites = listed(site)
    run_name = _checked_name(store, name, model, read_only=dry_run, resume=resume)
    load_options: dict[str, Any] = {
        "device": device,
        "device_map": device_map,
        "dtype": dtype,
        "revision": revision,
        "trust_remote_code": trust_remote_code,
    }
    options: dict[str, Any] = {
        "name": run_name,
        "probes": names,
        "sites": sites,
        "sample": sample,
        "generate": generate,
        "batch_size": batch_size,
        "max_length": max_length,
        "padding": padding,
        "seed": seed,
        **({} if edits is None else {"intervention": edits}),
    }
    if shared_out and not dry_run:
        from moescope.probes.workers.record_with_workers import record_with_workers

        with Store(store) as opened:
            run = record_with_workers(
                model,
                corpus,
                opened,
                workers=workers,
                ray_address=ray_address,
                load_options=load_options,
                progress=not json,
                **options,
            )
            _tell(run, store, report, thresholds, None, json=json)
        return
    live = load(model, **load_options)
    read = [read_site(s, live.anatomy) for s in sites]
    chosen, left_out = chosen_probes(live, names, read)
    if dry_run:
        if edits is not None:
            _check_edits(live, edits, store)
        plan = {
            "model": repr(live),
            **({} if edits is None else {"intervention": repr(edits)}),
            "run": run_name,
            "store": str(store),
            "probes": ", ".join(entry.name for entry in chosen),
            "left out": "; ".join(f"{name}: {reason}" for name, reason in left_out.items()),
            "sites": ", ".join(map(str, read)),
            "longest sequence": longest(live, max_length, generate),
            "generate": generate,
            "corpus": corpus.name,
            "documents": found.documents,
            "characters": found.characters,
            "labels": len(found.labels),
            "skipped": found.skipped,
            **({"workers": workers} if shared_out else {}),
        }
        as_json(plan) if json else facts(plan)
        return
    with Store(store) as opened:
        recording = _recording(live, corpus, opened, options, budget=budget, resume=resume, progress=not json)
        before = _plain_seconds(recording) if time_plain else 0.0
        run = recording.run(progress=not json)
        after = _plain_seconds(recording) if time_plain else 0.0
        _tell(run, store, report, thresholds, (before + after) / 2 if time_plain else None, json=json)


def _read_intervention(path: Path | None, *, alone: bool) -> Intervention | None:
    """The saved intervention, if there is one; what cannot be recorded under one is refused."""
    if path is None:
        return None
    if not alone:
        raise InputError(
            "--intervention is for one plain recording",
            fix="leave out --workers, --ray-address, --budget and --time-plain",
        )
    from moescope.core.intervention import Intervention

    return Intervention.load(path)


def _check_edits(live: LiveModel, edits: Intervention, path: Path) -> None:
    from moescope.probes.edits.checks import check_intervention
    from moescope.probes.effects.sources import sources_of
    from moescope.store.store import Store

    if not path.exists():
        check_intervention(live, edits)
        return
    with Store(path, read_only=True) as store:
        check_intervention(live, edits, sources=sources_of(edits, store))


def _recording(
    live: LiveModel,
    corpus: Corpus,
    store: Store,
    options: dict[str, Any],
    *,
    budget: str | None,
    resume: bool,
    progress: bool,
) -> Recording:
    """The recording, within its budget where there is one."""
    from moescope.probes.recording import Recording

    planned = None
    if budget is not None:
        from moescope.probes.budgeted import budgeted

        name, asked = options["name"], {key: value for key, value in options.items() if key != "name"}
        kept, planned = budgeted(
            live, corpus, store, name=name, budget=budget, resume=resume, progress=progress, asked=asked
        )
        options = {**options, **kept}
    return Recording(live, corpus, store, resume=resume, planned=planned, **options)


def _tell(
    run: Run, store: Path, report: Path | None, thresholds: Path | None, plain_seconds: float | None, *, json: bool
) -> None:
    """Say what was recorded, write the report, judge the thresholds; leave with 3 where something is missing."""
    summary = _summary(run, plain_seconds)
    if report is not None:
        from moescope.report.write import write_report

        with stages("reporting") as tell:
            summary["report"] = str(write_report(run, report, thresholds=thresholds, tell=tell))
    summary["store"] = str(store)
    code = unfinished = 0
    if thresholds is not None:
        from moescope.report.thresholds.judging import exit_code, judge
        from moescope.report.thresholds.rules import read_rules

        verdicts = judge(read_rules(thresholds), [run])
        code = exit_code(verdicts)
        unfinished = tell_unfinished([], verdicts)
        if json:
            summary["thresholds"] = [one.data() for one in verdicts]
        else:
            tell_verdicts(verdicts)
    as_json(summary) if json else facts(summary)
    if not run.complete:
        _tell_gaps(run)
    if code or unfinished or not run.complete:
        raise typer.Exit(code or 3)


def _plain_seconds(recording: Recording) -> float:
    from moescope.probes.forward import time_plain

    return time_plain(recording.model, recording.plan, side=recording.side)


def _summary(run: Run, plain_seconds: float | None) -> dict[str, Any]:
    info, summary = run.info, run.info["summary"]
    sites = run.coverage.table.column("status").to_pylist()
    shown: dict[str, Any] = {
        "run": run.name,
        "status": info["status"],
        "coverage": f"{sites.count('complete')} of {len(sites)} sites full",
        "tokens": summary["tokens"],
        "profile tokens/s": round(summary["tokens_per_second"]),
    }
    if summary.get("workers"):
        shown["workers"] = summary["workers"]
    if summary["generated_tokens"]:
        shown["generated"] = f"{summary['generated_tokens']:,} of these tokens"
    if summary.get("near_ties"):
        shown["near ties"] = (
            f"{summary['near_ties']:,} decisions by a margin under 1e-4, which another batch size may take differently"
        )
    if planned := summary.get("planned"):
        actual = summary["actual"]
        shown["disk"] = f"{actual['bytes']:,} bytes; planned {planned['bytes']:,}"
        shown["time"] = f"{actual['seconds']:.1f} s; planned {planned['seconds']:.1f} s"
    shown |= {f"without {name}": reason for name, reason in (summary.get("left_out") or {}).items()}
    if plain_seconds is not None:
        plain = summary["tokens"] / plain_seconds
        shown |= {
            "plain forward tokens/s": round(plain),
            "profile ÷ plain": f"{summary['tokens_per_second'] / plain:.2f}",
        }
    if summary["split_documents"]:
        shown["split"] = (
            f"{summary['split_documents']} documents were longer than {info['settings']['max_length']} tokens and were split"
        )
    if summary["single_token_sequences"]:
        shown["one token"] = (
            f"{summary['single_token_sequences']} sequences have a single token, which nothing predicts: no NLL"
        )
    if summary["skipped_records"]:
        shown["skipped"] = f"{summary['skipped_records']} unreadable records, the first: {summary['first_skipped']}"
    return shown


def _tell_gaps(run: Run) -> None:
    for row in run.coverage.table.to_pylist():
        if row["status"] != "complete":
            news(f"{row['status']}: {row['site']}: {row['recorded']:,} of {row['expected']:,}: {row['detail']}")


def _checked_name(path: Path, name: str | None, model: str, *, read_only: bool, resume: bool) -> str:
    """Everything about the store that can be wrong, found before the model is loaded, which can take minutes."""
    from moescope.store.store import Store, check_run_name

    if name is not None:
        check_run_name(name)
    taken: set[str] = set()
    if path.exists():
        with Store(path, read_only=read_only) as store:
            taken = {run.name for run in store.runs()}
    elif not path.parent.is_dir():
        raise InputError(f"cannot make a store at {path}", found="no such folder", fix=f"mkdir -p {path.parent}")
    if resume:
        if name is None:
            raise InputError("which run is to go on?", fix="name it (--name)")
        return name
    if name in taken:
        raise InputError(
            f"{path} already has a run called {name!r}",
            fix="choose another name (--name), or go on with it if it was stopped (--resume)",
        )
    stem = Path(model).stem if model.endswith(".gguf") else Path(model).name
    numbered = (stem if n == 1 else f"{stem}-{n}" for n in range(1, len(taken) + 2))
    return name if name is not None else next(n for n in numbered if n not in taken)


def check_thresholds(thresholds: Path | None) -> None:
    """Raise `InputError` before any work where a file of thresholds cannot be read."""
    if thresholds is not None:
        from moescope.report.thresholds.rules import read_rules

        read_rules(thresholds)


def check_report(report: Path | None) -> None:
    """Raise `InputError` before any work where a report could not be written there."""
    if report is not None:
        from moescope.report.write import check_target

        check_target(report)
