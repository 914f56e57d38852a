"""`moescope intervene contrast`: the experts that tell two sets of prompts apart, and what changing them does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    BatchSize,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    Json,
    MaxLength,
    Model,
    Output,
    Revision,
    Seed,
    SkipBad,
    TextField,
    Trust,
)
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result

_INCOMPLETE = 3

PromptsA = Annotated[str, typer.Option(help="First set of prompts: .jsonl, .csv, .parquet or .txt.")]
PromptsB = Annotated[str, typer.Option(help="Second set of prompts: .jsonl, .csv, .parquet or .txt.")]
StorePath = Annotated[
    Path, typer.Option(help="DuckDB file for the two runs and the effects; made where it is not there.")
]
Name = Annotated[str, typer.Option(help="Name of the two runs: NAME: chosen on, NAME: tested on.")]
Labels = Annotated[str, typer.Option(help="Names of the two sets, with a comma between.")]
Method = Annotated[
    str, typer.Option(help="How experts are ranked: risk_difference, prompt_mean, resonance, or npmi of --words.")
]
Tokens = Annotated[
    str, typer.Option(help="Which tokens count: all, prompt, last, a span such as 0:10, or token:13 (an id).")
]
Words = Annotated[str | None, typer.Option(help="For npmi: token ids or texts, comma-separated.", show_default="none")]
Suppress = Annotated[int, typer.Option(min=0, help="How many of the first set's experts to suppress.")]
Stimulate = Annotated[int, typer.Option(min=0, help="How many of them to stimulate.")]
Steer = Annotated[
    str | None,
    typer.Option(
        help="Steer towards the first set as SteerMoE does, as well: experts to force, experts to route around: 5,50.",
        show_default="not steered",
    ),
]
SuppressBy = Annotated[
    str, typer.Option(help="How experts are suppressed: route_around, renormalise, zero, bias or scale.")
]
StimulateBy = Annotated[str, typer.Option(help="How experts are stimulated: force, bias or scale.")]
Amount = Annotated[float | None, typer.Option(help="Of bias, in logits, and of scale, a factor.", show_default="2")]
Controls = Annotated[int, typer.Option(min=1, help="Random sets of experts for each intervention.")]
Desired = Annotated[
    list[str] | None,
    typer.Option(help="A continuation that is wanted after the prompts, repeatable.", show_default="none"),
]
Undesired = Annotated[
    list[str] | None, typer.Option(help="A continuation that is not wanted, repeatable.", show_default="none")
]

_CHOICES = {
    "method": ("risk_difference", "prompt_mean", "resonance", "npmi"),
    "suppress-by": ("route_around", "renormalise", "zero", "bias", "scale"),
    "stimulate-by": ("force", "bias", "scale"),
}


def contrast(
    model: Model,
    prompts_a: PromptsA,
    prompts_b: PromptsB,
    store: StorePath = Path("runs.duckdb"),
    name: Name = "contrast",
    labels: Labels = "a,b",
    method: Method = "risk_difference",
    tokens: Tokens = "all",
    words: Words = None,
    suppress: Suppress = 10,
    stimulate: Stimulate = 0,
    steer: Steer = None,
    suppress_by: SuppressBy = "route_around",
    stimulate_by: StimulateBy = "force",
    amount: Amount = None,
    controls: Controls = 5,
    desired: Desired = None,
    undesired: Undesired = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 512,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    text_field: TextField = "text",
    skip_bad_lines: SkipBad = False,
    seed: Seed = 0,
    output: Output = None,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find the experts that tell two sets of prompts apart; suppress and stimulate them on other prompts, beside random ones.

    Example: moescope intervene contrast demo --prompts-a rude.jsonl --prompts-b kind.jsonl --store runs.duckdb --suppress 10 --stimulate 10
    """
    from moescope.contrast_api import contrast as run_contrast
    from moescope.core.positions import read_positions
    from moescope.probes.attribution.contrast_prompts import halved
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.store.store import Store

    for flag, value in (("method", method), ("suppress-by", suppress_by), ("stimulate-by", stimulate_by)):
        if value not in _CHOICES[flag]:
            raise InputError(f"--{flag} cannot be {value!r}", expected=", ".join(_CHOICES[flag]))
    if tokens != "last":
        read_positions(tokens)
    names = _two(labels, "--labels", str)
    counts = None if steer is None else _two(steer, "--steer", int)
    set_a, set_b = (
        Corpus.load(path, text_field=text_field, skip_bad_lines=skip_bad_lines) for path in (prompts_a, prompts_b)
    )
    halves = halved(set_a, set_b, labels=names, seed=seed)
    if dry_run:
        plan = {
            "model": model,
            "experts chosen on": sum(1 for _ in halves.chosen_on),
            "tested on": sum(1 for _ in halves.tested_on),
            "interventions": bool(suppress) + bool(stimulate) + (counts is not None),
            "controls each": controls,
        }
        as_json(plan) if json else facts(plan)
        return
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    given: Any = {"method": method, "suppress_by": suppress_by, "stimulate_by": stimulate_by}
    with Store(store) as opened:
        result = run_contrast(
            live,
            set_a,
            set_b,
            opened,
            name=name,
            labels=names,
            tokens=tokens,
            words=words,
            suppress=suppress,
            stimulate=stimulate,
            steer=counts,
            amount=amount,
            controls=controls,
            desired=desired or (),
            undesired=undesired or (),
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            **given,
        )
    if output:
        result.save(output)
        news(f"saved {output}")
    as_json(result.as_json()) if json else _print(result)
    if result.incomplete:
        raise typer.Exit(_INCOMPLETE)


def _two(text: str, flag: str, kind: type) -> tuple[Any, Any]:
    parts = [part.strip() for part in text.split(",")]
    try:
        first, second = (kind(part) for part in parts)
    except ValueError:
        wanted = "two numbers" if kind is int else "two names"
        raise InputError(f"{flag} cannot be {text!r}", expected=f"{wanted}, divided by a comma") from None
    return first, second


def _print(result: Result) -> None:
    from moescope.core.html import cell

    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    columns = ["intervention", "label", "metric", "value", "ci_low", "ci_high", "null", "null_low", "null_high", "n"]
    targets = [row for row in result.table.to_pylist() if row["kind"] == "target"]
    table(columns, [[cell(row[name]) for name in columns] for row in targets])
    said("")
    facts(result.facts())
