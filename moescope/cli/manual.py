"""The manual, written from the commands themselves: `docs/cli.md` and the man page.

`moescope manual --format markdown` prints the one, `moescope manual --format man` the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from moescope.cli.output import as_json, said
from moescope.cli.parser import Described, Flag, commands, groups
from moescope.core.errors import InputError

_EXIT = (
    (0, "done"),
    (1, "a finding is over a threshold that was set"),
    (2, "misuse or bad input: nothing was done"),
    (3, "something that was asked for is missing from the ledger"),
    (4, "the run failed: disk, model, or an error of the program"),
    (130, "interrupted; what was committed is safe"),
)
_EVERY = (
    (
        "--config FILE.yaml",
        "Read flags from this YAML file, names as keys; the command line wins, --no-FLAG takes a switch back, and relative "
        "paths count from the current folder.",
    ),
    ("--show-config", "Print the options in force as YAML, for --config, and stop."),
    ("--help", "Say what the command does and takes."),
)
_CONFIG = """\
Every command takes its flags from a file as well. Keys are the flags' names, with dashes or underscores; positional
arguments go by their names; a flag that may be repeated takes a list, a switch `true` or `false`. What is typed wins over the
file: a value replaces a value, a list a list, and `--no-FLAG` takes back a switch; of both spellings of a switch the last one
counts. Text comes as it is written, `007` and `1.10` too. Relative paths count from the current folder, and there is one file.

```yaml
# run.yaml
model: demo
store: runs.duckdb
batch-size: 4
probe: [tokens, routing, experts]
```

<!-- not run: the file is the one above -->
```console
$ moescope profile --config run.yaml --name small --dry-run
$ moescope profile --config run.yaml --batch-size 8 --show-config
```

One file serves several commands where each has a section; what stands outside the sections goes to every command that has such
a flag:

```yaml
# both.yaml
store: runs.duckdb
profile:
  model: demo
  name: base
analyze:
  run: [base]
  analysis: [load]
intervene effect:
  model: demo
  edit: ["ablate layer=3 experts=5"]
```

`--show-config` prints the options in force as such a file: defaults, file and command line together. Secrets are left out. A key
that no flag has is an error that names the nearest ones and the line.
"""
_COMPLETION = """\
`moescope --install-completion` sets up completion for the shell in use (bash, zsh, fish, PowerShell), `--show-completion`
prints it. Tab then offers commands and flags, and for values: runs and autoencoders of the store that is typed, analyses and
their parameters, probes, edits and tables. A store is opened for reading alone; one that is in use or missing offers nothing,
and names that a shell would not take as they stand are left out.
"""
_RULES = """\
Flags are named as the parameters of the Python functions and have their defaults, but for a few: `--sae` is `autoencoder`, `sae
judge --documents` is `held_out`, `sae circuit --name` is `run_name`, and `sae steer --strengths` begins at 0. A flag in the
singular that Python names in the plural (`--probe`, `--site`, `--sae`) may be repeated, or hold several names with commas.
`--json` prints data as JSON on stdout; news and progress go to stderr. `--dry-run` checks everything, says what would be done,
and stops. Sizes are in bytes (`500MB`, `1.5GiB`), times in seconds, losses in nats, shares from 0 to 1, layers, experts and
latents from 0.
"""


def manual(
    format: Annotated[  # noqa: A002  the flag's name
        str, typer.Option(help="markdown, man or json.")
    ] = "markdown",
) -> None:
    """Print the manual of all commands, from the commands themselves.

    Example: moescope manual --format man
    """
    from moescope.cli.app import app

    known = {"markdown": markdown_page, "man": man_page}
    if format == "json":
        as_json([_data(each) for each in _shown(app)])
    elif format in known:
        said(known[format](app), nl=False)
    else:
        raise InputError(f"there is no format {format!r}", expected=", ".join((*known, "json")))


def _shown(app: typer.Typer) -> list[Described]:
    return [each for each in commands(app) if not each.hidden]


def markdown_page(app: typer.Typer) -> str:
    """The page docs/cli.md."""
    told = groups(app)
    lines = [
        "# Command line", "",
        "`moescope manual --format markdown` prints this page from the commands themselves.", "",
        _RULES, "| command | what it does |", "|---|---|",
    ]  # fmt: skip
    lines += [f"| [`{each.name}`](#{_anchor(each)}) | {_cell(each.summary)} |" for each in _shown(app)]
    codes = [f"| {code} | {meaning} |" for code, meaning in _EXIT]
    lines += ["", "## Exit codes", "", "| code | meaning |", "|---|---|", *codes]
    lines += ["", "## Files of options", "", _CONFIG, "## Completion", "", _COMPLETION]
    group = ""
    for each in _shown(app):
        first, _, rest = each.name.partition(" ")
        if rest and first != group:
            lines += [f"## moescope {first}", "", told[first].split("\n\n")[0], ""]
        group = first
        lines += [*_section(each, "###" if rest else "##"), ""]
    return "\n".join(lines).rstrip() + "\n"


def _anchor(each: Described) -> str:
    return f"moescope-{each.name.replace(' ', '-')}"


def _section(each: Described, heading: str) -> Iterator[str]:
    yield f"{heading} moescope {each.name}"
    yield ""
    yield each.text
    yield ""
    for example in each.examples:
        yield f"    {example}"
    yield ""
    yield f"Usage: `{_usage(each)}`"
    yield ""
    yield "| argument or flag | takes | default | what it does |"
    yield "|---|---|---|---|"
    for flag in each.flags:
        spelt = f"`{flag.name}`" if flag.positional else ", ".join(f"`{text}`" for text in _spelt(flag))
        takes = f"`{_cell(_takes(flag))}`" if _takes(flag) else ""
        yield f"| {spelt} | {takes} | {_cell(_default(flag))} | {_cell(flag.help)} |"


def _usage(each: Described) -> str:
    places = [f"{flag.name.upper()}{'…' if flag.repeatable else ''}" for flag in each.flags if flag.positional]
    needed = [f"--{flag.name} {_takes(flag).upper()}" for flag in each.flags if flag.required and not flag.positional]
    return " ".join(["moescope", each.name, *places, *needed, "[OPTIONS]"])


def _spelt(flag: Flag) -> list[str]:
    return [part for text in flag.spellings for part in text.split("/")]


def _takes(flag: Flag) -> str:
    said = flag.takes()
    if flag.kind in (int, float) and (flag.least is not None or flag.most is not None):
        least = "" if flag.least is None else f"{flag.least:g}"
        said += f" {least} to {flag.most:g}" if flag.most is not None else f" ≥ {least}"
    return " ".join([said] * flag.values) + (" …" if flag.repeatable and said else "")


def _default(flag: Flag) -> str:
    words = flag.source.show_default
    if isinstance(words, str):
        return words
    if flag.required:
        return "required"
    if flag.kind is bool:
        return "yes" if flag.default else "no"
    if isinstance(flag.default, (list, tuple)):
        return f"`{','.join(map(str, flag.default))}`"
    return "none" if flag.default is None else f"`{flag.default}`"


def _cell(text: str) -> str:
    """Text for a cell of a Markdown table: no bars, and no marks that would be read as emphasis, HTML or formulas."""
    return re.sub(r"([|*<>_$])", r"\\\1", text) if "`" not in text else text.replace("|", "\\|")


def _data(each: Described) -> dict[str, Any]:
    flags = [
        {
            "name": flag.name, "spellings": _spelt(flag), "takes": _takes(flag), "default": flag.default, "in words": _default(flag),
            "required": flag.required, "help": flag.help,
        }
        for flag in each.flags
    ]  # fmt: skip
    return {"command": each.name, "text": each.text, "examples": each.examples, "flags": flags}


def man_page(app: typer.Typer) -> str:
    """The page moescope.1, in the macros of man(7)."""
    from moescope.core.versions import VERSION

    lines = [
        f'.TH MOESCOPE 1 "" "moescope {VERSION}" "User Commands"',
        ".SH NAME",
        f"moescope \\- {_roff(_about(app))}",
    ]
    lines += [
        ".SH SYNOPSIS",
        ".B moescope",
        ".I COMMAND",
        "[\\fIOPTIONS\\fR]",
        ".SH DESCRIPTION",
        _roff(_RULES.strip()),
    ]
    lines += [".SH COMMANDS"]
    for each in _shown(app):
        lines += [f".SS {_roff(_usage(each))}", _roff(each.text)]
        for flag in each.flags:
            name = flag.name.upper() if flag.positional else ", ".join(_spelt(flag))
            lines += [".TP", f"\\fB{_roff(name)}\\fR {_roff(_takes(flag))}".rstrip(), _roff(_sentence(flag))]
        for example in each.examples:
            lines += [".PP", ".EX", _roff(example), ".EE"]
    lines += [".SH OPTIONS OF EVERY COMMAND"]
    lines += [line for name, said in _EVERY for line in (".TP", f"\\fB{_roff(name)}\\fR", _roff(said))]
    lines += [".SH EXIT STATUS"]
    lines += [line for code, said in _EXIT for line in (".TP", f"\\fB{code}\\fR", _roff(said))]
    lines += [".SH FILES", _roff(_COMPLETION.strip().replace("`", "")), ".SH ENVIRONMENT"]
    lines += [
        ".TP",
        "\\fBMOESCOPE_TOKEN\\fR",
        "Secret of the dashboard.",
        ".TP",
        "\\fBMOESCOPE_DEBUG\\fR",
        "1 shows tracebacks.",
    ]
    return "\n".join(lines) + "\n"


def _about(app: typer.Typer) -> str:
    return str(app.info.help).rstrip(".")


def _sentence(flag: Flag) -> str:
    default = _default(flag).replace("`", "")
    said = flag.help or "."
    return f"{said} " + ("Required." if default == "required" else f"Default: {default}.")


def _roff(text: str) -> str:
    """Text that means nothing to the formatter: backslashes, hyphens, and dots and quotes at the start of a line."""
    plain = text.replace("\\", "\\e").replace("-", "\\-").replace("`", "")
    return re.sub(r"^([.'])", r"\\&\1", plain, flags=re.MULTILINE)
