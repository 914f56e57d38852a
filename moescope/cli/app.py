"""The commands together, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import traceback
from typing import Annotated

import typer

from moescope.cli.analyze import analyze
from moescope.cli.command import command
from moescope.cli.compare import compare
from moescope.cli.dashboard import dashboard
from moescope.cli.doctor import doctor
from moescope.cli.export import export
from moescope.cli.import_ import import_
from moescope.cli.intervene import group as intervene
from moescope.cli.manual import manual
from moescope.cli.merge import merge
from moescope.cli.output import said
from moescope.cli.phenomena import phenomena
from moescope.cli.plan import plan
from moescope.cli.profile import profile
from moescope.cli.report import report
from moescope.cli.runs import group as runs
from moescope.cli.sae import group as sae
from moescope.core.errors import MoescopeError
from moescope.core.versions import VERSION

app = typer.Typer(
    name="moescope",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="See, and change, what happens inside mixture-of-experts language models while they run.",
)
command(app, plan)
command(app, profile)
command(app, analyze)
command(app, phenomena)
command(app, report)
command(app, compare)
command(app, import_, "import")
command(app, export)
command(app, merge)
app.add_typer(runs, name="runs")
app.add_typer(intervene, name="intervene")
app.add_typer(sae, name="sae")
command(app, dashboard)
command(app, doctor)
command(app, manual, hidden=True)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show Python tracebacks of errors.")] = False,
) -> None:
    if debug:
        os.environ["MOESCOPE_DEBUG"] = "1"
    if version:
        said(VERSION)
        raise typer.Exit


def run() -> int:
    """Run the command in `sys.argv` and give its exit code. Typer turns Ctrl-C into 130 and misuse into 2."""
    try:
        app(standalone_mode=True, prog_name="moescope")
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 0 if left.code is None else 2
        return _told("interrupted: what was committed is safe", code) if code == 130 else code
    except MoescopeError as error:
        return _told(str(error), error.exit_code)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return _told(f"a name is too long for a file: {str(error.filename)[:60]}…. What to do: check the path.", 2)
        return _last_resort(error)
    except Exception as error:  # noqa: BLE001  the last resort: a bug is told as one line, with the way to its traceback
        return _last_resort(error)
    return 0


def _last_resort(error: Exception) -> int:
    if type(error).__module__.partition(".")[0] in ("duckdb", "_duckdb"):
        from moescope.store.opening import is_damage

        if is_damage(error):  # type: ignore[arg-type]  # of DuckDB's own errors
            return _told(f"the store is damaged: {error}. What to do: restore it from a copy.", 2)
    return _told(f"internal error: {type(error).__name__}: {error}. Run `moescope --debug …` for the traceback.", 4)


def _told(message: str, code: int) -> int:
    from rich.console import Console

    if os.environ.get("MOESCOPE_DEBUG"):
        traceback.print_exc()
    Console(stderr=True).print(
        f"[bold red]error:[/] {_plain(message)}" if code != 130 else _plain(message),
        highlight=False,
        soft_wrap=True,
        emoji=False,
    )
    return code


def _plain(text: str) -> str:
    """Text without markup of rich or control characters of the terminal."""
    from rich.markup import escape

    return escape("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))
