"""`moescope runs`: what a store holds; deleting runs, compacting, upgrading."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from moescope.cli.command import command
from moescope.cli.completion import run_names
from moescope.cli.flags import DryRun, InStore, Json, Store, Yes
from moescope.cli.output import as_json, facts, news, table
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.store.run import Run
    from moescope.store.store import Store as OpenedStore


class _Listing(TyperGroup):
    """`moescope runs STORE` lists, like `moescope runs list STORE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put `list` before arguments that name no command."""
        if not args or (args[0] not in self.commands and args[0] not in ctx.help_option_names):
            args = ["list", *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest


group = typer.Typer(
    cls=_Listing,
    help="""List the runs of a store, delete some, compact or upgrade its file. Without a command: list.

    Example: moescope runs runs.duckdb""",
)


def runs(store: Store = Path("runs.duckdb"), json: Json = False) -> None:
    """List the runs of a store: status, size (estimated within the file), when and what.

    Example: moescope runs list runs.duckdb
    """
    from moescope.store.store import Store as OpenedStore

    with OpenedStore(store, read_only=True) as opened:
        found, sizes = opened.runs(), opened.sizes()
        if json:
            as_json(
                [
                    {
                        **run.info,
                        "run_id": run.run_id,
                        "table_bytes": sizes[run.run_id].table_bytes,
                        "vector_bytes": sizes[run.run_id].vector_bytes,
                    }
                    for run in found
                ]
            )
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
                    in_words(sizes[run.run_id].bytes),
                    f"{info['started_at']:%Y-%m-%d %H:%M}" if info["started_at"] else "",
                    info["summary"].get("stopped") or "",
                ]
            )
        table(["run", "status", "model", "tokens", "about", "started (UTC)", "stopped"], rows)
        news(f"{store}: {in_words(store.stat().st_size)}")


def delete(
    names: Annotated[
        list[str],
        typer.Argument(help="Runs to delete, by name or run_id.", show_default=False, autocompletion=run_names),
    ],
    store: InStore = Path("runs.duckdb"),
    yes: Yes = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Delete runs: all their rows and vectors. The next run uses the room; `runs compact` makes the file smaller.

    Example: moescope runs delete base --store runs.duckdb
    """
    from moescope.store.deleting import delete_runs
    from moescope.store.store import Store as OpenedStore

    check_store(store)
    with OpenedStore(store, read_only=dry_run) as opened:
        chosen = _chosen(opened, names)
        sizes = opened.sizes()
        room = sum(sizes[run.run_id].bytes for run in chosen)
        doomed = [
            {
                "run": run.name,
                "run_id": run.run_id,
                "status": run.status,
                "rows": sizes[run.run_id].rows,
                "table_bytes": sizes[run.run_id].table_bytes,
                "vector_bytes": sizes[run.run_id].vector_bytes,
            }
            for run in chosen
        ]
        if dry_run:
            as_json(doomed) if json else _show(doomed)
            return
        if not yes and not _agreed(doomed, room):
            news("nothing was deleted")
            return
        deleted = delete_runs(opened, chosen)
    if json:
        as_json({"deleted": doomed, "rows": deleted.rows, "vector_bytes": deleted.vector_bytes})
        return
    facts(
        {
            "deleted": ", ".join(run.name for run in chosen),
            "rows": sum(deleted.rows.values()),
            "room freed": f"about {in_words(room)}; the file keeps its size until `moescope runs compact {store}`",
        }
    )


def compact(store: Store = Path("runs.duckdb"), json: Json = False) -> None:
    """Write the file of a store anew, without the room that deleted runs left.

    Needs free disk for a second file while it works; stops before it begins where there is none.

    Example: moescope runs compact runs.duckdb
    """
    from moescope.store.store import Store as OpenedStore

    check_store(store, option=False)
    with OpenedStore(store) as opened:
        done = opened.compact()
    if json:
        as_json({"store": str(store), "bytes_before": done.before, "bytes_after": done.after})
        return
    facts({"before": in_words(done.before), "after": in_words(done.after), "saved": in_words(done.before - done.after)})


def upgrade(store: Store = Path("runs.duckdb"), json: Json = False) -> None:
    """Bring a store that an older version wrote to the present schema; a copy of the file as it was is kept beside it.

    Example: moescope runs upgrade runs.duckdb
    """
    from moescope.store.store import Store as OpenedStore

    check_store(store, option=False)
    with OpenedStore(store) as opened:
        said = dict(opened.fetch("SELECT key, value FROM store_info"))
    shown = {"store": str(store), "schema_version": int(said["schema_version"])}
    shown |= {key: said[key] for key in ("upgraded_by", "upgraded_at") if key in said}
    as_json(shown) if json else facts(shown)


command(group, runs, "list")
command(group, delete)
command(group, compact)
command(group, upgrade)


def in_words(size: int) -> str:
    """A number of bytes as people read it.

    Example:
        >>> in_words(500), in_words(1_234_567), in_words(-2_500)
        ('500 B', '1.2 MB', '-2.5 kB')
    """
    value, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"


def _chosen(store: OpenedStore, names: list[str]) -> list[Run]:
    """The runs named, each once; every name is checked before anything is touched."""
    chosen: dict[str, Run] = {}
    for name in names:
        try:
            run = store.run(name)
        except InputError as unknown:
            if Path(name).is_file():
                raise InputError(
                    f"{name!r} is a file, not a run", fix=f"name the store with --store: … --store {name}"
                ) from unknown
            raise
        chosen[run.run_id] = run
    return list(chosen.values())


def _show(doomed: list[dict[str, Any]]) -> None:
    rows = [
        [run["run"], run["status"], run["rows"], in_words(run["table_bytes"] + run["vector_bytes"])] for run in doomed
    ]
    table(["run", "status", "rows", "about"], rows)


def _agreed(doomed: list[dict[str, Any]], room: int) -> bool:
    if not sys.stdin.isatty():
        raise InputError(
            "deleting asks first, and there is no terminal to ask on", fix="pass --yes; nothing was deleted"
        )
    for run in doomed:
        news(f"{run['run']} ({run['status']}): {run['rows']:,} rows")
    try:
        return typer.confirm(f"Delete for good, about {in_words(room)}?", err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        raise typer.Exit(130) from None
