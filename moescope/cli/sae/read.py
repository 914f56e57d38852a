"""`moescope sae read`: what the latents of an autoencoder fire on, into the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.export import only_run
from moescope.cli.flags import (
    Device,
    DeviceMap,
    Documents,
    DryRun,
    Dtype,
    InStore,
    Json,
    OneRun,
    OneSae,
    Revision,
    Seed,
    Trust,
    UseModel,
    Window,
)
from moescope.cli.output import as_json, facts, news
from moescope.cli.sae.asked import check_documents, tell_plan
from moescope.cli.store_check import check_store

_Top = Annotated[int, typer.Option(min=1, help="Largest activations kept of each latent, one a document.")]
_Strata = Annotated[int, typer.Option(min=1, help="Quantiles of activation that examples are drawn from.")]
_PerStratum = Annotated[int, typer.Option(min=1, help="Examples drawn from each quantile.")]
_Logits = Annotated[int, typer.Option(min=1, help="Tokens kept whose logits a latent raises, and lowers, most.")]
_Others = Annotated[
    list[str] | None,
    typer.Option("--other", help="Another autoencoder of the site, for neighbours, repeatable.", show_default="none"),
]


def read(
    sae: OneSae,
    store: InStore = Path("runs.duckdb"),
    run: OneRun = None,
    model: UseModel = None,
    documents: Documents = "held_out",
    top: _Top = 20,
    strata: _Strata = 5,
    per_stratum: _PerStratum = 4,
    window: Window = 32,
    logits: _Logits = 15,
    other: _Others = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Read what every latent of an autoencoder fires on: examples, labels, logits, neighbours, families.

    Example: moescope sae read --store runs.duckdb --sae topk-4096-k32 --run base --model demo
    """
    from moescope.sae.loading import load_autoencoder
    from moescope.sae.reading.read import read_features
    from moescope.store.store import Store

    check_store(store)
    check_documents(documents)
    if dry_run:
        tell_plan(store, run=run, saes=[sae, *(other or ())], model=model, json=json)
        return
    with Store(store) as opened:
        found = only_run(opened, run)
        autoencoder = load_autoencoder(opened, sae)
        others = [load_autoencoder(opened, name) for name in other or ()]
        live = None
        if model is not None:
            from moescope.probes.loading import load
            from moescope.sae.belonging import check_belongs

            live = load(
                model,
                device=device,
                device_map=device_map,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            check_belongs(autoencoder, live)
        outcome = read_features(
            autoencoder, found, opened, model=live, documents=documents, top=top, strata=strata,  # type: ignore[arg-type]  # checked there
            per_stratum=per_stratum, window=window, logits=logits, others=others, progress=not json, seed=seed,
        )  # fmt: skip
    if json:
        as_json(dataclasses.asdict(outcome))
        return
    facts(
        {
            "autoencoder": autoencoder.name, "run": found.name, "tokens": outcome.tokens, "documents": outcome.documents,
            "latents that fire": outcome.features, "dead": outcome.dead, "examples": outcome.examples,
            "rows": sum(outcome.rows.values()), "seconds": f"{outcome.seconds:.1f}",
        }
    )  # fmt: skip
    for note in outcome.notes:
        news(note)
