"""`moescope sae record`: keep the vectors of a corpus at some sites, to train autoencoders on."""

from __future__ import annotations

import math
import re
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
    MaxLength,
    Model,
    Revision,
    Seed,
    SkipBad,
    StorePath,
    TextField,
    Trust,
    listed,
)
from moescope.cli.output import as_json, facts, news
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.probes.live_model import LiveModel
    from moescope.sae.recording import VectorPlan
    from moescope.store.run import Run

_COUNT = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGbB]?)")
_THOUSANDS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}

_Site = Annotated[
    list[str],
    typer.Option("--site", help="Where: blocks.3.hook_resid_post, … Several are read in one pass.", show_default=False),
]
_Tokens = Annotated[
    str | None,
    typer.Option(
        help="At most so many: 500k, 2M, …; it ends with the last document that fits.",
        show_default="all",
    ),
]
_Name = Annotated[str | None, typer.Option(help="Name of the run.", show_default="the model's, with -vectors")]
_Sample = Annotated[float, typer.Option(help="Share of the tokens whose vectors are kept.")]
_Budget = Annotated[
    str | None,
    typer.Option(
        help="Bytes on disk: 500MB, 2GB, 1.5GiB, …; it ends earlier where it would take more.", show_default="no limit"
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run of this name, if it was stopped.")]


def record(
    model: Model,
    site: _Site,
    data: Data = None,
    tokens: _Tokens = None,
    store: StorePath = Path("runs.duckdb"),
    name: _Name = None,
    sample: _Sample = 1.0,
    budget: _Budget = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    seed: Seed = 0,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    skip_bad_lines: SkipBad = False,
    resume: _Resume = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Record the vectors of a corpus at some sites, for autoencoders: no block runs that no site needs.

    Example: moescope sae record demo --site blocks.3.hook_resid_post --tokens 50k --store runs.duckdb --name vectors
    """
    count = None if tokens is None else read_count(tokens)
    sites = listed(site)
    if resume and name is None:
        raise InputError("which run is to go on?", fix="name it (--name)")
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.sae.recording import plan_vectors, record_vectors
    from moescope.store.store import Store, check_run_name

    if name is not None:
        check_run_name(name)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    if data is None:
        news("no --data: using the bundled labelled corpus")
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    options: dict[str, Any] = {
        "sites": sites,
        "tokens": count,
        "sample": sample,
        "batch_size": batch_size,
        "max_length": max_length,
        "budget": budget,
    }
    if dry_run:
        plan = plan_vectors(live, corpus, store, **options, trial=True)
        as_json(plan.as_json()) if json else facts(shown_plan(plan, live))
        return
    with Store(store) as opened:
        run = record_vectors(live, corpus, opened, **options, name=name, seed=seed, progress=not json, resume=resume)
        _tell(run, store, json=json)


def read_count(text: str) -> int:
    """A number of tokens in words: k, M and G (or B) are powers of 1,000.

    Raises:
        InputError: it is no such number, or not even one.

    Example:
        >>> read_count("2M"), read_count("1.5k"), read_count("700")
        (2000000, 1500, 700)
    """
    found = _COUNT.fullmatch(text.strip().replace(",", "").replace("_", ""))
    amount = float(found[1]) * _THOUSANDS[found[2].lower()] if found else 0.0
    count = int(amount) if math.isfinite(amount) else 0
    if count < 1:
        raise InputError("--tokens is a number of tokens", expected="500k, 2M, 1500000, …", found=repr(text))
    return count


def shown_plan(plan: VectorPlan, model: LiveModel) -> dict[str, Any]:
    """A plan, for reading."""
    from moescope.probes.plan_budget import written_bytes

    left = f", {plan.left:,} left over" if plan.left else ""
    told: dict[str, Any] = {
        "model": repr(model),
        "documents": f"{plan.documents:,}{left}",
        "tokens": plan.tokens,
        "vectors": plan.vectors,
    }
    for cost in plan.sites:
        many = "" if cost.rows == 1 else f", {cost.rows:.3g} a token"
        told[cost.site] = f"{cost.width:,} × {cost.dtype}{many}: {cost.bytes_per_token:,.0f} bytes a token"
    told["passes"] = (
        "run to their end"
        if plan.stop_after is None
        else f"stop after block {plan.stop_after} of 0 to {model.anatomy.n_layers - 1}"
    )
    told["disk"] = f"{written_bytes(plan.bytes)} of {written_bytes(plan.free)} free"
    if plan.seconds is not None:
        told["time"] = f"about {plan.seconds:,.0f} s, by a short trial"
    return told


def _tell(run: Run, store: Path, *, json: bool) -> None:
    """Say what was recorded, and leave with 3 where something is missing."""
    info, summary = run.info, run.info["summary"]
    query = """
        SELECT site, sum(rows)::BIGINT, any_value(width), any_value(dtype)
        FROM activations
        WHERE run_id = ?
        GROUP BY site
        ORDER BY site
    """
    kept = run.store.fetch(query, [run.run_id])
    told: dict[str, Any] = {
        "run": run.name,
        "status": info["status"],
        "corpus": info["settings"]["corpus"],
        "documents": summary["documents"],
        "tokens": summary["tokens"],
        "tokens/s": round(summary["tokens_per_second"]),
    }
    if json:
        told["sites"] = [dict(zip(("site", "vectors", "width", "dtype"), row, strict=True)) for row in kept]
    else:
        told |= {site: f"{rows:,} vectors of {width:,} × {dtype}" for site, rows, width, dtype in kept}
    told["store"] = str(store)
    as_json(told) if json else facts(told)
    if not run.complete:
        for row in run.coverage.table.to_pylist():
            if row["status"] != "complete":
                news(f"{row['status']}: {row['site']}: {row['recorded']:,} of {row['expected']:,}: {row['detail']}")
        raise typer.Exit(3)
