"""What the command line takes, read from its commands: for files of options, the manual, and tests."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.models import ArgumentInfo, OptionInfo, TyperInfo

_UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Flag:
    """One flag, or one positional argument, of a command.

    Args:
        name: as it is typed, without dashes: `batch-size`; of an argument its name: `model`.
        variable: the parameter of the command's function.
        spellings: all ways to type it: `--yes`, `-y`; none for an argument.
        kind: the type of one value.
        repeatable: whether several values may be given.
        values: how many values one occurrence takes.
        default: what holds where it is not given; None where the help says it in words, or where it is required.
        required: whether the command needs it.
        least: the smallest number allowed.
        most: the largest number allowed.
        help: what it does.
        panel: the heading it stands under in the help.
        secret: whether its value is kept out of what is printed.
        source: the parameter's own description, with its completion.
    """

    name: str
    variable: str
    spellings: tuple[str, ...]
    kind: Any
    repeatable: bool
    values: int
    default: Any
    required: bool
    least: float | None
    most: float | None
    help: str
    panel: str | None
    secret: bool
    source: OptionInfo | ArgumentInfo

    @property
    def positional(self) -> bool:
        """Whether it is told by its place."""
        return not self.spellings

    @property
    def choices(self) -> tuple[str, ...]:
        """The only values there are, where it is one of a few words."""
        return tuple(map(str, get_args(self.kind))) if get_origin(self.kind) is Literal else ()

    def takes(self) -> str:
        """The type in a word: `number`, `text`, `path`; empty for a switch."""
        if self.kind is bool:
            return ""
        if self.choices:
            return "|".join(self.choices)
        return {int: "integer", float: "number", Path: "path"}.get(self.kind, "text")


@dataclass(frozen=True)
class Described:
    """One command: its name with that of its group, its text, and its flags."""

    name: str
    function: Callable[..., Any]
    help: str
    flags: tuple[Flag, ...]
    hidden: bool = False

    @property
    def summary(self) -> str:
        """The first paragraph of its help."""
        return self.help.split("\n\n")[0].replace("\n", " ")

    @property
    def examples(self) -> list[str]:
        """The commands that its help shows."""
        lines = (line.strip() for line in self.help.splitlines())
        return [line.removeprefix("Example:").strip() for line in lines if line.startswith("Example:")]

    @property
    def text(self) -> str:
        """Its help without the examples."""
        return "\n\n".join(part for part in self.help.split("\n\n") if not part.lstrip().startswith("Example:"))


def commands(app: typer.Typer, group: str = "") -> Iterator[Described]:
    """Every command below `app`, with the words that lead to it as its name."""
    for info in app.registered_commands:
        function = info.callback
        assert function is not None
        own: Callable[..., Any] = getattr(function, "plain", function)
        name = info.name or own.__name__.replace("_", "-")
        yield Described(
            f"{group} {name}".strip(), own, inspect.cleandoc(own.__doc__ or ""), flags_of(own), bool(info.hidden)
        )
    for held in app.registered_groups:
        if held.typer_instance is not None:
            yield from commands(held.typer_instance, f"{group} {held.name}".strip())


def groups(app: typer.Typer) -> dict[str, str]:
    """The groups of `app` and what their help says."""
    return {str(held.name): _group_help(held) for held in app.registered_groups}


def _group_help(held: TyperInfo) -> str:
    assert held.typer_instance is not None
    return inspect.cleandoc(str(held.typer_instance.info.help or ""))


def flags_of(function: Callable[..., Any]) -> tuple[Flag, ...]:
    """The flags and arguments that a command's function declares, in its order.

    Example:
        >>> def show(path: Annotated[str, typer.Argument(help="The file.")], rows: Annotated[int, typer.Option(min=1)] = 5): ...
        >>> [(flag.name, flag.default, flag.positional) for flag in flags_of(show)]
        [('path', None, True), ('rows', 5, False)]
    """
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    return tuple(flag for parameter in parameters if (flag := _flag(parameter)) is not None)


def _flag(parameter: inspect.Parameter) -> Flag | None:
    if get_origin(parameter.annotation) is not Annotated:
        return None  # the context, which is no flag
    annotation, *notes = get_args(parameter.annotation)
    info = next(note for note in notes if isinstance(note, (OptionInfo, ArgumentInfo)))
    kind, repeatable, values = _kind(annotation)
    spelt: tuple[str, ...] = ()
    if isinstance(info, OptionInfo):
        first = () if info.default in (None, ...) else (str(info.default),)  # where typer keeps the first spelling
        spelt = (*first, *(info.param_decls or ())) or (f"--{parameter.name.replace('_', '-')}",)
    name = spelt[0].split("/")[0].removeprefix("--") if spelt else parameter.name
    required = parameter.default is inspect.Parameter.empty
    return Flag(
        name, parameter.name, spelt, kind, repeatable, values, None if required else parameter.default, required,
        info.min, info.max, info.help or "", getattr(info, "rich_help_panel", None), bool(getattr(info, "hide_input", False)), info,
    )  # fmt: skip


def _kind(annotation: Any) -> tuple[Any, bool, int]:
    """The type of one value, whether the flag is repeatable, and how many values it takes at a time."""
    if get_origin(annotation) in _UNIONS:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is list:
        return get_args(annotation)[0], True, 1
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], False, len(get_args(annotation))
    return annotation, False, 1
