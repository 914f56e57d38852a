"""`moescope intervene effect`: what an intervention does, against its base run and matched random controls."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    MEASURED,
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
    Report,
    Revision,
    SaveIntervention,
    Seed,
    SkipBad,
    TextField,
    Trust,
    listed,
)
from moescope.cli.intervene.asked import asked_intervention
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.intervention import Intervention
    from moescope.core.result import Result
    from moescope.probes.corpus import Corpus
    from moescope.probes.live_model import LiveModel

Controls = Annotated[int, typer.Option(rich_help_panel=MEASURED, min=0, help="Matched random controls.")]
Group = Annotated[
    list[str],
    typer.Option(
        rich_help_panel=MEASURED,
        help="Also group tokens by these, comma-separated or repeated: label, position, class, or none of them: all.",
    ),
]
Continued = Annotated[
    int,
    typer.Option(
        rich_help_panel=MEASURED, min=0, help="Also continue texts by up to so many tokens and measure what is written."
    ),
]
_ENDINGS = (".html", ".png", ".svg", ".csv", ".parquet", ".json")


def effect(
    model: Model,
    edit: EditWords = None,
    intervention: InterventionFile = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to call the intervention in tables and figures.", show_default="its edits in words"),
    ] = None,
    data: Data = None,
    store: BaseStore = Path("runs.duckdb"),
    controls: Controls = 5,
    base: Base = None,
    group: Group = ["label", "position", "class"],  # noqa: B006  typer reads it, nothing changes it
    generate: Continued = 0,
    prompts: Prompts = 16,
    decompose: Annotated[
        bool,
        typer.Option(
            "--decompose",
            rich_help_panel=MEASURED,
            help="Split the effect into content and re-routing, by replaying the base run.",
        ),
    ] = False,
    keep_run: Annotated[
        str | None,
        typer.Option(help="Also record a full run under the intervention, with this name.", show_default="none"),
    ] = None,
    batch_size: BaseBatchSize = None,
    max_length: BaseMaxLength = None,
    save_intervention: SaveIntervention = None,
    report: Report = None,
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
    """Measure what an intervention does to a model's predictions, beside matched random controls.

    Example: moescope intervene effect demo --edit "ablate layer=3 experts=5" --store runs.duckdb --output effect.html
    """
    from moescope.cli.profile import check_report
    from moescope.probes.corpus import Corpus
    from moescope.probes.effects.tally import check_groups
    from moescope.probes.loading import load

    asked = asked_intervention(edit, intervention, name=name)
    groups = listed(group)
    check_groups(groups)
    check_report(report)
    _check_paths(output, save_intervention, store)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    found = corpus.facts()
    if data is None:
        news(f"no --data: using the bundled labelled corpus of {found.documents} documents")
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if save_intervention is not None:
        asked.for_model(live.anatomy).save(save_intervention)
        news(f"saved {save_intervention}")
    if dry_run:
        plan = _plan(live, corpus, asked, store, controls=controls, decompose=decompose, generate=generate, seed=seed)
        as_json(plan) if json else facts(plan)
        return
    from moescope.effect_api import effect as measure
    from moescope.store.store import Store

    with Store(store) as opened:
        answer = measure(
            live,
            corpus,
            asked,
            opened,
            controls=controls,
            base=base,
            groups=groups,
            generate=generate,
            prompts=prompts,
            batch_size=batch_size,
            max_length=max_length,
            seed=seed,
            decompose=decompose,
            keep_run=keep_run,
            progress=not json,
        )
        if output is not None:
            answer.save(output)
            news(f"saved {output}")
        if report is not None:
            from moescope.report.write import write_report

            written = write_report(opened.run(str(answer.provenance["run_id"])), report)
            news(f"wrote {written}")
    as_json(answer.as_json()) if json else _print(answer)


def _check_paths(output: Path | None, save_intervention: Path | None, store: Path) -> None:
    """What can be wrong with the paths, found before the model is loaded."""
    if output is not None and output.suffix not in _ENDINGS:
        raise InputError(
            f"an answer cannot be saved as {output}",
            expected=f"a path ending in {', '.join(_ENDINGS)}",
            found=output.suffix or "no ending",
        )
    for path in (output, save_intervention, store):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}", found="no such folder", fix=f"mkdir -p {path.parent}")


def _plan(
    live: LiveModel,
    corpus: Corpus,
    asked: Intervention,
    path: Path,
    *,
    controls: int,
    decompose: bool,
    generate: int,
    seed: int,
) -> dict[str, Any]:
    """What would be done, once everything was checked."""
    from moescope.effect_api import with_autoencoders
    from moescope.probes.edits.checks import check_intervention
    from moescope.probes.effects.controls import controls_for
    from moescope.probes.effects.rerouting import routing_frozen
    from moescope.probes.effects.sources import sources_of
    from moescope.store.store import Store

    sources: dict[str, Any] = {}
    if path.exists():
        with Store(path, read_only=True) as store:
            sources = sources_of(asked, store, with_autoencoders(live, store, [asked]))
            check_intervention(live, asked, sources=sources)
    else:
        check_intervention(live, asked)
    if decompose:
        routing_frozen(asked, live, "baseline")
    drawn = controls_for(asked, live, draws=controls, seed=seed, sources=sources)
    return {
        "model": repr(live),
        "store": str(path),
        "intervention": repr(asked),
        "controls": len(drawn.interventions),
        "notes": " ".join(note for note in drawn.notes if "loads" not in note and "how often" not in note),
        "corpus": corpus.name,
        "documents": corpus.facts().documents,
        "characters": corpus.facts().characters,
        "passes over the corpus": 2 + (1 + len(drawn.interventions)) * (1 + decompose),
        "generate": generate,
    }


def _print(answer: Result) -> None:
    """A line a metric: the intervention, its controls, and the difference."""
    from moescope.routing.effects.metric_names import metric_name, with_interval

    frame = answer.df()
    rows = []
    for metric, part in frame.groupby("metric", sort=False):
        target, beyond = part[part["kind"] == "target"].iloc[0], part[part["kind"] == "difference"]
        controls = part.loc[part["kind"] == "control", "value"]
        told = [with_interval(row["value"], row["ci_low"], row["ci_high"]) for _, row in beyond.iterrows()]
        rows.append(
            [
                metric_name(str(metric)),
                with_interval(target["value"], target["ci_low"], target["ci_high"]),
                f"{controls.min():.3g} to {controls.max():.3g}".replace("-", "−") if len(controls) else "—",
                *(told or ["—"]),
                f"{beyond['rank_p'].iloc[0]:.2g}" if len(beyond) else "—",
                int(target["n"]),
                str(target["unit"]),
            ]
        )
    said(f"{printable(answer.title)}\n{printable(answer.subtitle())}\n")
    table(["", "intervention (95 %)", "controls", "beyond controls (95 %)", "rank p", "n", "unit"], rows)
    said("")
    facts(answer.facts())
