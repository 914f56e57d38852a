"""`moescope sae train`: autoencoders from the vectors that a run kept at a site."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.completion import run_names
from moescope.cli.flags import Device, DryRun, InStore, Json, Seed
from moescope.cli.output import as_json, facts, news, table
from moescope.cli.store_check import check_store

_Run = Annotated[
    str, typer.Option("--run", help="The run whose vectors to train on.", show_default=False, autocompletion=run_names)
]
_Site = Annotated[
    str, typer.Option(help="Where the vectors were read: blocks.3.hook_resid_post, …", show_default=False)
]
_Spec = Annotated[
    list[str],
    typer.Option(
        "--spec",
        help="What to train, form:setting=value,…: topk:d=4096,k=32. Several are trained in one pass.",
        show_default=False,
    ),
]
_Target = Annotated[str | None, typer.Option(help="For transcoders, the site they predict.", show_default="none")]
_Names = Annotated[
    list[str] | None,
    typer.Option("--name", help="Name of each, in the order of --spec.", show_default="of form and size"),
]
_Expert = Annotated[
    int | None, typer.Option(min=0, help="Of a site inside experts, this expert alone.", show_default="all")
]
_Head = Annotated[int | None, typer.Option(min=0, help="Of a site of heads, this head alone.", show_default="all")]
_Vectors = Annotated[
    int | None,
    typer.Option(min=1, help="Vectors to train on, repeats included.", show_default="every one once"),
]
_BatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Vectors a step.", show_default="4,096, fewer where they are few"),
]
_Every = Annotated[
    int | None,
    typer.Option(min=0, help="Steps between checkpoints, 0 for none.", show_default="a tenth"),
]
_Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the training of these names, where it was stopped.")
]
_HeldOut = Annotated[float, typer.Option(min=0, max=1, help="Share of the documents that training does not see.")]
_MaxNorm = Annotated[
    float | None,
    typer.Option(
        min=0, help="Leave out vectors of more than so many times the median norm.", show_default="none left out"
    ),
]
_Skip = Annotated[int, typer.Option(min=0, help="Leave out so many first tokens of each sequence.")]


def train(
    run: _Run,
    site: _Site,
    spec: _Spec,
    store: InStore = Path("runs.duckdb"),
    target_site: _Target = None,
    name: _Names = None,
    expert: _Expert = None,
    head: _Head = None,
    vectors: _Vectors = None,
    batch_size: _BatchSize = None,
    seed: Seed = 0,
    device: Device = "auto",
    checkpoint_every: _Every = None,
    resume: _Resume = False,
    held_out: _HeldOut = 0.1,
    max_norm_ratio: _MaxNorm = None,
    skip_first: _Skip = 1,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train sparse autoencoders on a run's vectors, several in one pass over them.

    Example: moescope sae train --store runs.duckdb --run base --site blocks.3.hook_resid_post --spec topk:d=4096,k=32
    """
    from moescope.sae.training.specs import SaeSpec
    from moescope.sae.training.train import plan_training
    from moescope.sae.training.train import train as fit
    from moescope.store.store import Store

    specs = [SaeSpec.parse(text) for text in spec]
    check_store(store)
    options: dict[str, Any] = {
        "site": site, "target_site": target_site, "expert": expert, "head": head, "vectors": vectors, "names": name or None,
        "batch_size": batch_size, "held_out": held_out, "max_norm_ratio": max_norm_ratio, "skip_first": skip_first,
    }  # fmt: skip
    with Store(store, read_only=dry_run) as opened:
        found = opened.run(run)
        if dry_run:
            told = plan_training(found, opened, specs, **options)
            as_json(told) if json else facts(told)
            return
        trained = fit(
            found, opened, specs, **options, seed=seed, device=device, checkpoint_every=checkpoint_every, resume=resume,
            progress=not json,
        )  # fmt: skip
        rows = [autoencoder.row for autoencoder in trained]
    if json:
        as_json(rows)
        return
    show_saes(rows)
    for note in rows[0]["settings"].get("notes", []):
        news(note)


def show_saes(rows: list[dict[str, Any]]) -> None:
    """Autoencoders as a table on stdout; what was stopped is said on stderr."""
    table(["autoencoder", "site", "form", "latents", "L0", "explained"], [_cells(row) for row in rows])
    for row in rows:
        if why := (row["summary"] or {}).get("stopped"):
            news(f"{row['name']} was stopped {why}")


def _cells(row: Mapping[str, Any]) -> list[Any]:
    summary = row["summary"] or {}
    seen: Mapping[str, Any] = summary.get("held_out") or {}
    share = seen.get("explained_variance", summary.get("explained_variance"))
    where = row["site"] if row["target_site"] is None else f"{row['site']} → {row['target_site']}"
    return [
        row["name"],
        where if row["expert"] is None else f"{where}, expert {row['expert']}",
        row["architecture"],
        row["d_sae"],
        _number(seen.get("l0", summary.get("l0")), ".1f"),
        _number(share, ".1%"),
    ]


def _number(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)
