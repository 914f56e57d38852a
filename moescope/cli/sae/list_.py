"""`moescope sae list`: the autoencoders of a store."""

from __future__ import annotations

from pathlib import Path

from moescope.cli.flags import Json, Store
from moescope.cli.output import as_json, news
from moescope.cli.sae.train import show_saes


def list_(
    store: Store = Path("runs.duckdb"),
    json: Json = False,
) -> None:
    """List the autoencoders of a store: where they read, their size, and how they did on what training had not seen.

    Example: moescope sae list runs.duckdb
    """
    from moescope.sae.catalogue import sae_rows
    from moescope.store.store import Store

    with Store(store, read_only=True) as opened:
        rows = sae_rows(opened)
    if json:
        as_json(rows)
        return
    if not rows:
        news(f"{store} holds no autoencoders yet; train one: moescope sae train --store {store}, or import one")
        return
    show_saes(rows)
