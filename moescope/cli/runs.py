"""`moescope runs`: what a store holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.output import as_json, news, table


def runs(
    store: Annotated[Path, typer.Argument(help="The store.")] = Path("runs.duckdb"),
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the runs of a store.

    Example: moescope runs runs.duckdb
    """
    from moescope.store.store import Store

    with Store(store, read_only=True) as opened:
        found = opened.runs()
        if json:
            as_json([{**run.info, "run_id": run.run_id} for run in found])
            return
        if not found:
            news(f"{store} holds no runs yet; record one: moescope profile demo --store {store}")
            return
        rows = []
        for run in found:
            info = run.info
            rows.append(
                [
                    run.name,
                    info["status"],
                    info["model"],
                    f"{info['summary'].get('tokens', 0):,}",
                    f"{info['started_at']:%Y-%m-%d %H:%M}",
                    info["summary"].get("stopped") or "",
                ]
            )
        table(["run", "status", "model", "tokens", "started (UTC)", "stopped"], rows)
