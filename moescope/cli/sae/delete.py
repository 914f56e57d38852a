"""`moescope sae delete`: autoencoders and all that was measured of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.completion import autoencoder_names
from moescope.cli.flags import DryRun, InStore, Json, Yes
from moescope.cli.output import as_json, facts, news
from moescope.cli.sae.train import show_saes
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

    if not store.exists():
        raise InputError(f"there is no store at {store}", fix="name it with --store")
    with Store(store, read_only=dry_run) as opened:
        rows = [sae_row(opened, name) for name in dict.fromkeys(names)]
        if dry_run:
            as_json(rows) if json else show_saes(rows)
            return
        if not yes:
            if not sys.stdin.isatty():
                raise InputError("deleting asks first, and nobody is there to answer", fix="add --yes")
            show_saes(rows)
            typer.confirm("Delete them?", abort=True, err=True)
        deleted = delete_saes(opened, [row["name"] for row in rows])
    told = {"autoencoders": len(rows), "rows": sum(deleted.rows.values()), "bytes": deleted.folder_bytes}
    as_json({**told, "rows": dict(deleted.rows)}) if json else facts(told)
    if not json:
        news("deleted")
