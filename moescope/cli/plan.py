"""`moescope plan`: what a recording will cost, before it is begun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.flags import (
    BatchSize,
    Budget,
    Data,
    Device,
    DeviceMap,
    Dtype,
    Generate,
    Json,
    LabelField,
    MaxLength,
    Model,
    Padding,
    Probe,
    Revision,
    Sample,
    Seed,
    Sites,
    SkipBad,
    TextField,
    Trust,
    listed,
)
from moescope.cli.output import as_json, facts, news, table

PlannedStore = Annotated[
    Path, typer.Option("--store", help="Where the run would be recorded; nothing is opened or written there.")
]


def plan(
    model: Model,
    data: Data = None,
    store: PlannedStore = Path("runs.duckdb"),
    probe: Probe = None,
    site: Sites = None,
    sample: Sample = 1.0,
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
    json: Json = False,
) -> None:
    """Say what a profile will cost in disk, time and memory, and what each probe adds. Takes the flags of `profile`.

    Example: moescope plan demo --probe routing,experts --budget 15MB
    """
    from moescope.probes.choices import check_sizes
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.probes.plan_budget import read_bytes
    from moescope.probes.planning import plan as make_plan

    check_sizes(batch_size, max_length, generate, sample, padding)
    limit = None if budget is None else read_bytes(budget)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    found = corpus.facts()
    if data is None:
        news(f"no --data: using the bundled labelled corpus of {found.documents} documents")
    live = load(
        model,
        device=device,
        device_map=device_map,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    made = make_plan(
        live,
        corpus,
        probes=listed(probe) or None,
        sites=listed(site),
        sample=sample,
        generate=generate,
        batch_size=batch_size,
        max_length=max_length,
        padding=padding,
        seed=seed,
        budget=limit,
        store=store,
    )
    if json:
        as_json(made.as_json())
        return
    _show(made)


def _show(made: Any) -> None:
    from moescope.probes.plan_budget import written_bytes

    seconds = sum(cost.seconds for cost in made.costs) or 1.0
    table(
        ["", "rows", "disk", "time", "memory"],
        [
            [
                cost.part,
                cost.rows,
                written_bytes(cost.bytes),
                f"{cost.seconds / seconds:.0%}",
                written_bytes(cost.memory_bytes),
            ]
            for cost in made.costs
        ],
    )
    shown = {"in all": made.title}
    shown |= {"sample": f"vectors of {made.sample:.3g} of the tokens"} if made.sites else {}
    shown |= {"note" if n == 0 else f"note {n + 1}": note for n, note in enumerate(made.notes)}
    facts(shown)
