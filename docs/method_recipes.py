"""What to record before each analysis can be asked: the commands that its page shows, and that made its figure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from moescope.core.analysis import Analysis


@dataclass(frozen=True)
class Recipe:
    """Commands that put records into runs.duckdb, and the runs to ask.

    Attributes:
        commands: as typed, each on one line.
        runs: names to give to the analysis.
        parameters: analysis → parameters it must be given, where its defaults do not do.
    """

    commands: tuple[str, ...]
    runs: tuple[str, ...]
    parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_PROFILE = (
    "moescope profile demo --store runs.duckdb --name demo "
    "--probe tokens,routing,experts,residual,router_logits,expert_outputs"
)
_VECTORS = (
    "moescope profile demo --store runs.duckdb --name vectors --probe tokens,routing,router_logits,activations "
    "--site blocks.0.hook_resid_post,blocks.2.hook_resid_post,blocks.4.hook_resid_post --sample 0.2"
)
_PHENOMENA = "moescope phenomena demo --store runs.duckdb"
_STUDY = "moescope sae study demo --site blocks.3.hook_mlp_out --store runs.duckdb"
_CUT = (
    "moescope intervene effect demo --store runs.duckdb --base demo --keep-run cut "
    '--edit "ablate layer=3 experts=5,9 how=route_around" --controls 5'
)
_SETS = "moescope intervene sweep demo --store runs.duckdb --base demo"
_SWEEP = f"{_SETS} --layers 4,5"
_TRAINED = (
    "moescope sae train --store runs.duckdb --run study --site blocks.3.hook_mlp_out --spec topk:d=256,k=8 "
    "--spec topk:d=256,k=32 --spec topk:d=512,k=16 --name d256-k8 --name d256-k32 --name d512-k16 --vectors 200000"
)
_JUDGED = (
    "moescope sae judge --store runs.duckdb --model demo --sae d256-k8 --sae d256-k32 --sae d512-k16 --tokens 4000 "
    "--live-tokens 512 --ablations 0"
)
_STEERED = (
    'moescope sae steer demo --store runs.duckdb --base demo --sae study --feature 12=+5 --target " the" '
    "--strengths 0,4 --controls 1"
)
_DESCRIBED = (
    "moescope sae describe --store runs.duckdb --run study --sae study --unit 7 --unit 12 "
    '--command "a-program-that-reads-a-prompt-and-writes-an-answer"'
)

RECIPES: dict[str, Recipe] = {
    "profile": Recipe((_PROFILE,), ("demo",)),
    "vectors": Recipe((_VECTORS,), ("vectors",)),
    "phenomena": Recipe((_PHENOMENA,), ("phenomena",)),
    "study": Recipe((_STUDY,), ("study",), {"sae_quality": {"sae": "study"}}),
    "effect": Recipe((_PROFILE, _CUT), ("demo",)),
    "compare": Recipe((_PROFILE, _CUT), ("demo", "cut")),
    "probes": Recipe(
        (_PROFILE, "moescope sae probe --store runs.duckdb --run demo --units expert --k 1 --k 4 --k 16"), ("demo",)
    ),
    "neurons": Recipe(
        (
            "moescope profile demo --store runs.duckdb --name neurons --probe tokens,routing,activations "
            "--site blocks.1.mlp.experts.hook_post,blocks.4.mlp.experts.hook_post --sample 1",
        ),
        ("neurons",),
    ),
    "attention": Recipe(
        (
            "moescope profile demo --store runs.duckdb --name seen --probe tokens,routing,attention",
            'moescope intervene effect demo --edit "ablate layer=1 experts=10" --save-intervention cut.json --dry-run',
            "moescope profile demo --store runs.duckdb --name unseen --probe tokens,routing,attention --intervention cut.json",
        ),
        ("seen", "unseen"),
    ),
    "heads": Recipe(
        (_PHENOMENA,),
        ("phenomena, induction heads", "phenomena, retrieval heads"),
        {"head_overlap": {"metric": "induction", "other_metric": "retrieval score, answer given", "top": 6}},
    ),
    "induction": Recipe((_PHENOMENA,), ("phenomena, induction heads",)),
    "retrieval": Recipe((_PHENOMENA,), ("phenomena, retrieval heads",)),
    "steer": Recipe((_PROFILE, _STUDY, _STEERED), ("demo",)),
    "describe": Recipe((_STUDY, _DESCRIBED), ("study",)),
    "circuit": Recipe(("moescope sae circuit demo --store runs.duckdb --task induction --name circuit",), ("circuit",)),
    "students": Recipe(
        (_PROFILE, "moescope sae students demo --store runs.duckdb --run demo --layer 3 --vectors 4096 --steps 200"),
        ("demo",),
    ),
    "sparsity": Recipe(
        (
            _STUDY,
            "moescope sae experts --store runs.duckdb --sae study --model demo --run study --tokens 4000 --ablate 0 --sparsity "
            "--neurons",
        ),
        ("study",),
    ),
    "scaling": Recipe((_STUDY, _TRAINED, _JUDGED), ("study",)),
    "value": Recipe((_PROFILE, f"{_SWEEP} --kind routing_value --controls 2"), ("demo",)),
    "width": Recipe((_PROFILE, f"{_SWEEP} --kind top_k --numbers 1,4"), ("demo",)),
    "drop": Recipe(
        (_PROFILE, f"{_SETS} --kind drop --score frequency --score REAP --shares 0.25,0.5 --controls 2"), ("demo",)
    ),
    "keep": Recipe((_PROFILE, f"{_SETS} --kind keep --score frequency --shares 0.25,0.5,0.75 --controls 2"), ("demo",)),
    "experts": Recipe((_PROFILE, _SWEEP), ("demo",)),
}

# Analyses whose records a recipe of their own makes; for the others, what they need decides.
_OWN: dict[str, str] = {
    "gate_ahead": "vectors",
    "phenomena_chain": "phenomena",
    "induction_heads": "induction",
    "retrieval_heads": "retrieval",
    "dose_response": "steer",
    "steering_dose": "steer",
    "descriptions": "describe",
    "concept_experts": "probes",
    "sparse_probes": "probes",
    "neuron_activity": "neurons",
    "neuron_cett": "neurons",
    "neuron_reuse": "neurons",
    "representation_collapse": "vectors",
    "sink_decay": "attention",
    "head_overlap": "heads",
    "head_circuit": "circuit",
    "mlp_students": "students",
    "expert_sparsity_routing": "sparsity",
    "neurons_against_sae": "sparsity",
    "sae_scaling": "scaling",
    "routing_value": "value",
    "routing_width": "width",
    "drop_curves": "drop",
    "keep_curves": "keep",
    "expert_effects": "experts",
    "score_agreement": "experts",
}

# Analyses whose commands are shown but not run, and have no figure, with the reason.
NOT_RUN: dict[str, str] = {
    "descriptions": "a language model of your own writes the descriptions",
    "head_roles": "its records are made from Python, by moescope.probes.phenomena.head_roles.head_roles(model, store=store)",
    "feature_association": "the bundled corpus is too small to have latents of one label each; record more text of every label",
}

_SAE_TABLES = {"features", "sae_measures", "sparse_probes", "descriptions", "feature_experts", "mlp_students"}


def recipe_of(entry: Analysis) -> str:
    """Which recipe makes the records of an analysis."""
    needs = set(entry.needs)
    if entry.name in _OWN:
        return _OWN[entry.name]
    if entry.runs == 2:
        return "compare"
    if needs & {"heads", "head_sequences"}:
        return "phenomena"
    if needs & _SAE_TABLES:
        return "study"
    return "effect" if "effects" in needs else "profile"
