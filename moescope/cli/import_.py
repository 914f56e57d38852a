"""`moescope import`: a routing trace of another program becomes a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import Json, StorePath
from moescope.cli.output import as_json, facts, news
from moescope.cli.stages import stages
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.store.run import Run


def import_(
    source: Annotated[
        Path, typer.Argument(help="File of the trace, or a folder of Parquet files or an export.", show_default=False)
    ],
    store: StorePath = Path("runs.duckdb"),
    name: Annotated[str | None, typer.Option(help="Name of the run.", show_default="the file's")] = None,
    format: Annotated[  # noqa: A002  the flag's name
        str | None,
        typer.Option(
            help="neutral, vllm, sglang, llama.cpp, router_logits or olmoe.",
            show_default="told by the file",
        ),
    ] = None,
    n_experts: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Routed experts of a layer; needed where the file does not say.",
            show_default="what it says",
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Experts a token.", show_default="the commonest number")
    ] = None,
    n_null: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Null (zero-computation) experts of a layer.",
            show_default="what the file says, else 0",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers along an array's layer axis, comma-separated, ranges as 1-26.",
            show_default="0, 1, 2, …",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="What the trace was taken from.", show_default="what the file says"),
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="Label of every sequence that has none.", show_default="none")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="The router's scores are probabilities, not logits.")
    ] = False,
    normalize: Annotated[
        bool, typer.Option("--normalize", help="Scale the chosen experts' weights to sum to 1 (router scores only).")
    ] = False,
    json: Json = False,
) -> None:
    """Read a routing trace of vLLM, SGLang, llama.cpp, transformers or your own program into a store.

    Example: moescope import trace.parquet --store runs.duckdb --name dsv2 --n-experts 64
    """
    from moescope.store.importing.import_trace import import_trace
    from moescope.store.store import Store

    chosen = read_layers(layers) if layers is not None else None
    if not source.exists():
        raise InputError(f"there is no file {source}", fix="check the path")
    with Store(store) as opened, stages("importing") as tell:
        run = import_trace(
            opened,
            source,
            name=name if name is not None else source.stem,
            format=format,
            n_experts=n_experts,
            top_k=top_k,
            n_null=n_null,
            layers=chosen,
            model=model,
            label=label,
            probabilities=probabilities,
            normalize=normalize,
            tell=tell,
        )
        summary = _summary(run, store)
        gaps = [row for row in run.coverage.table.to_pylist() if row["status"] != "complete"]
    as_json(summary) if json else facts({key: value for key, value in summary.items() if key != "notes"})
    for note in summary["notes"]:
        news(f"note: {note}")
    for row in gaps:
        news(f"{row['status']}: {row['site']}: {row['recorded']:,} of {row['expected']:,}: {row['detail']}")
    if gaps:
        raise typer.Exit(3)


def read_layers(text: str) -> list[int]:
    """Layers as the flag spells them: `0,2,4-6`.

    Example:
        >>> read_layers("0,2,4-6")
        [0, 2, 4, 5, 6]
    """
    found: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)  # five digits, so that no range fills the memory
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise InputError(f"--layers cannot be {text!r}", expected="numbers and ranges: 1-26, or 0,2,4")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _summary(run: Run, store: Path) -> dict[str, Any]:
    info = run.info
    sites = run.coverage.table.column("status").to_pylist()
    summary = info["summary"]
    return {
        "run": run.name,
        "status": info["status"],
        "format": info["settings"]["format"],
        "coverage": f"{sites.count('complete')} of {len(sites)} sites full",
        "sequences": summary["sequences"],
        "tokens": summary["tokens"],
        "rows": summary["rows"],
        "seconds": summary["seconds"],
        "store": str(store),
        "notes": summary["notes"],
    }
