"""`moescope sae steer`: steer by features, contrast or any saved intervention, and measure the dose-response."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.flags import (
    MEASURED,
    Base,
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
    SaveIntervention,
    Seed,
    SkipBad,
    TextField,
    Trust,
    UseSae,
)
from moescope.cli.intervene.asked import asked_intervention
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.sae.asked import tell_plan
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.edit import Edit
    from moescope.core.intervention import Intervention
    from moescope.core.result import Result
    from moescope.probes.live_model import LiveModel
    from moescope.sae.autoencoder import Autoencoder
    from moescope.sae.steering.targets import Target
    from moescope.store.store import Store

_FEATURE = re.compile(r"(?P<feature>\d+)=(?P<how>[+*]?)(?P<value>-?\d*\.?\d+(?:e-?\d+)?|max|mean)")
_STEERS = "What steers"
_HOW = {"+": "add", "": "set", "*": "scale"}
_ENDINGS = (".html", ".png", ".svg", ".csv", ".parquet", ".json")

_Feature = Annotated[
    list[str] | None,
    typer.Option(
        "--feature",
        rich_help_panel=_STEERS,
        help="A feature of --sae and what becomes of it, repeatable: 12=+5 adds, 12=5 sets, 12=*0 takes it out, 12=+max adds "
        "the largest activation it was read with.",
        show_default="none",
    ),
]
_Active = Annotated[
    bool, typer.Option("--only-active", rich_help_panel=_STEERS, help="Change features only where they are active.")
]
_Contrast = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        "--contrast",
        rich_help_panel=_STEERS,
        help="Two files of texts, one a line: add the difference of their means (with --sae: move the features that differ "
        "most, see --top).",
        show_default=False,
    ),
]
_Top = Annotated[
    int, typer.Option(rich_help_panel=_STEERS, min=1, help="With --contrast and --sae: how many features.")
]
_Layer = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=_STEERS,
        min=0,
        help="Layer of --contrast, from 0.",
        show_default="where held-out texts differ most",
    ),
]
_Towards = Annotated[
    Path | None,
    typer.Option(
        "--towards",
        rich_help_panel=_STEERS,
        help="A file of texts, one a line: descend in --sae's code towards their mean.",
        show_default=False,
    ),
]
_Steps = Annotated[int, typer.Option(rich_help_panel=_STEERS, min=1, help="Steps of --towards.")]
_Rate = Annotated[
    float,
    typer.Option(
        min=0, max=0.5, help="Length of a step of --towards, as a share of the norm.", rich_help_panel=_STEERS
    ),
]
_Target = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        help="A text of one token whose log-probability should grow; repeatable for several.",
        show_default="none",
    ),
]
_TargetFeature = Annotated[
    int | None,
    typer.Option(
        "--target-feature",
        min=0,
        help="Instead: number of a feature of --sae that should grow, from 0.",
        show_default="none",
    ),
]
_Strengths = Annotated[
    str, typer.Option(rich_help_panel=MEASURED, help="Factors of the intervention's amount, comma-separated: 0,1,2,4.")
]
_On = Annotated[
    str | None,
    typer.Option(
        "--on",
        help="Label of the texts that the target is of; costs are then told of the others.",
        show_default="all texts",
    ),
]


def steer(
    model: Model,
    store: BaseStore = Path("runs.duckdb"),
    sae: UseSae = None,
    feature: _Feature = None,
    only_active: _Active = False,
    contrast: _Contrast = None,
    top: _Top = 16,
    layer: _Layer = None,
    towards: _Towards = None,
    steps: _Steps = 10,
    rate: _Rate = 0.05,
    edit: EditWords = None,
    intervention: InterventionFile = None,
    target: _Target = None,
    target_feature: _TargetFeature = None,
    data: Data = None,
    strengths: _Strengths = "0,1,2,4",
    controls: Annotated[
        int, typer.Option(min=0, help="Matched controls at every strength.", rich_help_panel=MEASURED)
    ] = 5,
    generate: Annotated[
        int, typer.Option(min=0, help="Tokens written after each prompt; 0 for none.", rich_help_panel=MEASURED)
    ] = 0,
    prompts: Prompts = 16,
    on: _On = None,
    base: Base = None,
    save_intervention: SaveIntervention = None,
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
    """Steer a model and measure at growing strength what that reaches and what it costs, beside matched controls.

    Example: moescope sae steer demo --sae mine --feature 12=+5 --target " Python" --strengths 0,1,2,4
    """
    from moescope.probes.corpus import Corpus
    from moescope.probes.loading import load
    from moescope.probes.sweeps.plans import as_floats
    from moescope.store.store import Store

    asked = _Asked(sae, feature or [], contrast, towards, edit, intervention)
    asked.check(target, target_feature)
    doses = as_floats(strengths)
    _check_paths(store, save_intervention, output)
    corpus = Corpus.load(data or "demo", text_field=text_field, label_field=label_field, skip_bad_lines=skip_bad_lines)
    if data is None:
        news(f"no --data: using the bundled labelled corpus of {corpus.facts().documents} documents")
    live = load(
        model, device=device, device_map=device_map, dtype=dtype, revision=revision, trust_remote_code=trust_remote_code
    )
    if dry_run:
        told = {"strengths": len(doses), "controls": controls, "documents": corpus.facts().documents}
        tell_plan(store, run=base, any_run=True, saes=[] if sae is None else [sae], model=live, json=json, **told)
        return
    with Store(store) as opened:
        found = _autoencoder(opened, sae, live)
        steering = asked.made(
            live, opened, found, top=top, layer=layer, steps=steps, rate=rate, only_active=only_active
        )
        if save_intervention is not None:
            steering.for_model(live.anatomy).save(save_intervention)
            news(f"saved {save_intervention}")
        answer = _measured(
            live,
            steering,
            corpus,
            opened,
            found,
            target=_target(live, target, target_feature, found),
            on=on,
            strengths=doses,
            controls=controls,
            generate=generate,
            prompts=prompts,
            base=base,
            seed=seed,
            progress=not json,
        )
        if output is not None:
            answer.save(output)
            news(f"saved {output}")
    as_json(answer.as_json()) if json else _print(answer)


class _Asked:
    """What steers, as the command line says it."""

    def __init__(
        self,
        sae: str | None,
        features: list[str],
        contrast: tuple[Path, Path] | None,
        towards: Path | None,
        edit: list[str] | None,
        file: Path | None,
    ) -> None:
        self.sae, self.features, self.contrast, self.towards = sae, features, contrast, towards
        self.edit, self.file = edit, file

    def check(self, target: list[str] | None, target_feature: int | None) -> None:
        """Refuse what cannot be meant, before a model is loaded."""
        ways = {
            "--feature": bool(self.features), "--contrast": self.contrast is not None, "--towards": self.towards is not None,
            "--edit or --intervention": self.edit is not None or self.file is not None,
        }  # fmt: skip
        given = [name for name, there in ways.items() if there]
        if len(given) != 1:
            raise InputError(
                "say in one way what steers", expected=", ".join(ways), found=", ".join(given) or "none of them"
            )
        if self.sae is None and (self.features or self.towards is not None or target_feature is not None):
            raise InputError("this needs an autoencoder", fix="name one of the store: --sae NAME")
        if (target is None) == (target_feature is None):
            raise InputError("one of --target and --target-feature is needed, and only one")
        for text in self.features:
            _read_feature(text)

    def made(
        self,
        live: LiveModel,
        store: Store,
        sae: Autoencoder | None,
        *,
        top: int,
        layer: int | None,
        steps: int,
        rate: float,
        only_active: bool,
    ) -> Intervention:
        """The intervention."""
        from moescope.sae.steering.contrast import best_layer, contrastive_mean
        from moescope.sae.steering.descend import descend_to
        from moescope.sae.steering.latent_edit import feature_set

        if self.features:
            assert sae is not None
            return _of_features(self.features, sae, store, only_active=only_active)
        if self.towards is not None:
            assert sae is not None
            return descend_to(sae, live, _lines(self.towards), steps=steps, rate=rate).intervention
        if self.contrast is None:
            return asked_intervention(self.edit, self.file)
        first, second = (_lines(path) for path in self.contrast)
        if sae is not None:
            return feature_set(sae, live, first, second, top=top, only_active=only_active).intervention
        if layer is None:
            choice = best_layer(live, first, second)
            layer = choice.layer
            news(f"layer {layer}: held-out AUC {choice.auc[layer]:.2f}, with mixed sides {choice.shuffled[layer]:.2f}")
        return contrastive_mean(live, first, second, layer=layer).intervention


def _of_features(texts: list[str], sae: Autoencoder, store: Store, *, only_active: bool) -> Intervention:
    from moescope.core.intervention import Intervention
    from moescope.sae.steering.latent_edit import latent_edit

    edits: list[Edit] = []
    for text in texts:
        feature, how, value = _read_feature(text)
        made = latent_edit(sae, feature, how=how, value=value, only_active=only_active, store=store)  # type: ignore[arg-type]  # words of a pattern
        edits += made.intervention.edits
    named = ", ".join(texts[:3]) + (", …" if len(texts) > 3 else "")
    return Intervention(edits, name=f"latent{'s' if len(texts) > 1 else ''} {named}")


def _read_feature(text: str) -> tuple[int, str, float | str]:
    """Feature, how and value of `12=+5`."""
    found = _FEATURE.fullmatch(text.strip())
    if found is None:
        raise InputError(
            f"{text!r} says nothing about a feature",
            expected="12=+5 (add), 12=5 (set), 12=*0 (scale), 12=+max or 12=mean",
        )
    value = found["value"]
    if found["how"] == "*" and value in ("max", "mean"):
        raise InputError(f"{text!r} scales by an activation", expected="12=*0, 12=*2, or 12=+max")
    return int(found["feature"]), _HOW[found["how"]], value if value in ("max", "mean") else float(value)


def _autoencoder(store: Store, name: str | None, live: LiveModel) -> Autoencoder | None:
    from moescope.sae.loading import load_autoencoder

    return None if name is None else load_autoencoder(store, name, device=live.device, model=live)


def _target(live: LiveModel, tokens: list[str] | None, feature: int | None, sae: Autoencoder | None) -> Target:
    from moescope.sae.steering.targets import LatentTarget, TokenTarget

    if tokens is not None:
        return TokenTarget(live, tokens)
    assert sae is not None
    assert feature is not None
    return LatentTarget(sae, feature)


def _measured(
    live: LiveModel,
    steering: Intervention,
    corpus: Any,
    store: Store,
    sae: Autoencoder | None,
    *,
    on: str | None,
    seed: int,
    **more: Any,
) -> Result:
    from moescope.analysis_api import analyze
    from moescope.effect_api import with_autoencoders, with_notes
    from moescope.sae.steering.dose import dose_response

    given = {} if sae is None else {sae.name: sae}
    sources = with_autoencoders(live, store, [steering], given)
    dose = dose_response(live, steering, corpus, store, sources=sources, seed=seed, **more)
    return with_notes(analyze(dose.base, "steering_dose", sweep=dose.sweep_id, on=on, seed=seed), dose.notes)


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as unread:
        raise InputError(f"cannot read {path}", expected="a file of texts, one a line", found=str(unread)) from unread
    if not found:
        raise InputError(f"{path} has no text", expected="one text a line")
    return found


def _check_paths(store: Path, save: Path | None, output: Path | None) -> None:
    if output is not None and output.suffix not in _ENDINGS:
        raise InputError(f"an answer cannot be saved as {output}", expected=f"a path ending in {', '.join(_ENDINGS)}")
    for path in (store, save, output):
        if path is not None and not path.parent.is_dir():
            raise InputError(f"cannot write {path}", found="no such folder", fix=f"mkdir -p {path.parent}")


def _print(answer: Result) -> None:
    """A line a strength and metric."""
    rows = []
    for row in answer.df().itertuples():
        bounds = "" if row.ci_low != row.ci_low else f" ({row.ci_low:.3g} to {row.ci_high:.3g})"
        controls = "—" if row.control_low != row.control_low else f"{row.control_low:.3g} to {row.control_high:.3g}"
        unit = answer.units.get(f"value[{row.metric}]", "")
        rows.append([f"{row.strength:g}", str(row.metric), f"{row.value:.4g}{bounds}", controls, unit, int(row.n)])
    said(f"{printable(answer.title)}\n{printable(answer.subtitle())}\n")
    table(["strength", "", "steered (95 %)", "controls", "unit", "n"], rows)
    said("")
    facts(answer.facts())
