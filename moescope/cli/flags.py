"""Flags that several commands share, each said once: its help, unit, range, completion, and the panel it stands in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moescope.cli.completion import autoencoder_names, edit_words, probe_names, run_names

MODEL, CORPUS, RECORDING, OUTPUT = "Model", "Corpus", "What is recorded", "Output"
MEASURED, SIZE = "What is measured", "Size and speed"

_INHERITED = "the base run's, else {}"


def _option(*spelt: str, panel: str | None = None, **more: Any) -> Any:
    return typer.Option(*spelt, rich_help_panel=panel, **more)


def _words(*spelt: str, panel: str | None = None, **more: Any) -> Any:
    """An option whose default the help says in words, or that has none."""
    return _option(*spelt, panel=panel, **({"show_default": False} | more))


# The model
Model = Annotated[str, typer.Argument(help='"demo", a Hub id, a folder, or a .gguf file.', show_default=False)]
Device = Annotated[
    str, _option(panel=MODEL, help="Where it runs: auto (a GPU where there is one), cpu, cuda, cuda:1, ….")
]
DeviceMap = Annotated[
    str | None, _words(panel=MODEL, help="auto: spread the model over all devices instead.", show_default="one device")
]
Dtype = Annotated[
    str, _option(panel=MODEL, help="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
]
Revision = Annotated[
    str | None, _words(panel=MODEL, help="Branch, tag or commit on the Hub.", show_default="the main branch")
]
Trust = Annotated[bool, _option("--trust-remote-code", panel=MODEL, help="Run Python code that comes with the model.")]
UseModel = Annotated[
    str | None,
    _words(
        "--model",
        panel=MODEL,
        help='"demo", a Hub id, a folder, or a .gguf file.',
        show_default="none, and nothing that needs one",
    ),
]

# The corpus
Data = Annotated[
    str | None,
    _words(
        panel=CORPUS,
        help="Texts: a .jsonl, .csv, .parquet or .txt file, or a folder of them.",
        show_default="the bundled labelled corpus",
    ),
]
TextField = Annotated[str, _option(panel=CORPUS, help="Field of a record that holds the text.")]
LabelField = Annotated[str, _option(panel=CORPUS, help="Field of a record that holds the label.")]
SkipBad = Annotated[
    bool, _option("--skip-bad-lines", panel=CORPUS, help="Count unreadable records instead of stopping.")
]

# The store
Store = Annotated[Path, typer.Argument(help="The store, a DuckDB file.")]
GivenStore = Annotated[Path, typer.Argument(help="The store, a DuckDB file.", show_default=False)]
InStore = Annotated[Path, typer.Option("--store", help="The store, a DuckDB file.")]
StorePath = Annotated[Path, typer.Option("--store", help="DuckDB file to record into; made where it is not there.")]
BaseStore = Annotated[
    Path,
    typer.Option("--store", help="DuckDB file of the base run, which gets the effects; made where it is not there."),
]
Name = Annotated[str | None, _words(help="Name of the run.", show_default="the model's, numbered")]
OneRun = Annotated[
    str | None, _words("--run", help="Name of the run.", show_default="the only one", autocompletion=run_names)
]
Base = Annotated[
    str | None,
    _words(
        help="Name of the unedited model's run.",
        show_default="one that fits, or one recorded now",
        autocompletion=run_names,
    ),
]
OneSae = Annotated[str, _words("--sae", help="The autoencoder, by name or id.", autocompletion=autoencoder_names)]
UseSae = Annotated[
    str | None,
    _words("--sae", help="The autoencoder, by name or id.", show_default="none", autocompletion=autoencoder_names),
]

# What is recorded
Probe = Annotated[
    list[str] | None,
    _words(
        panel=RECORDING,
        help="Probes, comma-separated or repeated.",
        show_default="tokens,routing,experts,residual",
        autocompletion=probe_names,
    ),
]
Sites = Annotated[
    list[str] | None,
    _words(
        panel=RECORDING,
        help="Also keep whole vectors at these sites, comma-separated or repeated: blocks.3.hook_resid_post,….",
        show_default="none",
    ),
]
Sample = Annotated[
    float, _option(panel=RECORDING, help="Share of the tokens whose vectors are kept at --site: over 0, at most 1.")
]
Generate = Annotated[
    int,
    _option(
        panel=RECORDING, min=0, help="Continue every sequence greedily by up to so many tokens, and record those too."
    ),
]
Budget = Annotated[
    str | None,
    _words(
        panel=RECORDING,
        help="Bytes on disk that the run may take: 500MB, 2GB, 1.5GiB, …; what does not fit is left out.",
        show_default="no limit",
    ),
]
Padding = Annotated[
    str | None,
    _words(
        panel=SIZE,
        help="Fill up shorter sequences at the left or right.",
        show_default="left with --generate, else right",
    ),
]
BatchSize = Annotated[int, _option(panel=SIZE, min=1, help="Sequences a forward pass.")]
MaxLength = Annotated[
    int, _option(panel=SIZE, min=2, help="Tokens of the longest sequence; longer documents are split.")
]
BaseBatchSize = Annotated[
    int | None,
    _words("--batch-size", panel=SIZE, min=1, help="Sequences a forward pass.", show_default=_INHERITED.format(8)),
]
BaseMaxLength = Annotated[
    int | None,
    _words(
        "--max-length", panel=SIZE, min=2, help="Tokens of the longest sequence.", show_default=_INHERITED.format(512)
    ),
]
Workers = Annotated[
    int, _option(panel=SIZE, min=1, help="Record with so many workers on Ray, each with its own copy of the model.")
]
RayAddress = Annotated[
    str | None,
    _words(
        panel=SIZE,
        help="Ray cluster to record on: auto, host:port, ray://….",
        show_default="a Ray on this machine, for --workers",
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with the run of this name after its last whole chunk, if it was stopped."),
]

# What is measured
EditWords = Annotated[
    list[str] | None,
    _words(
        "--edit",
        panel=MEASURED,
        help="An edit in words, repeatable: 'ablate layer=3 experts=5,9 how=route_around'; they act in this order.",
        show_default="none",
        autocompletion=edit_words,
    ),
]
InterventionFile = Annotated[
    Path | None, _words("--intervention", panel=MEASURED, help="A saved intervention, instead of --edit.")
]
SaveIntervention = Annotated[
    Path | None, _words("--save-intervention", panel=OUTPUT, help="Also save the intervention here, as JSON.")
]
Prompts = Annotated[int, _option(panel=MEASURED, min=1, help="How many texts --generate continues.")]
Documents = Annotated[
    str, _option(panel=MEASURED, help="Documents that count: held_out, which training did not see, or all.")
]
Window = Annotated[int, _option(panel=MEASURED, min=1, help="Tokens of an example.")]
Seed = Annotated[int, typer.Option(min=0, help="Decides everything random; the same seed gives the same numbers.")]

# What comes out
Report = Annotated[Path | None, _words(panel=OUTPUT, help="Also write an HTML report here.")]
Output = Annotated[
    Path | None, _words(panel=OUTPUT, help="Also save the answer: .html, .png, .svg, .csv, .parquet or .json.")
]
Rows = Annotated[int, _option(panel=OUTPUT, min=0, help="Rows of a table to print; csv and json have all.")]
DryRun = Annotated[bool, _option("--dry-run", panel=OUTPUT, help="Check everything, say what would be done, and stop.")]
Json = Annotated[bool, _option("--json", panel=OUTPUT, help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def listed(texts: list[str] | None) -> list[str]:
    """The values of a flag that is repeated or holds commas, in their order.

    Example:
        >>> listed(["tokens,routing", "experts"])
        ['tokens', 'routing', 'experts']
    """
    return [part for text in texts or () for part in text.replace(" ", "").split(",")]
