"""One way to make a command: every one takes `--config` and `--show-config`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from moescope.cli.parser import Flag, commands, flags_of

_PANEL = "Options of every command"
_Config = Annotated[
    Path | None,
    typer.Option(
        help="Read flags from this YAML file, names as keys; the command line wins, --no-FLAG takes a switch back, and "
        "relative paths count from the current folder.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
_ShowConfig = Annotated[
    bool,
    typer.Option(
        "--show-config",
        help="Print the options in force as YAML, for --config, and stop.",
        rich_help_panel=_PANEL,
    ),
]


class ConfiguredCommand(TyperCommand):
    """A command whose flags may come from a file; what is typed wins."""

    plain: Callable[..., Any]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the file that `--config` names, before the flags are."""
        if not ctx.resilient_parsing:
            args = self._configured(ctx, list(args))
        elif args and args[-1].startswith("-"):
            args = args[:-1]  # Tab stands at its value; left in, the parser gives up before it reads the arguments
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def _configured(self, ctx: Any, args: list[str]) -> list[str]:
        flags = flags_of(_plain(self.callback))
        _refuse_second_file(args)
        args, taken_back = _without_taken_back(args, flags)
        typed: dict[str, Any] = self.make_parser(ctx).parse_args(list(args))[0]
        path = typed.get("config")
        if not isinstance(path, str) or typed.get("help"):
            return args
        from moescope.cli.app import app
        from moescope.cli.config import read_config

        known = {each.name: each.flags for each in commands(app)}
        found = read_config(Path(path), words_of(ctx), known)
        ctx.default_map = {
            flag.variable: found[flag.variable]
            for flag in flags
            if not flag.positional and flag.variable in found and flag.name not in taken_back
        }
        return [*args, *_places(flags, typed, found, "--" not in args)]


def _places(flags: Sequence[Flag], typed: dict[str, Any], found: dict[str, Any], divide: bool) -> list[str]:
    """The positional arguments that the file adds behind those that were typed."""
    added: list[str] = []
    for flag in flags:
        if not flag.positional or (isinstance(typed.get(flag.variable), (str, list, tuple)) and typed[flag.variable]):
            continue
        if flag.variable not in found:
            break
        value = found[flag.variable]
        added += map(str, value) if isinstance(value, list) else [str(value)]
    return ["--", *added] if added and divide else added


def _without_taken_back(args: Sequence[str], flags: Sequence[Flag]) -> tuple[list[str], set[str]]:
    """Arguments without `--no-FLAG` of switches that have no such spelling of their own, and the names of these.

    Of `--FLAG` and `--no-FLAG` the last one typed holds.
    """
    switches = {f"--no-{flag.name}": flag for flag in flags if flag.kind is bool and "/" not in flag.spellings[0]}
    switches = {spelt: flag for spelt, flag in switches.items() if all(spelt not in other.spellings for other in flags)}
    end = list(args).index("--") if "--" in args else len(args)
    kept, back = list(args[:end]), set[str]()
    for spelt, flag in switches.items():
        if spelt not in kept:
            continue
        said = [word for word in kept if word == spelt or word in flag.spellings]
        gone = {spelt, *flag.spellings} if said[-1] == spelt else {spelt}
        kept = [word for word in kept if word not in gone]
        if said[-1] == spelt:
            back.add(flag.name)
    return [*kept, *args[end:]], back


def _refuse_second_file(args: Sequence[str]) -> None:
    """The file would be passed over without a word."""
    end = list(args).index("--") if "--" in args else len(args)
    if sum(word == "--config" or word.startswith("--config=") for word in args[:end]) > 1:
        from moescope.core.errors import InputError

        raise InputError("--config is given twice", expected="one file", fix="put the flags of both into one")


def command(app: typer.Typer, function: Callable[..., Any], name: str | None = None, **options: Any) -> None:
    """Make `function` a command of `app`, with the options that every command has."""
    app.command(name or function.__name__.replace("_", "-"), cls=ConfiguredCommand, **options)(_configurable(function))


def _configurable(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with `--config` and `--show-config` beside its own flags."""

    @functools.wraps(function)
    def run(ctx: typer.Context, config: Path | None, show_config: bool, **given: Any) -> Any:
        if not show_config:
            return function(**given)
        from moescope.cli.config import as_yaml
        from moescope.cli.output import said

        said(as_yaml(words_of(ctx), flags_of(function), given), nl=False)
        return None

    own = inspect.signature(function, eval_str=True)
    extra = [
        inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context),
        inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_Config),
        inspect.Parameter("show_config", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_ShowConfig),
    ]
    parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own.parameters.values()]
    run.__signature__ = inspect.Signature([*parameters, *extra])  # type: ignore[attr-defined]  # typer reads it
    run.__annotations__ = {each.name: each.annotation for each in (*parameters, *extra)}
    run.plain = function  # type: ignore[attr-defined]  # what the manual and the tests read
    del run.__wrapped__  # or typer would read the parameters behind it
    return run


def words_of(ctx: Any) -> str:
    """The words that lead to a command, without the program's: `sae train`."""
    words: list[str] = []
    while ctx.parent is not None:
        words.insert(0, str(ctx.info_name))
        ctx = ctx.parent
    return " ".join(words)


def _plain(callback: Any) -> Callable[..., Any]:
    """The function behind a command's callback, which typer wraps."""
    while not hasattr(callback, "plain"):
        callback = callback.__wrapped__
    plain: Callable[..., Any] = callback.plain
    return plain
