"""`moescope sae describe`: descriptions of units in words, with scores, from any program that answers prompts."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moescope.cli.export import only_run
from moescope.cli.flags import (
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    InStore,
    Json,
    OneRun,
    Revision,
    Seed,
    Trust,
    UseModel,
    UseSae,
)
from moescope.cli.output import as_json, news, table
from moescope.cli.sae.asked import tell_plan
from moescope.cli.store_check import check_store

if TYPE_CHECKING:
    from moescope.sae.concepts.describe import Descriptions

_Command = Annotated[
    str,
    typer.Option(
        "--command",
        help='Program that reads a prompt on its standard input and writes the answer: "llm -m x". No shell takes part.',
        show_default=False,
        hide_input=True,  # it may hold a key
    ),
]
_Units = Annotated[list[int], typer.Option("--unit", min=0, help="Number of a unit; repeatable.", show_default=False)]
_Kind = Annotated[str, typer.Option(help="What a unit is: latent, expert, neuron or head.")]
_Layer = Annotated[
    int | None, typer.Option(min=0, help="Layer of experts, neurons and heads, from 0.", show_default="none")
]
_Describer = Annotated[
    str | None,
    typer.Option(
        help="The name that is stored; of one program with several models, a name each.",
        show_default="the command's first word",
    ),
]
_Scores = Annotated[
    list[str] | None,
    typer.Option("--score", help="detection, fuzzing or causal; repeatable.", show_default="the first two"),
]
_Examples = Annotated[int, typer.Option(min=1, help="Windows of text that the describer is shown.")]
_Judged = Annotated[int, typer.Option(min=4, help="Windows of text that a score asks about.")]
_Width = Annotated[int, typer.Option(min=4, help="Tokens of a window.")]
_Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that an answer may take.")]


def describe(
    command: _Command,
    unit: _Units,
    store: InStore = Path("runs.duckdb"),
    run: OneRun = None,
    unit_kind: _Kind = "latent",
    sae: UseSae = None,
    layer: _Layer = None,
    block: Annotated[str, typer.Option(help="Sublayer of experts and neurons.")] = "mlp",
    describer: _Describer = None,
    score: _Scores = None,
    model: UseModel = None,
    examples: _Examples = 20,
    judged: _Judged = 20,
    width: _Width = 32,
    timeout: _Timeout = 120.0,
    again: Annotated[bool, typer.Option("--again", help="Describe anew what this describer has described.")] = False,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Have units described in words, and score what the descriptions foretell.

    Example: moescope sae describe --command "llm -m x" --store runs.duckdb --sae topk-4096-k32 --unit 7 --unit 12
    """
    from moescope.sae.concepts.command import completion_command
    from moescope.sae.concepts.describe import describe as write
    from moescope.store.store import Store

    complete = completion_command(command, timeout=timeout)
    check_store(store)
    if dry_run:
        tell_plan(
            store,
            run=run,
            saes=[] if sae is None else [sae],
            model=model,
            json=json,
            units=len(unit),
            command=_program(command),
        )
        return
    with Store(store) as opened:
        found = only_run(opened, run)
        autoencoder = live = None
        if sae is not None:
            from moescope.sae.loading import load_autoencoder

            autoencoder = load_autoencoder(opened, sae)
        if model is not None:
            from moescope.probes.loading import load

            live = load(
                model,
                device=device,
                device_map=device_map,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
        if autoencoder is not None and live is not None:
            from moescope.sae.belonging import check_belongs

            check_belongs(autoencoder, live)
        outcome = write(
            opened, found, complete=complete, units=unit, unit_kind=unit_kind, sae=autoencoder, layer=layer, block=block,  # type: ignore[arg-type]  # checked there
            describer=describer or _program(command), scores=score if score is not None else ("detection", "fuzzing"), model=live,  # type: ignore[arg-type]  # checked there
            examples=examples, judged=judged, width=width, again=again, seed=seed, progress=not json,
        )  # fmt: skip
    if json:
        as_json(dataclasses.asdict(outcome))
    else:
        _print(outcome)
    for note in outcome.notes:
        news(note)
    news(f"{outcome.calls:,} prompts, {outcome.retries:,} of them again")


def _program(command: str) -> str:
    """The first word of a command; those behind it may hold a key, and are neither printed nor stored."""
    return shlex.split(command)[0]


def _print(outcome: Descriptions) -> None:
    """Descriptions, with the scores measured now."""
    values = {(row["unit"], row["metric"]): row["value"] for row in outcome.rows if "null_kind" in row}
    others = {
        (row["unit"], row["metric"]): row["null_value"]
        for row in outcome.rows
        if row.get("null_kind") == "another unit's description"
    }
    scores: dict[int, list[str]] = {}
    for key, value in values.items():
        beside = f" (another's {others[key]:.2f})" if key in others else ""
        scores.setdefault(key[0], []).append(f"{key[1]} {value:.2f}{beside}")
    table(
        [outcome.unit_kind, "description", "scores measured now"],
        [[unit, text, ", ".join(scores.get(unit, [])) or "—"] for unit, text in outcome.texts.items()],
    )
