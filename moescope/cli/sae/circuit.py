"""`moescope sae circuit`: the heads that a task needs, from discrete codes of their outputs, confirmed by cutting them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from moescope.cli.flags import Device, DeviceMap, DryRun, Dtype, Json, Model, Report, Revision, Seed, StorePath, Trust
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.profile import check_report
from moescope.cli.sae.asked import tell_plan
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result

_Task = Annotated[str, typer.Option(help="The task: ioi, greater_than or induction.")]
_Side = Annotated[
    Path | None,
    typer.Option(
        help="Prompts of one's own in place of a task: a text file, one a line; after tabs the right and a wrong answer.",
        show_default="none",
    ),
]
_Name = Annotated[str | None, typer.Option(help="Name of the run.", show_default="circuit of the task")]
_Examples = Annotated[int, typer.Option(min=4, help="Prompts of each kind that scores come from.")]
_TestPrompts = Annotated[int, typer.Option(min=2, help="Other prompts, on which cuts are measured.")]
_Codes = Annotated[int, typer.Option(min=2, help="Latents of the autoencoder over head outputs.")]
_Threshold = Annotated[
    float | None, typer.Option(help="Heads whose score × heads is over it; 1 where all are alike.", show_default="none")
]
_Size = Annotated[int | None, typer.Option(min=1, help="So many heads.", show_default="5 % of them")]
_Fdr = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="Heads called at this false-discovery rate, which may be none.", show_default="none"
    ),
]
_Positions = Annotated[Literal["last", "all"], typer.Option(help="Where heads are cut: at the last token, or at all.")]
_Controls = Annotated[int, typer.Option(min=2, help="Random sets of heads.")]
_SHOWN = 12


def circuit(
    model: Model,
    task: _Task = "ioi",
    positives: _Side = None,
    negatives: _Side = None,
    store: StorePath = Path("runs.duckdb"),
    name: _Name = None,
    report: Report = None,
    examples: _Examples = 25,
    test_prompts: _TestPrompts = 25,
    codes: _Codes = 128,
    threshold: _Threshold = None,
    size: _Size = None,
    fdr: _Fdr = None,
    positions: _Positions = "last",
    controls: _Controls = 10,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find the attention heads that a task needs, and cut them against random ones.

    Example: moescope sae circuit demo --task induction --store runs.duckdb
    """
    from moescope.analysis_api import analyze
    from moescope.probes.loading import load
    from moescope.report.write import write_report
    from moescope.sae.circuits.circuit import head_circuit
    from moescope.store.store import Store

    check_report(report)
    if (positives is None) != (negatives is None):
        raise InputError("prompts of one's own have two sides", fix="give both --positives and --negatives")
    if not store.parent.is_dir():
        raise InputError(f"cannot make a store at {store}", found="no such folder", fix=f"mkdir -p {store.parent}")
    asked: Any = task if positives is None or negatives is None else (_prompts(positives), _prompts(negatives))
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if dry_run:
        told = {
            "task": task if isinstance(asked, str) else "prompts of one's own",
            "examples": examples,
            "test prompts": test_prompts,
        }
        tell_plan(store, run=None, any_run=True, saes=[], model=live, json=json, **told)
        return
    with Store(store) as opened:
        found = head_circuit(
            live, opened, task=asked, examples=examples, test_prompts=test_prompts, codes=codes, threshold=threshold, size=size,
            fdr=fdr, positions=positions, controls=controls, seed=seed, run_name=name, progress=not json,
        )  # fmt: skip
        assert found.run is not None
        result = analyze(found.run, "head_circuit")
        if report is not None:
            write_report(found.run, report)
            news(f"saved {report}")
    as_json(result.as_json()) if json else _print(result)


def _prompts(path: Path) -> list[Any]:
    """A prompt a line: its text, or text, right answer and wrong answer between tabs; backslash-n stands for a line break."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as refused:
        raise InputError(f"cannot read {path} as prompts", found=str(refused)) from refused
    found: list[Any] = []
    for number, line in enumerate(lines, start=1):
        parts = tuple(part.replace("\\n", "\n") for part in line.split("\t"))
        if line.strip() and len(parts) not in (1, 3):
            raise InputError(
                f"line {number} of {path} is no prompt", expected="a text, or text, answer and wrong answer, with tabs"
            )
        found += [] if not line.strip() else [parts if len(parts) == 3 else parts[0]]
    return found


def _print(result: Result) -> None:
    said(f"{printable(result.title)}\n{printable(result.subtitle())}\n")
    frame = result.df()
    heads = frame[frame["metric"] == "codes"].sort_values("value", ascending=False, kind="stable").head(_SHOWN)
    table(
        ["head", "codes", "sides shuffled", "p", "of the circuit", "known"],
        [
            [
                f"L{r.layer}·H{r.head}",
                int(r.value),
                f"{r.null:.1f}",
                f"{r.p:.3f}",
                "yes" if r.member else "",
                _number(r.known),
            ]
            for r in heads.itertuples()
        ],
    )
    others = frame[frame["metric"] != "codes"]
    if len(others):
        said("")
        table(
            ["measured", "of", "value", "95 % interval", "control", "its range"],
            [
                [
                    r.metric, "" if r.condition is None or r.condition != r.condition else r.condition, _number(r.value),
                    _span(r.ci_low, r.ci_high), _number(r.null), _span(r.null_low, r.null_high),
                ]
                for r in others.itertuples()
            ],
        )  # fmt: skip
    said("")
    facts(result.facts())


def _number(value: Any) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "—"


def _span(low: Any, high: Any) -> str:
    return f"{low:.3f} to {high:.3f}" if math.isfinite(low) and math.isfinite(high) else "—"
