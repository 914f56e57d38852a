"""What there is besides the list of latents: quality, experts, concepts, steering and circuits, a panel for each analysis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dash import html

from moescope.dashboard.features_page.readings import Reading
from moescope.dashboard.panel import Click, panel
from moescope.dashboard.unrecorded import command, quoted, unrecorded
from moescope.store.run import Run

TABS = (
    ("latents", "Latents"),
    ("quality", "Quality"),
    ("experts", "Experts"),
    ("concepts", "Concepts"),
    ("steering", "Steering and circuits"),
)


@dataclass(frozen=True)
class Shown:
    """One panel, and when there is something for it.

    Attributes:
        analysis, title: its name, and what it is called where it is empty.
        shows: what it would show.
        verb: words of the command that fills it, with `{sae}`, `{run}` and `{model}` for what is shown.
        model: whether the verb takes the run's model.
        there: a query that gives a row where there is something, of `$run` and `$sae`.
        of_sae: whether it takes `sae`.
        wanted: parameters of the address that it reads; click: what a click selects.
        given: parameters that stay.
        height: of its figure.
    """

    analysis: str
    title: str
    shows: str
    verb: str
    there: str
    model: bool = False
    of_sae: bool = True
    wanted: Mapping[str, str] = field(default_factory=dict)
    click: Click | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    height: int = 440


_OF_SAE = "SELECT 1 FROM {table} WHERE run_id = $run AND sae_id = $sae LIMIT 1"
_OF_RUN = "SELECT 1 FROM {table} WHERE run_id = $run LIMIT 1"
_MEASURE = "SELECT 1 FROM sae_measures WHERE run_id = $run AND sae_id = $sae AND metric IN ({names}) LIMIT 1"
_MEASURE_OF_RUN = "SELECT 1 FROM sae_measures WHERE run_id = $run AND metric IN ({names}) LIMIT 1"
_SCORED = """
    SELECT 1
    FROM sae_measures
    WHERE run_id = $run AND sae_id = $sae AND group_kind = 'feature' AND starts_with(metric, 'predicted_by')
    LIMIT 1
"""
_SWEPT = """
    SELECT 1
    FROM effects
    WHERE base_run_id = $run AND sweep_id IS NOT NULL AND starts_with(metric, 'delta_target_')
    LIMIT 1
"""
_CIRCUIT = "SELECT 1 FROM heads WHERE run_id = $run AND metric = 'circuit_codes' LIMIT 1"
_FEATURES = _OF_SAE.format(table="features")
_PAIRS = _OF_SAE.format(table="feature_experts")
_JUDGE = "sae judge --sae {sae} --model {model} --run {run}"
_JOIN = "sae experts --sae {sae} --model {model} --run {run}"

PANELS: dict[str, tuple[Shown, ...]] = {
    "latents": (
        Shown(
            "features", "Density and strength", "How often and how strongly latents fire.", "sae read --sae {sae} --run {run}",
            _FEATURES,
        ),
        Shown(
            "top_features", "Latents that simple rules explain", "The best explained latents with text they fire on.",
            "sae read --sae {sae} --run {run}",
            _SCORED,
            height=600,
        ),
        Shown(
            "feature_families", "Families", "Dense latents that fire where sparser ones do.", "sae read --sae {sae} --run {run}",
            "SELECT 1 FROM feature_links WHERE run_id = $run AND sae_id = $sae AND kind = 'family' LIMIT 1", height=600,
        ),
    ),
    "quality": (
        Shown(
            "sae_quality", "Quality", "How well it writes vectors again and what the model loses, beside PCA and random controls.",
            _JUDGE, _MEASURE.format(names="'fvu'"), model=True,
        ),
        Shown(
            "sae_comparison", "Comparison", "Which autoencoder of a site loses least for the latents it spends.", _JUDGE,
            _MEASURE_OF_RUN.format(names="'fvu'"), model=True, of_sae=False,
        ),
        Shown(
            "sae_scaling", "Scaling", "How the variance left falls with latents and active latents; it needs several autoencoders.",
            _JUDGE, _MEASURE_OF_RUN.format(names="'fvu'"), model=True, of_sae=False,
        ),
        Shown(
            "neurons_against_sae", "Neurons beside latents", "Whether a layer's neurons are as easy to read as latents.",
            _JOIN + " --neurons", _FEATURES + " ", model=True,
        ),
    ),
    "experts": (
        Shown(
            "expert_features", "Features and experts", "Which experts write which features, and which experts features gate.", _JOIN,
            _PAIRS, model=True, wanted={"side": "side"}, click="feature", height=600,
        ),
        Shown(
            "feature_writers", "Writers", "The experts that write one feature, with what taking them out leaves.", _JOIN, _PAIRS,
            model=True,
        ),
        Shown(
            "expert_sparsity_routing", "Sparsity and routing", "Whether tokens go to the experts in which they turn on the fewest neurons.",
            _JOIN + " --sparsity", _MEASURE_OF_RUN.format(names="'routing_spearman', 'routing_recall'"), model=True, of_sae=False,
        ),
        Shown(
            "mlp_students", "Students of an MLP", "Whether an MLP is better imitated by a sparse mixture of experts.",
            "sae students {model} --layer 0 --run {run}", _OF_RUN.format(table="mlp_students"), model=True, of_sae=False,
        ),
    ),
    "concepts": (
        Shown(
            "sparse_probes", "Sparse probes", "How few units tell a concept, beside random ones and permuted labels.",
            "sae probe --run {run} --units expert --k 1 --k 2 --k 4", _OF_RUN.format(table="sparse_probes"), of_sae=False, height=520,
        ),
        Shown(
            "concept_experts", "Concepts and single units", "The single expert, neuron or latent that tells each concept best.",
            "sae probe --run {run} --units expert --k 1", _OF_RUN.format(table="sparse_probes") .replace("LIMIT", "AND k = 1 LIMIT"),
            of_sae=False, height=520,
        ),
        Shown(
            "feature_association", "Association", "Whether latents of two concepts fire in the same windows of text.",
            "sae read --sae {sae} --run {run}", _MEASURE.format(names="'association'"),
        ),
        Shown(
            "descriptions", "Descriptions", "What descriptions say of units, and whether that tells where they are active.",
            "sae describe --sae {sae} --run {run} --unit 0 --command 'llm -m MODEL'", _OF_RUN.format(table="descriptions"),
            of_sae=False, height=600,
        ),
    ),
    "steering": (
        Shown(
            "steering_dose", "Dose and response", "What steering reaches at each strength and what it costs, beside matched controls.",
            "sae steer {model} --base {run} --sae {sae} --feature 7=+5 --target ' the'",
            _SWEPT,
            model=True, of_sae=False, height=480,
        ),
        Shown(
            "head_circuit", "Circuit of heads", "Which heads a task needs, by codes of their outputs, and whether it needs them.",
            "sae circuit {model} --task induction", _CIRCUIT, model=True,
            of_sae=False, height=480,
        ),
    ),
}  # fmt: skip


def tab(name: str, run: Run, reading: Reading) -> Any:
    """The panels of a tab, each drawn where there is something for it, and otherwise the verb that fills it."""
    return html.Div([_shown(each, run, reading) for each in PANELS[name]])


def filled_by(each: Shown, run: Run, reading: Reading) -> str:
    """The command that records what a panel shows."""
    return command(run, each.verb.replace("{sae}", quoted(reading.name)), model=each.model)


def _shown(each: Shown, run: Run, reading: Reading) -> Any:
    given = {"run": run.run_id, "sae": reading.sae_id}
    asked = {key: value for key, value in given.items() if f"${key}" in each.there}
    if not run.store.fetch(each.there, asked):
        return unrecorded(each.title, each.shows, filled_by(each, run, reading), why=f"not recorded for run {run.name}")
    parameters = {**each.given, **({"sae": reading.sae_id} if each.of_sae else {})}
    return panel(
        each.analysis.replace("_", ""),
        each.analysis,
        [run],
        given=parameters,
        wanted=each.wanted,
        click=each.click,
        height=each.height,
    )
