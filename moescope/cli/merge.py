"""`moescope merge`: shards of one plan, joined into one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moescope.cli.flags import DryRun, Json
from moescope.cli.output import as_json, facts, news
from moescope.cli.stages import stages


def merge(
    out: Annotated[Path, typer.Argument(help="Store to merge into; made where it is not there.", show_default=False)],
    shards: Annotated[list[Path], typer.Argument(help="Stores with one part of the plan each.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="Name of the merged run.", show_default="that of the shards")] = None,
    run: Annotated[
        str | None, typer.Option(help="Run to take from each shard, where it has several.", show_default="the only one")
    ] = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Join parts of one recording, made on several machines, into one run.

    The rows are those of one recording of everything. Batches that several shards have are taken once. The shards stay as they are.

    Example: moescope merge runs.duckdb shard-*.duckdb --name base
    """
    from moescope.store.merging import merge as merge_shards

    if dry_run:
        _plan(out, shards, run, json=json)
        return
    with stages("merging") as stage:
        merged = merge_shards(out, shards, name=name, run=run, progress=stage)
    with merged.store:
        info, summary = merged.info, merged.info["summary"]
        sites = merged.coverage.table.column("status").to_pylist()
        told = {
            "run": merged.name,
            "status": info["status"],
            "coverage": f"{sites.count('complete')} of {len(sites)} sites full",
            "shards": len(shards),
            "sequences": summary["sequences"],
            "tokens": summary["tokens"],
            "store": str(out),
        }
        as_json(told) if json else facts(told)
        if merged.complete:
            return
        for row in merged.coverage.table.to_pylist():
            if row["status"] != "complete":
                news(f"{row['status']}: {row['site']}: {row['recorded']:,} of {row['expected']:,}: {row['detail']}")
        raise typer.Exit(3)


def _plan(out: Path, shards: list[Path], run: str | None, *, json: bool) -> None:
    """Whether the shards are parts of one plan, and what they hold of it; the shards are only read."""
    from moescope.store.merge_plan import plan_merge
    from moescope.store.merge_shards import check_alike, read_shard

    with stages("reading the shards"):
        found = [read_shard(path, run) for path in shards]
        check_alike(found)
        plan = plan_merge(found)
    told = {
        "store": str(out),
        "shards": len(found),
        "runs": ", ".join(sorted({str(shard.info["name"]) for shard in found})),
        "batches": sum(len(part.taken) for part in plan.parts),
        "missing": plan.missing or "no batch",
    }
    as_json(told) if json else facts(told)
