"""`moescope sae experts`: which experts write an autoencoder's latents, and whose routers the latents move."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moescope.cli.export import only_run
from moescope.cli.flags import (
    MODEL,
    Device,
    DeviceMap,
    Documents,
    DryRun,
    Dtype,
    InStore,
    Json,
    OneRun,
    OneSae,
    Revision,
    Seed,
    Trust,
)
from moescope.cli.output import as_json, facts, news, printable, said, table
from moescope.cli.sae.asked import check_documents, tell_plan
from moescope.cli.store_check import check_store
from moescope.core.errors import InputError

if TYPE_CHECKING:
    from moescope.core.result import Result

_Model = Annotated[
    str,
    typer.Option(
        "--model",
        rich_help_panel=MODEL,
        help='Its model: "demo", a Hub id, a folder, or a .gguf file.',
        show_default=False,
    ),
]
_Layers = Annotated[
    str | None,
    typer.Option(
        help="Layers of routers, comma-separated.",
        show_default="the nearest that writes there, and all behind",
    ),
]
_Features = Annotated[str | None, typer.Option(help="Latents, comma-separated.", show_default="all")]
_Tokens = Annotated[int | None, typer.Option(min=1, help="About how many tokens.", show_default="all")]
_LeastActive = Annotated[int, typer.Option(min=1, help="Latents active on fewer tokens are left out.")]
_Top = Annotated[int, typer.Option(min=1, help="Experts kept of every latent.")]
_Encoder = Annotated[bool, typer.Option("--encoder", help="Also along encoder columns.")]
_Ablate = Annotated[int, typer.Option(min=0, help="So many latents lose their top writers; 0 for none.")]
_Writers = Annotated[int, typer.Option(min=1, help="Experts taken out for each.")]
_Controls = Annotated[int, typer.Option(min=1, help="Draws of matched experts beside each.")]
_AblateTokens = Annotated[int, typer.Option(min=1, help="About so many tokens for every cut.")]
_Sparsity = Annotated[
    bool, typer.Option("--sparsity", help="Also hold routers against the experts of fewest active neurons.")
]
_Neurons = Annotated[
    bool, typer.Option("--neurons", help="Also read the layer's own neurons, and rotated ones, beside the latents.")
]
_SHOWN = 12


def experts(
    sae: OneSae,
    model: _Model,
    store: InStore = Path("runs.duckdb"),
    run: OneRun = None,
    layers: _Layers = None,
    features: _Features = None,
    documents: Documents = "held_out",
    tokens: _Tokens = None,
    least_active: _LeastActive = 20,
    top: _Top = 3,
    encoder: _Encoder = False,
    ablate: _Ablate = 10,
    writers: _Writers = 3,
    controls: _Controls = 5,
    ablate_tokens: _AblateTokens = 10_000,
    sparsity: _Sparsity = False,
    neurons: _Neurons = False,
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = "auto",
    revision: Revision = None,
    trust_remote_code: Trust = False,
    seed: Seed = 0,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Join an autoencoder's latents to the experts that write them and the routers they move; cut the writers.

    Example: moescope sae experts --store runs.duckdb --sae topk-1024 --model demo --run base
    """
    from moescope.analysis_api import analyze
    from moescope.probes.loading import load
    from moescope.sae.belonging import check_belongs
    from moescope.sae.experts.ablate_writers import ablate_writers
    from moescope.sae.experts.compare_neurons import compare_neurons
    from moescope.sae.experts.feature_experts import feature_experts
    from moescope.sae.experts.sparsity import expert_sparsity
    from moescope.sae.loading import load_autoencoder
    from moescope.store.store import Store

    check_documents(documents)
    asked, latents = _numbers(layers, "layers"), _numbers(features, "features")
    check_store(store)
    if dry_run:
        tell_plan(store, run=run, saes=[sae], model=model, json=json, controls=controls)
        return
    with Store(store) as opened:
        found = only_run(opened, run)
        live = load(
            model,
            device=device,
            device_map=device_map,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        autoencoder = load_autoencoder(opened, sae, device=str(live.device))
        check_belongs(autoencoder, live)
        shown: dict[str, Any] = {"documents": documents, "seed": seed, "progress": not json}
        outcome = feature_experts(
            autoencoder, live, found, opened, layers=asked, features=latents, tokens=tokens, least_active=least_active, top=top,
            encoder=encoder, **shown,
        )  # fmt: skip
        answers: dict[str, Result] = {}
        options: dict[str, Any] = {"allow_incomplete": True, "sae": autoencoder.sae_id}
        if outcome.writers:
            answers["writes"] = analyze(found, "expert_features", **options)
        if outcome.gates:
            answers["gates"] = analyze(found, "expert_features", side="gates", **options)
        if ablate and outcome.writers:
            ablate_writers(
                autoencoder, live, opened, run=found, features=latents, top=ablate, writers=writers, controls=controls,
                tokens=ablate_tokens, layer=outcome.writers[-1][0], least_active=least_active, **shown,
            )  # fmt: skip
            answers["writers"] = analyze(found, "feature_writers", **options)
        if sparsity:
            expert_sparsity(live, found, opened, layers=asked, seed=seed, progress=not json)
            answers["sparsity"] = analyze(found, "expert_sparsity_routing", allow_incomplete=True)
        if neurons:
            compare_neurons(autoencoder, live, found, opened, **shown)
            answers["neurons"] = analyze(found, "neurons_against_sae", **options)
    if json:
        as_json({name: result.as_json() for name, result in answers.items()})
        return
    facts(
        {
            "autoencoder": autoencoder.name, "run": found.name, "latents": outcome.features, "tokens": outcome.tokens,
            "documents": outcome.documents, "rows": outcome.rows,
        }
    )  # fmt: skip
    for note in outcome.notes:
        news(note)
    for name, result in answers.items():
        _print(name, result)


def _numbers(text: str | None, what: str) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.replace(" ", "").split(",") if part]
    except ValueError:
        raise InputError(f"{what} cannot be {text!r}", expected="whole numbers, comma-separated") from None


def _print(name: str, result: Result) -> None:
    said(f"\n{printable(result.title)}\n{printable(result.subtitle())}\n")
    frame = result.df()
    if name in ("writes", "gates"):
        main = {"writes": "writes in excess", "gates": "moves the logit"}[name]
        held = frame[frame["metric"] == main].sort_values("value", ascending=False, kind="stable")
        held = held.drop_duplicates("feature").head(_SHOWN)
        columns = ["latent", "expert", main, "95 % interval", "null", "active tokens"]
        rows = [
            [int(r.feature), f"L{int(r.layer)}·E{int(r.expert)}", f"{r.value:.3g}", _span(r.ci_low, r.ci_high), _one(r.null), int(r.n)]
            for r in held.itertuples()
        ]  # fmt: skip
    elif name == "writers":
        told = frame["metric"].isin(["writes in excess", "moves the logit"]) | (frame["side"] == "ablation")
        held = frame[told].sort_values("side", kind="stable")
        columns = ["metric", "latent", "expert", "value", "95 % interval", "null", "n"]
        rows = [
            [r.metric, int(r.feature), _expert(r), f"{r.value:.3g}", _span(r.ci_low, r.ci_high), _one(r.null), int(r.n)]
            for r in held.itertuples()
        ]
    else:
        held = frame[~frame["metric"].str.contains("by expert")].head(2 * _SHOWN)
        by = next(name for name in ("units", "score") if name in held)
        columns = [by, "metric", "value", "95 % interval", "null", "n"]
        rows = [
            [str(part), r.metric, f"{r.value:.3g}", _span(r.ci_low, r.ci_high), _one(r.null), int(r.n)]
            for part, r in zip(held[by], held.itertuples(), strict=True)
        ]
    table(columns, rows)


def _expert(row: Any) -> str:
    """Layer and expert; a dash where all of a latent's writers are meant."""
    known = isinstance(row.expert, (int, float)) and not math.isnan(row.expert)
    return f"L{int(row.layer)}·E{int(row.expert)}" if known else "—"


def _one(value: float) -> str:
    return "—" if math.isnan(value) else f"{value:.3g}"


def _span(low: float, high: float) -> str:
    return "—" if math.isnan(low) or math.isnan(high) else f"{low:.3g} to {high:.3g}"
