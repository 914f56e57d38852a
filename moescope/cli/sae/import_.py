"""`moescope sae import`: an autoencoder from a folder, or a published one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.flags import Json, StorePath
from moescope.cli.output import as_json
from moescope.cli.sae.train import show_saes
from moescope.core.errors import InputError

_Source = Annotated[
    str, typer.Argument(help="A folder in SAELens' format, or release:id of a published one.", show_default=False)
]


def import_(
    source: _Source,
    store: StorePath = Path("runs.duckdb"),
    name: Annotated[str | None, typer.Option(help="Its name.", show_default="the folder's, or the id")] = None,
    site: Annotated[
        str | None,
        typer.Option(help="Where its vectors are read, over what it says itself.", show_default="what it says"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help='Check that it belongs to this model: "demo", a Hub id, a folder, or a .gguf file.',
            show_default="no check",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take it for --model though it says another.")] = False,
    json: Json = False,
) -> None:
    """Take an autoencoder into a store: a folder of SAELens', of this version or older, or a published one.

    Example: moescope sae import gpt2-small-res-jb:blocks.8.hook_resid_pre --store runs.duckdb
    """
    from moescope.sae.loading import from_disk, published
    from moescope.store.store import Store

    if not store.parent.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {store.parent}")
    live = None
    if model is not None:
        from moescope.probes.loading import load

        live = load(model)
    release, colon, sae_id = source.partition(":")
    with Store(store) as opened:
        if Path(source).exists() or not colon:
            loaded = from_disk(source, site=site, store=opened, name=name, model=live, force=force)
        else:
            loaded = published(release, sae_id, store=opened, name=name, site=site, model=live, force=force)
    as_json(loaded.row) if json else show_saes([loaded.row])
