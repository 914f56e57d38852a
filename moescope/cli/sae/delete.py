"""`moescope sae delete`: autoencoders and all that was measured of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.completion import autoencoder_names
from moescope.cli.flags import DryRun, InStore, Json, Yes
from moescope.cli.output import as_json, facts, news
from moescope.cli.sae.train import show_saes
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError


def delete(
    names: Annotated[
        list[str],
        typer.Argument(
            help="Autoencoders to delete, by name or id.", show_default=False, autocompletion=autoencoder_names
        ),
    ],
    store: InStore = Path("runs.duckdb"),
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Delete autoencoders: their weights, and every row about them.

    Example: moescope sae delete topk-4096-k32 --store runs.duckdb
    """
    from moescope.sae.catalogue import delete_saes, sae_row
    from moescope.store.store import Store

    check_store(store)
    with Store(store, read_only=dry_run) as opened:
        rows = [sae_row(opened, name) for name in dict.fromkeys(names)]
        if dry_run:
            as_json(rows) if json else show_saes(rows)
            return
        if not yes:
            if not sys.stdin.isatty():
                raise InputError("deleting asks first, and nobody is there to answer", fix="add --yes")
            if not _agreed(rows, json=json):
                news("nothing was deleted")
                return
        deleted = delete_saes(opened, [row["name"] for row in rows])
    told = {"autoencoders": len(rows), "rows": sum(deleted.rows.values()), "bytes": deleted.folder_bytes}
    as_json({**told, "rows": dict(deleted.rows)}) if json else facts(told)
    if not json:
        news("deleted")


def _agreed(rows: list[dict[str, Any]], *, json: bool) -> bool:
    """Whether the user says yes to what is shown: on stderr where stdout is for JSON."""
    if json:
        news("\n".join(f"{row['name']} at {row['site']}" for row in rows))
    else:
        show_saes(rows)
    try:
        return typer.confirm("Delete them?", err=True)
    except typer.Abort:
        raise typer.Exit(130) from None
