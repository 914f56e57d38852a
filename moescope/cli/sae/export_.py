"""`moescope sae export`: an autoencoder's files, for SAELens and others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.completion import autoencoder_names
from moescope.cli.flags import InStore, Json
from moescope.cli.output import as_json, facts


def export(
    name: Annotated[
        str,
        typer.Argument(help="The autoencoder, by name or id.", show_default=False, autocompletion=autoencoder_names),
    ],
    folder: Annotated[Path, typer.Argument(help="A folder that is not there yet.", show_default=False)],
    store: InStore = Path("runs.duckdb"),
    json: Json = False,
) -> None:
    """Write an autoencoder into a folder that stock SAELens opens: SAE.load_from_disk(folder).

    Example: moescope sae export topk-4096-k32 exported --store runs.duckdb
    """
    from moescope.sae.catalogue import export_sae
    from moescope.store.store import Store

    with Store(store, read_only=True) as opened:
        written = export_sae(opened, name, folder)
    told = {"folder": str(folder), "files": ", ".join(path.name for path in written)}
    as_json({**told, "files": [path.name for path in written]}) if json else facts(told)
