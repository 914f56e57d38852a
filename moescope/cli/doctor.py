"""`moescope doctor`: whether this machine, and a model, can be recorded rightly."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.flags import OUTPUT, Device
from moescope.cli.output import as_json, said, table
from moescope.core.errors import InputError, MoescopeError

_TEXTS = ["The quick brown fox jumps over the lazy dog.", "def add(a, b):\n    return a + b\n"]

# The whole table needs a wide terminal; in a narrow one these of its columns are readable.
_WIDE, _NARROW = 150, (0, 1, 2, 5)


def doctor(
    model: Annotated[str, typer.Argument(help='Model to check: "demo", a Hub id, a folder or a .gguf file.')] = "demo",
    device: Device = "auto",
    families: Annotated[
        bool,
        typer.Option("--families", help="Build every model type with experts in tiny form, record it, and list them."),
    ] = False,
    edits: Annotated[
        bool, typer.Option("--edits", help="List which edits the model takes, or with --families each model type.")
    ] = False,
    format: Annotated[  # noqa: A002  the flag's name
        str,
        typer.Option(
            help="On stdout: table or json; with --families or --edits also markdown.", rich_help_panel=OUTPUT
        ),
    ] = "table",
    json: Annotated[bool, typer.Option("--json", help="The same as --format json.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Check this machine, and that a model is recorded exactly as it runs.

    Loads the model, looks at its anatomy, compares logits with and without taps, and records two sentences into a store of its own.

    Example: moescope doctor demo
    """
    known = ("table", "json", "markdown") if edits or families else ("table", "json")
    if format not in known:
        raise InputError(f"there is no format {format!r} here", expected=", ".join(known))
    json, markdown = json or format == "json", format == "markdown"
    if edits:
        _edits(None if families else model, device, json=json, markdown=markdown)
        return
    if families:
        _families(json=json, markdown=markdown)
        return
    checks: list[dict[str, Any]] = []
    codes: list[int] = []

    def check(what: str, find: Callable[[], str]) -> bool:
        try:
            checks.append({"check": what, "ok": True, "found": find()})
        except MoescopeError as error:
            checks.append({"check": what, "ok": False, "found": str(error)})
            codes.append(error.exit_code)
        return bool(checks[-1]["ok"])

    check("versions", _versions)
    check("devices", _devices)
    live: list[Any] = []
    if check(f"load {model}", lambda: _loaded(model, device, live)):
        check("logits with taps = logits without", lambda: _same_logits(live[0]))
        check("record two sentences", lambda: _recorded(live[0]))
    if json:
        as_json(checks)
    else:
        table(["", "check", "found"], [["✓" if c["ok"] else "✗", c["check"], c["found"]] for c in checks])
    if codes:
        raise typer.Exit(codes[0])


def _families(*, json: bool, markdown: bool) -> None:
    from rich.console import Console

    from moescope.probes.families.support import COLUMNS, as_markdown, support_table

    console = Console(stderr=True)
    with console.status("") as status:
        found = support_table(each=lambda name: status.update(f"recording a tiny {name}"))
    if json:
        as_json([vars(s) for s in found])
    elif markdown:
        said(as_markdown(found), nl=False)
    else:
        shown = range(len(COLUMNS)) if Console().width >= _WIDE else _NARROW
        table([COLUMNS[i] for i in shown], [[list(vars(s).values())[i] for i in shown] for s in found])
        if len(shown) < len(COLUMNS):
            console.print("a wider terminal, --format markdown or --json also show decisions, routing rules and notes")
        full = sum(s.recorded == "complete" for s in found)
        console.print(f"{full} of {len(found)} model types with experts are recorded completely")
    if any(s.recorded != "complete" for s in found):
        raise typer.Exit(3)


def _edits(model: str | None, device: str, *, json: bool, markdown: bool) -> None:
    from rich.console import Console

    from moescope.probes.edits.support import edit_support
    from moescope.probes.families.edit_families import COLUMNS, as_markdown, edit_families, refusal_rows
    from moescope.probes.loading import load
    from moescope.routing.phenomena.layer_ranges import layer_ranges

    with Console(stderr=True).status("") as status:
        if model is None:
            found = edit_families(each=lambda name: status.update(f"trying edits on a tiny {name}"))
        else:
            found = {model: edit_support(load(model, device=device))}
    if json:
        as_json({name: [vars(s) for s in supports.values()] for name, supports in found.items()})
    elif markdown:
        said(as_markdown(found), nl=False)
    elif model is None:
        table(COLUMNS, refusal_rows(found))
    else:
        table(
            ["", "edit", "layers", "why not elsewhere"],
            [
                ["✓" if s.works else "✗", s.edit, layer_ranges(s.layers) or "none", s.reason or ""]
                for s in found[model].values()
            ],
        )


def _versions() -> str:
    from moescope.core.versions import library_versions

    return ", ".join(f"{name} {version}" for name, version in library_versions().items())


def _devices() -> str:
    import torch

    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"cpu with {torch.get_num_threads()} threads" + "".join(f", {name}" for name in cuda)


def _loaded(model: str, device: str, live: list[Any]) -> str:
    from moescope.probes.loading import load

    live.append(load(model, device=device))
    return repr(live[0])


def _same_logits(live: Any) -> str:
    from moescope.probes.selfcheck import compare_logits

    return compare_logits(live, _TEXTS)


def _recorded(live: Any) -> str:
    from moescope.core.errors import IncompleteError
    from moescope.probes.record import record
    from moescope.store.store import Store

    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "doctor.duckdb") as store:
        run = record(live, _TEXTS, store, name="doctor", progress=False)
        sites = run.coverage.table.to_pylist()
        gaps = [f"{row['site']}: {row['detail']}" for row in sites if row["status"] != "complete"]
        if gaps:
            raise IncompleteError("the ledger has gaps", found="; ".join(gaps))
        rules = store.fetch(
            "SELECT count(*), count(*) FILTER (routing_rule->>'verified' = 'true') FROM layers WHERE kind = 'moe'"
        )[0]
        routing = (
            f"; routing rule verified on {rules[1]} of {rules[0]} routers" if rules[0] else "; dense, so no routers"
        )
        return f"{len(sites)} of {len(sites)} sites full{routing}"
