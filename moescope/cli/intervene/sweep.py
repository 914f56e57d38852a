"""`moescope intervene sweep`: many interventions of one kind, measured, stored and answered as one result."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    SIZE,
    Base,
    BaseBatchSize,
    BaseMaxLength,
    BaseStore,
    Data,
    Device,
    DeviceMap,
    DryRun,
    Dtype,
    EditWords,
    InterventionFile,
    Json,
    LabelField,
    Model,
    Output,
    Prompts,
    Revision,
    Seed,
    SkipBad,
    TextField,
    Trust,
)
from moescope.cli.import_ import read_layers
from moescope.cli.intervene.asked import asked_intervention
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result

_ENDINGS = (".html", ".png", ".svg", ".csv", ".parquet", ".json")
_HOWS = ("zero", "route_around", "renormalise", "mean", "copy")
_KINDS_OF = {
    "shares": ("drop", "keep", "top_p"),
    "numbers": ("top_k",),
    "score": ("drop", "keep"),
    "screen": ("experts",),
    "highest": ("drop",),
}

Kind = Annotated[
    str,
    typer.Option(
        help="experts (each alone), drop and keep (sets by score), top_k, top_p, routing_value (random routing), dose."
    ),
]
How = Annotated[
    str | None,
    typer.Option(
        help=f"How experts are taken out: {', '.join(_HOWS)}.",
        show_default="zero; for drop route_around",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(help="Layers, as in 0,3 or 2-5; not for drop, keep and dose.", show_default="all that route"),
]
Score = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure of the analysis importance that drop and keep go by, repeatable.",
        show_default="frequency",
    ),
]
Shares = Annotated[
    str | None,
    typer.Option(
        help="Shares of experts (of scores for top_p), from 0 to 1, comma-separated: 0.1,0.25,0.5.",
        show_default="what the kind needs",
    ),
]
Numbers = Annotated[
    str | None,
    typer.Option(help="Experts a token for top_k, comma-separated: 1,2,4.", show_default="all up to the model's"),
]
Strengths = Annotated[
    str, typer.Option(help="Factors of the intervention's amount, for dose, comma-separated: 0.5,1,2.")
]
Screen = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="Estimate all experts in one pass, and run only so many of the highest exactly.",
        show_default="run all exactly",
    ),
]
Verify = Annotated[
    int, typer.Option(min=0, help="With --screen: so many other experts, at random, are run exactly too.")
]

PassSize = Annotated[
    int | None,
    typer.Option(
        "--pass-size",
        rich_help_panel=SIZE,
        min=1,
        help="Pairs of an intervention and a sequence that share one edited pass.",
        show_default="as many as a batch has sequences",
    ),
]


def sweep(
    model: Model,
    kind: Kind = "experts",
    how: How = None,
    layers: Layers = None,
    score: Score = None,
    shares: Shares = None,
    numbers: Numbers = None,
    across: Annotated[
        str, typer.Option(help="Whether the experts of drop compete in their layer or in the model: layer or model.")
    ] = "layer",
    highest: Annotated[bool, typer.Option("--highest", help="For drop: take out the highest scores.")] = False,
    controls: Annotated[int, typer.Option(min=0, help="Random sets beside each set, or seeds of random routing.")] = 5,
    edit: EditWords = None,
    intervention: InterventionFile = None,
    strengths: Strengths = "0.25,0.5,1,2",
    generate: Annotated[int, typer.Option(min=0, help="For dose: tokens written after each prompt; 0 for none.")] = 32,
    prompts: Prompts = 16,
    screen: Screen = None,
    verify: Verify = 16,
    data: Data = None,
    store: BaseStore = Path("runs.duckdb"),
    base: Base = None,
    batch_size: BaseBatchSize = None,
    max_length: BaseMaxLength = None,
    pass_size: PassSize = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the same sweep where it was stopped.")] = False,
    output: Output = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    skip_bad_lines: SkipBad = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Take every expert out alone, or sets of them by score; try other numbers of experts, random routing, or doses.

    Example: moescope intervene sweep demo --store runs.duckdb --screen 20 --output experts.html

    Example: moescope intervene sweep demo --kind drop --score frequency --shares 0.1,0.25,0.5
    """
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.sweep_api import sweep as run_sweep
    from moescope.sweep_api import sweep_cost

    _check_belongs(kind, shares=shares, numbers=numbers, score=score, screen=screen, highest=highest or None)
    options: dict[str, Any] = _options(kind, how, layers, shares, numbers, across, strengths)
    options |= {"highest": highest, "controls": controls, "generate": generate, "prompts": prompts, "screen": screen}
    options |= {"verify": verify, "seed": seed, "scores": score or "frequency"}
    if kind == "dose":
        options["intervention"] = asked_intervention(edit, intervention)
    elif edit is not None or intervention is not None:
        raise InputError("--edit and --intervention are for --kind dose", fix="moescope intervene effect measures one")
    _check_paths(output, store)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    if data is None:
        news(f"no --data: using the bundled labelled corpus of {corpus.facts().documents} documents")
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    sizes: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length, "pass_size": pass_size}
    if dry_run or not json:
        cost = sweep_cost(live, corpus, **options, **sizes)
        if dry_run:
            told = {**vars(cost), "model": repr(live), "store": str(store), "kind": kind}
            as_json(told) if json else facts({"cost": str(cost), "model": repr(live), "store": str(store)})
            return
        news(str(cost))
    from moescope.store.store import Store

    with Store(store) as opened:
        answer = run_sweep(live, corpus, opened, base=base, resume=resume, progress=not json, **options, **sizes)
        if output is not None:
            answer.save(output)
            news(f"saved {output}")
    as_json(answer.as_json()) if json else _print(answer)


def _options(
    kind: str,
    how: str | None,
    layers: str | None,
    shares: str | None,
    numbers: str | None,
    across: str,
    strengths: str,
) -> dict[str, Any]:
    """Texts of the command line as what they stand for."""
    from moescope.probes.sweeps.perform import KINDS
    from moescope.probes.sweeps.plans import as_floats

    for name, value, known in (("kind", kind, KINDS), ("how", how, _HOWS), ("across", across, ("layer", "model"))):
        if value is not None and value not in known:
            raise InputError(f"--{name} cannot be {value!r}", expected=", ".join(known))
    return {
        "kind": kind,
        "how": how,
        "layers": None if layers is None else read_layers(layers),
        "shares": None if shares is None else as_floats(shares),
        "numbers": None if numbers is None else [_whole(x) for x in as_floats(numbers)],
        "across": across,
        "strengths": as_floats(strengths),
    }


def _check_belongs(kind: str, **given: Any) -> None:
    """A flag of another kind would do nothing, and say nothing."""
    from moescope.probes.sweeps.perform import KINDS

    for name, value in given.items():
        if kind in KINDS and value is not None and kind not in _KINDS_OF[name]:
            raise InputError(
                f"--{name} is nothing for --kind {kind}", expected=f"--kind {' or '.join(_KINDS_OF[name])}"
            )


def _whole(number: float) -> int:
    if not math.isfinite(number) or number != int(number):
        raise InputError(f"{number:g} is no number of experts", expected="a whole number")
    return int(number)


def _check_paths(output: Path | None, store: Path) -> None:
    """What can be wrong with the paths, found before the model is loaded."""
    if output is not None and output.suffix not in _ENDINGS:
        raise InputError(f"an answer cannot be saved as {output}", expected=f"a path ending in {', '.join(_ENDINGS)}")
    for path in (output, store):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}", found="no such folder", fix=f"mkdir -p {path.parent}")


def _print(answer: Result) -> None:
    """The finding, the twenty largest effects, and how to read them."""
    from moescope.core.html import cell

    said(f"{printable(answer.title)}\n{printable(answer.subtitle())}\n")
    frame = answer.df()
    first = frame[frame["metric"] == frame["metric"].iloc[0]]
    shown = first.reindex(first["value"].abs().sort_values(ascending=False, kind="stable").index)[:20]
    shown = shown.drop(columns=["effect"], errors="ignore").dropna(axis=1, how="all").astype(object)
    shown = shown.where(shown.notna(), None)
    table(list(shown.columns), [[cell(value) for value in row] for row in shown.itertuples(index=False)])
    if len(first) > len(shown):
        said(f"… {len(frame):,} rows in all; --output x.csv has them")
    said("")
    facts(answer.facts())
